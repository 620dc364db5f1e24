"""Tokenizers of other programs give the ids that those programs give."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from craft_jax.data.tokenizers import files as tokenizer_files
from craft_jax.errors import DataError
from tests.data.tokenizers.test_sentencepiece_models import any_text, code, encode, mixed, train

sentencepiece = pytest.importorskip("sentencepiece")


def documents() -> list[str]:
    """Returns about a million characters without names of special tokens."""
    rng = random.Random(0)
    text = code(700_000)
    found = text[:350_000].split("\n") + text[350_000:].split("\n\n")
    found += [mixed(rng, rng.choice([1, 3, 10, 40])) for _ in range(2000)]
    found += [any_text(rng) for _ in range(500)]
    special = ("<s>", "</s>", "<unk>", "<ctl>", "<sep>", "[SEP]", "<pad>", "<mask>", "<|")
    return [d for d in found if not any(name in d for name in special)]


DOCUMENTS = documents()
LONG = "\n".join(DOCUMENTS)[-65536:]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def write(folder: Path, **files) -> Path:
    """Writes `name_json=dict` and `name_model=bytes` as files of a folder."""
    for name, content in files.items():
        file = folder / ".".join(name.rsplit("_", 1))
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def opened(path: Path) -> Tokenizer:
    inner = Tokenizer.from_str(tokenizer_files.open_file(path).to_str())
    inner.encode_special_tokens = True
    return inner


def assert_same(ours: Tokenizer, theirs, texts: list[str]) -> None:
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, ids, right in zip(texts, encode(ours, texts), expected, strict=True):
        assert ids == right, ascii(text[:200])
    for ids in expected[::5]:
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator(
        [code(200_000)],
        trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("byte_level")
    inner.model.save(str(folder))
    inner.save(str(folder / "tokenizer.json"))
    return folder


def copy(source: Path, folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.torch
def test_byte_level_files(prefix, byte_level, tmp_path, transformers):
    folder = copy(byte_level, tmp_path, "vocab.json", "merges.txt")
    write(
        folder,
        tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": prefix},
    )
    ours = opened(folder)
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(folder), [*DOCUMENTS, LONG])
    assert ours.decode([ours.token_to_id("<|endoftext|>")]) == ""


def test_added_tokens_of_byte_level_files(byte_level, tmp_path):
    folder = copy(byte_level, tmp_path, "vocab.json", "merges.txt")
    size = len(json.loads((folder / "vocab.json").read_text()))
    write(
        folder,
        added_tokens_json={"<pad>": size, "<tool>": size + 1},
        special_tokens_map_json={"pad_token": {"content": "<pad>"}},
    )
    ours = opened(folder)
    assert (ours.token_to_id("<pad>"), ours.token_to_id("<tool>")) == (size, size + 1)
    assert encode(ours, ["<tool>"]) == [[size + 1]]
    assert size not in encode(ours, ["<pad>"])[0]
    assert ours.decode([size, size + 1]) == "<tool>"
    write(folder, added_tokens_json={"<pad>": size + 3})
    with pytest.raises(DataError, match=rf"'<pad>' has id {size + 3}, and would get {size}"):
        tokenizer_files.open_file(folder)


def test_a_tokenizer_json_comes_first(byte_level, tmp_path):
    whole = (byte_level / "tokenizer.json").read_text()
    expected = Tokenizer.from_str(whole).to_str()
    assert tokenizer_files.open_file(byte_level).to_str() == expected
    assert tokenizer_files.open_file(byte_level / "tokenizer.json").to_str() == expected
    folder = copy(byte_level, tmp_path, "tokenizer.json")
    write(folder, tokenizer_model=b"no model", tokenizer_config_json="no json")
    assert tokenizer_files.open_file(folder).to_str() == expected


@pytest.mark.torch
def test_word_piece_files(tmp_path, transformers):
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator(
        [code(200_000)],
        trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False),
    )
    inner.model.save(str(tmp_path))
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "BertTokenizer"})
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert_same(opened(tmp_path), theirs, [*DOCUMENTS, LONG])


@pytest.fixture(scope="module")
def like_llama() -> bytes:
    return train(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
    )


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "my.model"])
def test_sentencepiece_files(name, like_llama, tmp_path):
    (tmp_path / name).write_bytes(like_llama)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=like_llama)
    for ours in (opened(tmp_path), opened(tmp_path / name)):
        assert encode(ours, [LONG]) == [theirs.encode(LONG)]


@pytest.mark.torch
def test_a_folder_of_llama(like_llama, tmp_path, transformers):
    size = sentencepiece.SentencePieceProcessor(model_proto=like_llama).get_piece_size()
    write(
        tmp_path,
        tokenizer_model=like_llama,
        tokenizer_config_json={
            "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True},
                str(size): {"content": "<pad>", "special": True},
            },
        },
    )
    ours = opened(tmp_path)
    assert ours.token_to_id("<pad>") == size
    # Recent transformers adds no space before a text that begins with one; sentencepiece does.
    texts = [text for text in DOCUMENTS if not text.startswith((" ", "\u2581"))]
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), texts)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": {"tokenizer_class": "XLMRobertaTokenizer"}},
        {"tokenizer_config_json": {"tokenizer_class": "CamembertTokenizerFast"}},
        {"tokenizer_config_json": {"tokenizer_class": "T5Tokenizer"}},
        {"config_json": {"model_type": "t5"}},
        {"tokenizer_config_json": {"tokenizer_class": "OwnTokenizer", "auto_map": {"a": "b.C"}}},
    ],
)
def test_classes_with_ids_of_their_own(files, like_llama, tmp_path):
    write(tmp_path, tokenizer_model=like_llama, **files)
    with pytest.raises(
        DataError, match=r"Tokenizer.* are not those of tokenizer.model alone; save"
    ):
        tokenizer_files.open_file(tmp_path)


def test_a_model_of_fairseq(like_llama, tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(like_llama)
    with pytest.raises(DataError, match="the ids of XLMRobertaTokenizer are not"):
        tokenizer_files.open_file(tmp_path)


def test_files_that_cannot_be_read(byte_level, like_llama, tmp_path):
    def refused(path: Path, named: str) -> None:
        with pytest.raises(DataError, match=named) as error:
            tokenizer_files.open_file(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "no such file; use char, byte, bpe, or a tokenizer.json")
    refused(tmp_path, "no such file as tokenizer.json, tokenizer.model")
    write(tmp_path, a_model=like_llama, b_model=like_llama)
    refused(tmp_path, "has a.model, b.model; give the path of one of them")
    write(tmp_path, tokenizer_model=b"no model")
    refused(tmp_path, "is not a readable SentencePiece model")
    write(tmp_path, tokenizer_model=like_llama, tokenizer_config_json="{")
    refused(tmp_path, r"tokenizer_config\.json is not readable")
    write(tmp_path, tokenizer_config_json={}, added_tokens_json={"<a>": "many"})
    refused(tmp_path, "list of added tokens is not readable")
    write(tmp_path, tokenizer_json="{}")
    refused(tmp_path, "is not a readable tokenizer.json")
    other = tmp_path / "other"
    other.mkdir()
    write(other, vocab_json={"a": 0}, merges_txt="#version: 0.2\n")
    refused(other, "is not of bytes: it lacks 255 of 256")
    write(other, merges_txt="a b c d\n")
    refused(other, "with merges.txt is not readable")
    copy(byte_level, other, "vocab.json", "merges.txt")
    write(other, tokenizer_config_json={"tokenizer_class": "CLIPTokenizer"})
    refused(other, "the ids of CLIPTokenizer are not those of vocab.json and merges.txt alone")
    words = tmp_path / "words"
    words.mkdir()
    write(words, vocab_txt="a\nb\n")
    refused(words, r"vocab\.txt has no \[UNK\]")
