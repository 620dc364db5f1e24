"""Converted SentencePiece models have the ids and the texts of the sentencepiece library."""

import importlib
import io
import itertools
import os
import pickle
import random
import sysconfig
from pathlib import Path

import pytest
import tokenizers

from craft_jax.data.tokenizers import Tokenizer, sentencepiece_models
from craft_jax.errors import DataError

sentencepiece = pytest.importorskip("sentencepiece")
messages = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")

# Emoji, sequences of emoji, scripts with marks, marks out of order, what NFKC replaces, spaces of
# all kinds, controls, and text that spells tokens.
_EMOJI = "\U0001f469\u200d\U0001f52c \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea"
_SCRIPTS = "A\U0001f3fb 漢字 かが か\u3099 ハ\uff9f ﾊﾟ ｶﾞ العربية عَرَبِيّ שָׁלוֹם क्षि क\u093c \u0958 நொ"
_MARKS = "e\u0301 e\u0301\u0302 e\u0302\u0301 o\u0328\u0304 a\u0327\u0301x ﬁ ﬁ\u0301 ① ①\u0301"
_HANGUL = "\u1112\u1161\u11ab 가\u11a8 ㄱㅏ ㍿ ｱ ª ½ Å \u212b \U0001d400"
_CASES = "ά \u03b1\u0345 \u03b1\u0301\u0345 İ I\u0307 \u2160\u0307 ß"
_SPACES = ["\t", "  ", "   ", "\n", "\r\n", "\u00a0", "\u3000", "\u2581", "\u2581\u2581"]
_OTHERS = ["\x01", "\x7f", "\ufeff", "\u200b", "\U0010fff0", "\U0010fff1", "aaaa", "-----", "=="]
_NAMES = "<s> </s> <unk> <0x0A> <sep> <ctl> hello ⁇ the 123 , ."
HARD = [
    *" ".join([_EMOJI, _SCRIPTS, _MARKS, _HANGUL, _CASES, _NAMES]).split(" "),
    *_SPACES,
    *_OTHERS,
]


FULL = pytest.mark.skipif(
    not os.environ.get("CRAFT_TESTS_FULL"), reason="minutes; set CRAFT_TESTS_FULL"
)


def mixed(rng: random.Random, size: int) -> str:
    return "".join(
        rng.choice(HARD) if rng.random() < 0.6 else rng.choice(" abcdeéüñ0the") for _ in range(size)
    )


def any_text(rng: random.Random) -> str:
    blocks = [(1, 0x250), (0x300, 0x370), (0x1E00, 0x2200), (0x3000, 0xD7FF), (0x10000, 0x1FFFF)]
    return "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(20))


def code(size: int) -> str:
    library = Path(sysconfig.get_path("stdlib"))
    files = (library / name for name in sorted(p.name for p in library.glob("[a-h]*.py")))
    text = ""
    for file in files:
        text += file.read_text(encoding="utf-8")
        if len(text) > size:
            break
    return text[:size]


def documents() -> list[str]:
    """Returns about a million characters: lines, paragraphs, and hard texts."""
    rng = random.Random(0)
    text = code(600_000)
    found = text[:300_000].split("\n") + text[300_000:].split("\n\n")
    found += [mixed(rng, rng.choice([1, 2, 3, 5, 10, 40])) for _ in range(2500)]
    found += [any_text(rng) for _ in range(1000)]
    return [*found, *HARD, *map("".join, itertools.product(HARD, HARD)), "", " ", "  ", "\n"]


def train(**settings) -> bytes:
    rng = random.Random(1)
    written = io.BytesIO()
    lines = code(400_000)[200_000:].split("\n") + [mixed(rng, 20) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
        **{"vocab_size": 1000, "num_sub_iterations": 1, **settings},
    )
    return written.getvalue()


def convert(model: bytes, folder: Path) -> tokenizers.Tokenizer:
    """Converts a model, and reads what a `tokenizer.json` would keep."""
    (folder / "a.model").write_bytes(model)
    text = sentencepiece_models.convert(folder / "a.model").to_str()
    inner = tokenizers.Tokenizer.from_str(text)
    inner.encode_special_tokens = True
    return inner


def encode(inner: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in inner.encode_batch_fast(texts, add_special_tokens=False)]


def score(proto, ids: list[int]) -> float:
    """Returns the score of a path, without the unknown, in double precision."""
    return sum(proto.pieces[i].score for i in ids)


