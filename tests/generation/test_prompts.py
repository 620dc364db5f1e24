from craft_jax.data import tokenizers
from craft_jax.generation.prompts import prompt_ids


def test_the_empty_prompt():
    assert prompt_ids(tokenizers.bytes_(), "") == [256]
    assert prompt_ids(tokenizers.characters("\nab", end_token=False), "") == [0]
    assert prompt_ids(tokenizers.characters("ba", end_token=False), "") == [0]
    assert prompt_ids(tokenizers.characters("ba", end_token=False), "b") == [1]
