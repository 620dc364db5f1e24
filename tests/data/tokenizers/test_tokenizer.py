import re

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import Tokenizer as HuggingFaceTokenizer

from craft_jax.data import tokenizers
from craft_jax.data.tokenizers import END_TOKEN, Tokenizer
from craft_jax.errors import DataError, UsageError
from tests.conftest import words

HARD = (
    "caf\u00e9 \U0001f642 \u6f22\u5b57 \r\n\t\x00 e\u0301 \U0001f469\u200d\U0001f52c <|endoftext|> "
)


def kinds() -> dict[str, Tokenizer]:
    return {
        "char": tokenizers.characters(HARD + words(200), end_token=True),
        "byte": tokenizers.bytes_(),
        "bpe": tokenizers.train_bpe([words(2000)], 300),
    }


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_round_trip_of_hard_text(kind, tmp_path):
    tokenizer = kinds()[kind]
    for text in (HARD, words(200), "", "\n"):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id not in ids
    (tmp_path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    again = Tokenizer.load(tmp_path)
    assert again.digest == tokenizer.digest
    assert (again.vocab_size, again.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    assert again.encode(HARD).tolist() == tokenizer.encode(HARD).tolist()
    assert again.unknown_characters("\u2603") == tokenizer.unknown_characters("\u2603")


def test_sizes():
    assert tokenizers.characters("hello", end_token=False).vocab_size == 4
    assert tokenizers.characters("hello", end_token=False).end_id is None
    assert tokenizers.characters("hello", end_token=True).end_id == 4
    assert tokenizers.bytes_().vocab_size == 257
    assert tokenizers.train_bpe([words(2000)], 280).vocab_size == 280


def test_characters_are_numbered_in_code_point_order():
    assert tokenizers.characters("cab\n", end_token=False).encode("\nabc").tolist() == [0, 1, 2, 3]


def test_unknown_characters_are_named():
    tokenizer = tokenizers.characters("abc", end_token=False)
    with pytest.raises(UsageError, match=re.escape("'d' (U+0064), '\u20ac' (U+20AC)")):
        tokenizer.encode("a\u20acbdd")
    assert tokenizers.bytes_().unknown_characters("\u20ac") == []


def test_characters_keep_the_ids_that_they_are_given():
    given = {"b": 7, "<unk>": 2, "\n": 0, "[EOS]": 4}
    tokenizer = tokenizers.numbered_characters(given, ["[EOS]", "<unk>"], unknown="<unk>")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (8, 4)
    assert tokenizer.encode("b\n[b").tolist() == [7, 0, 2, 7]
    assert tokenizer.decode([4, 7, 2, 0]) == "b\n"
    again = Tokenizer(HuggingFaceTokenizer.from_str(tokenizer.json))
    for one in (tokenizer, again):
        assert one.unknown_characters("xyz") == []
        assert [ids.tolist() for ids in one.encode_batch(["x", "b"])] == [[2], [7]]
    strict = tokenizers.numbered_characters({"b": 7, "a": 2})
    assert strict.unknown_characters("abc<unk>") == ["<", ">", "c", "k", "n", "u"]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_stream_never_shows_half_a_character(kind):
    tokenizer = kinds()[kind]
    stream = tokenizer.stream()
    shown = [stream.push(token) for token in tokenizer.encode(HARD)]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + stream.finish() == HARD


def test_a_stream_that_stops_within_a_character():
    tokenizer = tokenizers.bytes_()
    stream = tokenizer.stream()
    ids = tokenizer.encode("a\U0001f642")[:-1]
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.finish() == "\ufffd"


def _sentencepiece_like() -> hf.Tokenizer:
    pieces = ["<unk>", "\u2581", *"thequickbrownfxjmps", "\u2581the", "\u2581fox", "\u2581quick"]
    inner = hf.Tokenizer(hf.models.Unigram([(p, -float(len(p) == 1)) for p in pieces], 0))
    inner.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    inner.decoder = hf.decoders.Metaspace()
    return inner


def _words_of(model: str) -> hf.Tokenizer:
    vocabulary = {word: n for n, word in enumerate("[UNK] the quick br fox jumps".split())}
    vocabulary |= {"brown": 6, "##own": 7, ".": 8}
    if model == "WordPiece":
        inner = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token="[UNK]"))
        inner.decoder = hf.decoders.WordPiece()
    else:
        inner = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    return inner


def _with_ends_of_words() -> hf.Tokenizer:
    letters = sorted(set("thequickbrownfxjmps."))
    vocabulary = {c: n for n, c in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    inner = hf.Tokenizer(hf.models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    inner.decoder = hf.decoders.BPEDecoder()
    return inner


@pytest.mark.parametrize(
    "inner",
    [
        _sentencepiece_like(),
        _words_of("WordPiece"),
        _words_of("WordLevel"),
        _with_ends_of_words(),
    ],
    ids=["metaspace", "wordpiece", "wordlevel", "ends of words"],
)
def test_a_continuation_neither_loses_nor_adds_a_space(inner):
    tokenizer = Tokenizer(inner)
    whole = "the quick brown fox jumps the fox"
    ids = tokenizer.encode(whole).tolist()
    assert tokenizer.decode(ids) == whole
    for word in range(1, 7):
        prompt = " ".join(whole.split()[:word])
        before = tokenizer.encode(prompt).tolist()
        assert ids[: len(before)] == before
        rest = tokenizer.continuation(ids[len(before) :], before, prompt)
        assert prompt + rest == whole
        # A space at the end of the prompt, which the ids do not have, is not shown twice.
        if tokenizer.encode(f"{prompt} ").tolist() == before:
            rest = tokenizer.continuation(ids[len(before) :], before, f"{prompt} ")
            assert f"{prompt} {rest}" == whole


def test_a_continuation_within_a_word_and_within_bytes():
    pieces = Tokenizer(_words_of("WordPiece"))
    assert pieces.continuation([7, 4], pieces.encode("the br").tolist(), "the br") == "own fox"
    for tokenizer in kinds().values():
        ids = tokenizer.encode(HARD).tolist()
        for prompt in (HARD[:n] for n in range(0, len(HARD), 3)):
            before = tokenizer.encode(prompt).tolist()
            if ids[: len(before)] == before:
                assert prompt + tokenizer.continuation(ids[len(before) :], before, prompt) == HARD


def test_pieces_encode_as_alone():
    tokenizer = tokenizers.train_bpe([words(2000)], 300)
    pieces = [words(50, seed) for seed in range(10)]
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(pieces)]
    assert encoded == [tokenizer.encode(piece).tolist() for piece in pieces]


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="tokenizer"):
        Tokenizer.load(path)


def test_end_tokens_of_other_tokenizers():
    inner = tokenizers.bytes_()
    assert END_TOKEN in inner.json
    renamed = inner.json.replace(END_TOKEN, "</s>")
    assert Tokenizer(HuggingFaceTokenizer.from_str(renamed)).end_id == 256
