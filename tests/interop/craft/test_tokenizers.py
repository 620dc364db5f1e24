"""Character vocabularies of the original Craft: the same ids and texts, there and back."""

import json
import pickle
import random

import pytest
import tokenizers as hugging_face

from craft_jax.data import tokenizers
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from interop.craft.tokenizers import (
    of_container,
    of_vocabulary,
    read_file,
    read_folder,
    sentencepiece_note,
    special_of,
    vocabulary_of,
)
from interop.errors import CorruptFileError, UnsafePickleError
from interop.files.pickles import Stub

ALPHABET = " \n\r\t\0abcXYZ<>/|?'\u00e9\u6f22\u5b57\u3042\U0001f642\U0001f469\u200d\U0001f52c\u0301"
OUTSIDE = "\u2603\U0001f680Q"
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PLAIN = {character: i for i, character in enumerate(sorted(ALPHABET))}
# As Craft's own training of a tokenizer makes them: special tokens sorted among the characters.
FULL = {token: i for i, token in enumerate(sorted({*ALPHABET, *SPECIAL}))}
SAID = {"pad_token": "<pad>", "unk_token": "<unk>", "pad_id": -1, "unk_id": 0}


def with_holes(vocabulary, seed):
    """Returns the entries in another order, with other ids, and ids between that are nobody's."""
    order = random.Random(seed)
    tokens = order.sample(list(vocabulary), len(vocabulary))
    return dict(zip(tokens, order.sample(range(5 * len(tokens)), len(tokens)), strict=True))


def craft_ids(vocabulary, text):
    """What Craft makes of a text: character by character, and the unknown are one token."""
    return [vocabulary.get(character, vocabulary.get("<unk>")) for character in text]


def craft_text(vocabulary, ids):
    names = {number: token for token, number in vocabulary.items()}
    return "".join(names[number] for number in ids)


def texts(alphabet, count=30):
    source = random.Random(1)
    yield from ("", "a\n\n", "\0\r\n")
    for _ in range(count):
        yield "".join(source.choices(alphabet, k=source.randrange(200)))


def reloaded(tokenizer, folder):
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    return Tokenizer.load(folder)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def craft_files(vocabulary, **special):
    """The files that Craft saves; it names special tokens that are not in the vocabulary too."""
    described = {"model_type": "char", "vocab_size": len(vocabulary), "special_tokens": special}
    return {"vocab": vocabulary, "tokenizer_config": described}


def ids_of(tokenizer):
    assert tokenizer is not None
    return vocabulary_of(tokenizer)


@pytest.mark.parametrize("vocabulary", [FULL, with_holes(FULL, 0), with_holes(FULL, 7)])
def test_ids_and_texts_are_those_of_craft(vocabulary, tmp_path):
    made = of_vocabulary(vocabulary)
    hidden = {vocabulary[token] for token in SPECIAL}
    for tokenizer in (made, reloaded(made, tmp_path)):
        assert tokenizer.vocab_size == max(vocabulary.values()) + 1
        assert tokenizer.end_id == vocabulary["<eos>"]
        assert tokenizer.unknown_characters(OUTSIDE) == []
        for text in (*texts(ALPHABET + OUTSIDE), "<eos>a<unk>"):
            ids = tokenizer.encode(text).tolist()
            assert ids == craft_ids(vocabulary, text)
            assert tokenizer.decode(ids, show_special=True) == craft_text(vocabulary, ids)
        pieces = ["a\u2603", "", "b<pad>"]
        encoded = [ids.tolist() for ids in tokenizer.encode_batch(pieces)]
        assert encoded == [craft_ids(vocabulary, p) for p in pieces]
        ids = random.Random(2).choices(list(vocabulary.values()), k=300)
        assert tokenizer.decode(ids, show_special=True) == craft_text(vocabulary, ids)
        text = craft_text(vocabulary, [number for number in ids if number not in hidden])
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(stream.push(number) for number in ids) + stream.finish() == text