DOCUMENTS = documents()
IDENTITY = dict(normalization_rule_name="identity")
SPACES = dict(**IDENTITY, remove_extra_whitespaces=False)
SYMBOLS = dict(user_defined_symbols=["<sep>", "hello", "\n", "\n\n", "\t"])
BPE = {
    "nmt_nfkc": dict(),
    "like_llama": dict(**SPACES, byte_fallback=True, split_digits=True),
    "like_gemma": dict(
        **SPACES,
        byte_fallback=True,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[
            "<sep>",
            "\n",
            "\n\n",
            "\t",
            "\u2581\u2581",
            "\u2581\u2581\u2581\u2581",
        ],
    ),
    "symbols": SYMBOLS,
    "symbols_and_spaces": dict(**SYMBOLS, remove_extra_whitespaces=False),
    "control": dict(**IDENTITY, control_symbols=["<ctl>"]),
    "across_spaces": dict(split_by_whitespace=False),
    "suffix": dict(**IDENTITY, treat_whitespace_as_suffix=True),
    "characters": dict(model_type="char", vocab_size=400),
}
UNIGRAM = {
    "nmt_nfkc": dict(control_symbols=["<ctl>"]),
    "identity": IDENTITY,
    "bytes": dict(**SPACES, byte_fallback=True, user_defined_symbols=["<sep>", "hello"]),
    "symbols": dict(user_defined_symbols=["<sep>", "hello", "\n"]),
    "no_prefix": dict(add_dummy_prefix=False, remove_extra_whitespaces=False),
    "suffix": dict(treat_whitespace_as_suffix=True),
}


# One of each kind is enough for every day.
QUICK = [(BPE, "nmt_nfkc"), (BPE, "like_llama"), (BPE, "like_gemma"), (BPE, "symbols")]
QUICK += [(BPE, "across_spaces"), (UNIGRAM, "nmt_nfkc"), (UNIGRAM, "bytes")]


def each(models: dict[str, dict]) -> list:
    return [pytest.param(name, marks=() if (models, name) in QUICK else FULL) for name in models]


@pytest.mark.parametrize("name", each(BPE))
def test_bpe(name, tmp_path):
    model = train(**{"model_type": "bpe", **BPE[name]})
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = convert(model, tmp_path)
    assert ours.get_vocab_size() == theirs.get_piece_size()
    long = ["\n".join(DOCUMENTS)[start:][:65536] for start in (0, 660_000)]
    texts = DOCUMENTS + long
    expected = [theirs.encode(text) for text in texts]
    for text, ids, right in zip(texts, encode(ours, texts), expected, strict=True):
        assert ids == right, ascii(text[:200])
    some = range(0, len(texts), 3)
    assert [ours.decode(expected[i]) for i in some] == [theirs.decode(expected[i]) for i in some]


@pytest.mark.parametrize("name", each(UNIGRAM))
def test_unigram(name, tmp_path):
    model = train(**UNIGRAM[name])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = convert(model, tmp_path)
    proto = messages.ModelProto.FromString(model)
    long = ["\n".join(DOCUMENTS)[start:][:65536] for start in (0, 660_000)]
    texts = DOCUMENTS + long
    different = 0
    for text, ids in zip(texts, encode(ours, texts), strict=True):
        right = theirs.encode(text)
        if ids != right:
            # Rounding chose another path, one that is not better.
            different += 1
            assert score(proto, ids) == pytest.approx(score(proto, right), rel=1e-5), ascii(text)
            assert score(proto, ids) >= score(proto, right) - 1e-6 * len(text)
            assert ours.decode(right) == ours.decode(ids)
    assert different < len(texts) / 200
    # With the file at hand there is no difference, nor in a process that it is sent to.
    (tmp_path / "exact.model").write_bytes(model)
    exact = Tokenizer.load(tmp_path / "exact.model")
    expected = theirs.encode(texts)
    assert [ids.tolist() for ids in exact.encode_batch(texts)] == expected
    sent = pickle.loads(pickle.dumps(exact))
    assert [sent.encode(text).tolist() for text in texts[:500]] == expected[:500]
    for text in texts[::3]:
        right = theirs.encode(text)
        assert ours.decode(right) == theirs.decode(right)


