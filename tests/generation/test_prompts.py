import tokenizers as hf

from craft_jax.data import tokenizers
from craft_jax.generation.prompts import prompt_ids


def test_the_empty_prompt():
    assert prompt_ids(tokenizers.bytes_(), "") == [256]
    assert prompt_ids(tokenizers.characters("\nab", end_token=False), "") == [0]
    assert prompt_ids(tokenizers.characters("ba", end_token=False), "") == [0]
    assert prompt_ids(tokenizers.characters("ba", end_token=False), "b") == [1]


def test_the_empty_prompt_of_a_tokenizer_that_drops_line_breaks():
    inner = hf.Tokenizer(hf.models.WordLevel({"[PAD]": 0, "the": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    assert prompt_ids(tokenizers.Tokenizer(inner), "") == [0]