@pytest.mark.parametrize("vocabulary", [PLAIN, with_holes(PLAIN, 3)])
def test_without_a_token_for_them_unknown_characters_are_an_error(vocabulary):
    tokenizer = of_vocabulary(vocabulary, SAID)
    assert tokenizer.end_id is None
    for text in texts(ALPHABET):
        ids = tokenizer.encode(text).tolist()
        assert ids == craft_ids(vocabulary, text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.unknown_characters("a" + OUTSIDE) == sorted(OUTSIDE)
    with pytest.raises(UsageError, match="does not know"):
        tokenizer.encode(OUTSIDE)


def test_special_tokens_of_other_names():
    vocabulary = {"[EOS]": 0, "a": 1, "<UNK>": 2, "PAD": 3}
    named = {"unk": "<UNK>", "eos_token": "[EOS]", "pad_token": "PAD", "bos_token": None}
    tokenizer = of_vocabulary(vocabulary, named)
    assert tokenizer.end_id == 0
    assert tokenizer.encode("a!").tolist() == [1, 2]
    assert tokenizer.decode([3, 1, 0]) == "a"
    assert special_of(tokenizer) == {
        **{"pad_token": "PAD", "unk_token": "<UNK>", "eos_token": "[EOS]"},
        **{"pad_id": 3, "unk_id": 2, "eos_id": 0},
    }


def test_a_single_character_for_unknown_ones_stays_text():
    tokenizer = of_vocabulary({"a": 0, "?": 1}, {"unk_token": "?"})
    assert tokenizer.encode("a?b").tolist() == [0, 1, 1]
    assert tokenizer.decode([0, 1]) == "a?"
    assert special_of(tokenizer) == {"unk_token": "?", "unk_id": 1}


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ({}, "is empty"),
        ({"a": 0, "b": 1.0}, "'b' the id 1.0"),
        ({"a": True}, "'a' the id True"),
        ({"a": "0"}, "'a' the id '0'"),
        ({"a": -1}, "'a' the id -1"),
        ({"a": 2**31}, "'a' the id 2147483648"),
        ({"a": 0, "b": 0}, "'a' and 'b' the same id 0"),
        ({"a": 0, "the": 1, "": 2}, r"2 entries .*\(<bos>, <eos>, .*'the', ''; it is no vocabu"),
        ({0: 0}, "has 0, which is no text"),
        ({"\ud800": 0}, "no text"),
        ([("a", 0)], "list, not a dict"),
    ],
)
def test_invalid_character_vocabularies(vocabulary, said):
    with pytest.raises(CorruptFileError, match=said):
        of_vocabulary(vocabulary)


@pytest.mark.parametrize("special", [["<unk>"], {"unk_token": 3}])
def test_special_tokens_that_are_none(special):
    with pytest.raises(CorruptFileError, match="special token"):
        of_vocabulary(PLAIN, special)


# Folders.


def test_a_folder_as_craft_saves_it(tmp_path):
    folder = write(tmp_path / "artifact", **craft_files(FULL, **SAID))
    tokenizer = read_folder(folder)
    assert ids_of(tokenizer) == FULL
    assert tokenizer.encode("\u2603").tolist() == [FULL["<unk>"]]
    bare = write(tmp_path / "bare", vocab=PLAIN, tokenizer_config={"model_type": "char_level"})
    assert ids_of(read_folder(bare)) == PLAIN
    assert read_folder(tmp_path) is None
    assert sentencepiece_note(folder) is None


def test_the_folder_of_a_tokenizer_is_below_or_beside(tmp_path, monkeypatch):
    write(tmp_path / "below/tokenizer", **craft_files(PLAIN))
    assert ids_of(read_folder(tmp_path / "below")) == PLAIN
    write(tmp_path / "run/tokenizer", **craft_files(FULL))
    checkpoints = write(tmp_path / "run/checkpoints")
    assert ids_of(read_folder(checkpoints)) == FULL
    monkeypatch.chdir(checkpoints)
    assert ids_of(read_folder(checkpoints.__class__("."))) == FULL


def test_older_files_with_both_maps(tmp_path):
    maps = {"char_to_idx": PLAIN, "idx_to_char": {str(i): c for c, i in PLAIN.items()}}
    assert ids_of(read_folder(write(tmp_path / "a", vocab=maps))) == PLAIN
    assert ids_of(read_folder(write(tmp_path / "b", tokenizer_config=maps))) == PLAIN
    assert ids_of(read_file(tmp_path / "a/vocab.json")) == PLAIN
    with pytest.raises(CorruptFileError, match=r"vocab\.json: its char_to_idx and idx_to_char"):
        read_folder(write(tmp_path / "a", vocab=maps | {"char_to_idx": {"a": 0}}))