@FULL
@pytest.mark.parametrize("name", ["nmt_nfkc", "nfkc_cf"])
def test_normalizing_every_character_and_sequence(name, tmp_path):
    model = train(model_type="bpe", normalization_rule_name=name, remove_extra_whitespaces=False)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = convert(model, tmp_path).normalizer
    rules = sentencepiece_models._decode_charsmap(
        messages.ModelProto.FromString(model).normalizer_spec.precompiled_charsmap
    )
    every = [chr(c) for c in (*range(1, 0xD800), *range(0xE000, 0x110000))]
    rng, sequences = random.Random(2), [key for key in rules if len(key) > 1]
    # Not the scripts of Unicode 16 whose vowel signs compose with themselves.
    sequences = [
        key for key in sequences if not set(key) & set("\U000113c2\U0001611e\U00016129\U00016d67")
    ]
    firsts = sorted({key[0] for key in sequences})
    marks = sorted({c for key in sequences for c in key[1:]})
    texts = [*every, *("ª" + c for c in every), *("A" + c + "b" for c in every), *sequences]
    texts += [
        "".join(
            rng.choice(firsts) + "".join(rng.choices(marks, k=rng.randrange(4))) for _ in "1234"
        )
        for _ in range(50_000)
    ]
    for text in texts:
        assert ours.normalize_str(text) == theirs.normalize(text), ascii(text)


def test_unknown_characters_and_bytes_that_are_no_text(tmp_path):
    model = train(model_type="bpe")
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=model), convert(model, tmp_path)
    ids = theirs.encode("a \u16a0\u16a1 b")
    assert encode(ours, ["a \u16a0\u16a1 b"]) == [ids]
    assert ours.decode(ids) == theirs.decode(ids) == "a  \u2047  b"
    model = train(model_type="bpe", byte_fallback=True)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=model), convert(model, tmp_path)
    piece = theirs.piece_to_id
    for bad in (["<0xC3>"], ["<0xE2>", "<0x82>"], ["<0xFF>", "a"], ["\u2581a", "<0x80>", "b"]):
        ids = [piece(p) for p in bad]
        assert ours.decode(ids) == theirs.decode(ids)
        assert "\ufffd" in ours.decode(ids)


def test_special_tokens_are_not_in_the_decoded_text(tmp_path):
    ours = convert(train(model_type="bpe", control_symbols=["<ctl>"]), tmp_path)
    ids = [ours.token_to_id(t) for t in ("<s>", "\u2581the", "<ctl>", "</s>")]
    assert ours.decode(ids) == "the"
    assert ours.decode(ids, skip_special_tokens=False) == "<s> the<ctl></s>"


def changed(model: bytes, change) -> bytes:
    proto = messages.ModelProto.FromString(model)
    change(proto)
    return proto.SerializeToString()


def make_unused(proto):
    proto.pieces[-1].type = 5


def make_equal(proto):
    long = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) == 2]
    long[1].score = long[0].score


def make_control(proto):
    next(piece for piece in proto.pieces if piece.piece == "e").type = 3


def make_word(proto):
    proto.trainer_spec.model_type = 3


def add_denormalizer(proto):
    proto.denormalizer_spec.precompiled_charsmap = b"\0"


def add_spaced(proto):
    proto.pieces.add(piece="a b", score=0, type=4)


def add_changed(proto):
    proto.pieces.add(piece="x①", score=0, type=4)


def add_double_space(proto):
    proto.pieces.add(piece="\u2581\u2581", score=-99999, type=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (make_unused, "is marked unused"),
        (make_equal, "have the same score"),
        (make_control, "the one character 'e'"),
        (make_word, "type word"),
        (add_denormalizer, "denormalization"),
        (add_spaced, "'a b' has a space"),
        (add_changed, "normalizing would change user-defined symbol 'x①'"),
        (add_double_space, "begins with two"),
    ],
)
def test_what_cannot_be_exact_is_refused(change, named, tmp_path, nmt_bpe):
    with pytest.raises(DataError, match=named) as error:
        convert(changed(nmt_bpe, change), tmp_path)
    assert "give a tokenizer.json" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def nmt_bpe() -> bytes:
    return train(model_type="bpe", vocab_size=500)


@pytest.mark.parametrize("content", [b"", b"no model", b"\0\1\2", None])
def test_a_file_that_is_no_model(content, tmp_path, nmt_bpe):
    (tmp_path / "a.model").write_bytes(nmt_bpe[:-100] if content is None else content)
    with pytest.raises(DataError, match=r"a\.model is not a readable SentencePiece model"):
        sentencepiece_models.convert(tmp_path / "a.model")


def test_without_the_package(tmp_path, monkeypatch, nmt_bpe):
    def fail(name):
        raise ImportError(f"No module named {name!r}")

    (tmp_path / "a.model").write_bytes(nmt_bpe)
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(DataError, match="pip install sentencepiece protobuf"):
        sentencepiece_models.convert(tmp_path / "a.model")