@pytest.mark.parametrize("protocol", range(6))
def test_the_legacy_pickle(tmp_path, protocol):
    maps = {"char_to_idx": FULL, "idx_to_char": {i: c for c, i in FULL.items()}}
    described = {"model_type": "char", "special_tokens": {"unk": "<unk>"}}
    file = tmp_path / "char_tokenizer.pkl"
    file.write_bytes(pickle.dumps({"config": described, **maps}, protocol))
    assert ids_of(read_folder(tmp_path)) == FULL
    assert ids_of(read_file(file)) == FULL


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_pickles_are_not_run(tmp_path):
    file = tmp_path / "char_tokenizer.pkl"
    file.write_bytes(pickle.dumps({"char_to_idx": PLAIN, "config": Evil()}))
    with pytest.raises(UnsafePickleError, match=r"builtins\.eval"):
        read_folder(tmp_path)
    file.write_bytes(pickle.dumps([Evil(), PLAIN])[:-20])
    with pytest.raises(UnsafePickleError, match=r"builtins\.eval"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(PLAIN)[:-9]])
def test_damaged_pickles(tmp_path, content):
    (tmp_path / "char_tokenizer.pkl").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"char_tokenizer\.pkl"):
        read_folder(tmp_path)


def test_a_file_of_data_has_its_vocabulary(tmp_path):
    file = tmp_path / "got_processed.pkl"
    maps = {"char_to_idx": PLAIN, "idx_to_char": {i: c for c, i in PLAIN.items()}}
    file.write_bytes(pickle.dumps({"text": ALPHABET, "vocab_size": len(PLAIN), **maps}))
    assert ids_of(read_file(file)) == PLAIN
    file.write_bytes(pickle.dumps([1, 2]))
    assert read_file(file) is None
    named = write(tmp_path, vocab={"a": 0, "<U>": 1}, tokenizer_config={"special_tokens": {}})
    with pytest.raises(CorruptFileError, match="'<U>'"):
        read_file(named / "vocab.json")
    write(tmp_path, tokenizer_config={"special_tokens": {"unk_token": "<U>"}})
    assert read_file(named / "vocab.json").encode("ab").tolist() == [0, 1]


def test_other_tokenizers_are_not_these(tmp_path):
    gpt2 = write(tmp_path / "gpt2", vocab={"a": 0, "b": 1, "ab": 2}, tokenizer_config={})
    (gpt2 / "merges.txt").write_text("#version: 0.2\na b\n")
    other = write(tmp_path / "other", vocab={"a": 0}, tokenizer_config={"tokenizer_class": "X"})
    own = write(tmp_path / "own", **craft_files(PLAIN))
    (own / "tokenizer.json").write_text(tokenizers.bytes_().json, encoding="utf-8")
    write(own / "tokenizer", **craft_files(PLAIN))
    for folder in (gpt2, other, own, tmp_path / "nowhere"):
        assert read_folder(folder) is None
        assert sentencepiece_note(folder) is None


@pytest.mark.parametrize("name", ["spm.model", "tokenizer_metadata.json"])
def test_sentencepiece_is_named(tmp_path, name):
    (write(tmp_path / "run/tokenizer") / name).write_text("{}")
    assert read_folder(tmp_path / "run") is None
    note = sentencepiece_note(tmp_path / "run")
    assert name in note and "SentencePiece" in note and "\n" not in note


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (craft_files({"a": 0, "b": 0}), r"vocab\.json: .*same id"),
        (craft_files({}), r"vocab\.json: .*empty"),
        (craft_files(PLAIN) | {"tokenizer_config": []}, r"tokenizer_config\.json holds list"),
    ],
)
def test_errors_name_the_file(tmp_path, files, said):
    with pytest.raises(CorruptFileError, match=said):
        read_folder(write(tmp_path, **files))


# Checkpoints.

MAPS = {"char_to_idx": PLAIN, "idx_to_char": {i: c for c, i in PLAIN.items()}}


@pytest.mark.parametrize(
    "container",
    [
        {"model_state_dict": {}, "args": {"lr": 1}, **MAPS},
        {"char_to_idx": PLAIN, "config": {"model": {}}},
        {"char_to_idx": PLAIN, "idx_to_char": {}},
        {"char_to_idx": {}, "idx_to_char": MAPS["idx_to_char"]},
        {"idx_to_char": {str(i): c for i, c in MAPS["idx_to_char"].items()}},
        {"tokenizer_data": MAPS},
        {"char_to_idx": {}, "vocab": {**MAPS, "vocab_size": 9}},
        {"tokenizer": Stub("src.data.CharTokenizer", args=(), state=MAPS)},
    ],
)
def test_a_checkpoint_has_its_vocabulary(container):
    assert ids_of(of_container(container)) == PLAIN


@pytest.mark.parametrize(
    "container",
    [
        {},
        {"char_to_idx": {}, "idx_to_char": {}},
        {"tokenizer_config": {"model_type": "char", "vocab_size": 5}, "vocab": None},
        {"tokenizer": "gpt2"},
    ],
)
def test_a_checkpoint_without_one(container):
    assert of_container(container) is None


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        ({"char_to_idx": {"a": 0}, "idx_to_char": {0: "b"}}, "'a' is 0 in one and 'nothing' in"),
        ({"char_to_idx": {"a": 0}, "idx_to_char": {1: "a"}}, "'a' is 0 in one and 1 in the other"),
        ({"char_to_idx": {"a": 0}, "idx_to_char": {0: "a", 1: "b"}}, "contradict"),
        ({"char_to_idx": ["a"], "idx_to_char": {0: "a"}}, "char_to_idx is list"),
        ({"char_to_idx": ["a"]}, "vocabulary is list"),
        ({"idx_to_char": ["a"]}, "idx_to_char is list"),
        ({"idx_to_char": {0: "a", 1: "a"}}, "idx_to_char has 'a', twice"),
        ({"idx_to_char": {0: 1}}, "idx_to_char has 1, which is no text"),
        ({"idx_to_char": {"x": "a"}}, "'a' the id 'x'"),
    ],
)
def test_maps_that_contradict_each_other(maps, said):
    with pytest.raises(CorruptFileError, match=said):
        of_container(maps)


# The other direction.


@pytest.mark.parametrize("vocabulary", [PLAIN, FULL, with_holes(FULL, 5), {"a": 3}])
def test_there_and_back(vocabulary, tmp_path):
    tokenizer = of_vocabulary(vocabulary)
    assert vocabulary_of(tokenizer) == vocabulary
    assert list(vocabulary_of(tokenizer).values()) == sorted(vocabulary.values())
    special = special_of(tokenizer)
    names = {"pad": "<pad>", "unk": "<unk>", "bos": "<bos>", "eos": "<eos>"}
    present = {role: name for role, name in names.items() if name in vocabulary}
    assert special == {f"{role}_token": name for role, name in present.items()} | {
        f"{role}_id": vocabulary[name] for role, name in present.items()
    }
    again = read_folder(write(tmp_path / "out", **craft_files(vocabulary_of(tokenizer), **special)))
    assert again.digest == tokenizer.digest
    assert of_container({"char_to_idx": vocabulary_of(tokenizer)}).digest == tokenizer.digest


def test_a_character_tokenizer_of_craft_jax_becomes_a_vocabulary():
    tokenizer = tokenizers.characters(ALPHABET, end_token=True)
    end = {"<|endoftext|>": len(PLAIN)}
    assert vocabulary_of(tokenizer) == PLAIN | end
    special = special_of(tokenizer)
    assert special == {"eos_token": "<|endoftext|>", "eos_id": len(PLAIN)}
    again = of_vocabulary(vocabulary_of(tokenizer), special)
    assert (again.end_id, again.vocab_size) == (tokenizer.end_id, tokenizer.vocab_size)
    assert again.encode(ALPHABET).tolist() == tokenizer.encode(ALPHABET).tolist()


def test_tokenizers_that_are_not_by_characters_have_no_vocabulary_of_them():
    words = hugging_face.models.WordLevel({"some": 0, "words": 1}, unk_token="some")
    for other in (
        tokenizers.bytes_(),
        tokenizers.train_bpe([ALPHABET * 9], 280),
        Tokenizer(hugging_face.Tokenizer(words)),
    ):
        assert vocabulary_of(other) is None
        assert special_of(other) is None
