import json

import pytest

from craft_jax.data import splits, tokenizers
from craft_jax.data.cache.encoding import document_key
from craft_jax.data.sources import documents, files
from craft_jax.data.sources.files import open_files
from craft_jax.data.sources.formats import Format, TextSpan
from craft_jax.data.splits import Fractions
from craft_jax.data.tokenizers import vocabulary
from craft_jax.errors import DataError, OutputError
from tests.conftest import words

PLAIN, TENTH = Format(), Fractions(0.1)


def make(kind, path, folder, format=PLAIN, fractions=TENTH, **options):
    paths = path if isinstance(path, list) else [path]
    found = [open_files(str(p)) for p in paths]
    options = {"vocab_size": 300} | options
    return vocabulary.train(kind, found, format, fractions=fractions, folder=folder, **options)


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return path


def test_characters_are_those_of_all_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 100)
    text = "naïve 漢字 🙂\r\n" * 50 + "ß"
    (tmp_path / "a.txt").write_bytes(text.encode())
    made = make("char", tmp_path / "a.txt", tmp_path / "t")
    assert made.vocab_size == len(set(text))
    assert made.decode(made.encode(text)) == text
    assert made.end_id is None  # There is one document.
    (tmp_path / "b.txt").write_text("ö", encoding="utf-8")
    two = make("char", tmp_path / "*.txt", tmp_path / "t")
    assert two.vocab_size == len(set(text)) + 2
    assert two.token(two.end_id) == "<|endoftext|>"
    both = make("char", [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "t")
    assert both.digest == two.digest


def test_characters_of_prompts_and_templates(tmp_path):
    messages = [{"role": "user", "content": "xy"}, {"role": "assistant", "content": "z"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages, "text": "no"}), encoding="utf-8")
    format = Format(messages_field="messages", template="<|a|>{role}={content};")
    made = make("char", path, tmp_path / "t", format)
    assert made.unknown_characters("userassistant=;xyz") == []
    assert made.unknown_characters("nQ") == ["Q"]
    assert len(made.encode_markup("<|a|>user=")) == 6
    assert made.end_id is not None


def test_too_many_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHARACTER_LIMIT", 20)
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz", encoding="utf-8")
    with pytest.raises(DataError, match=r"26 different characters are too many.*use byte or bpe"):
        make("char", tmp_path, tmp_path / "t")


def test_bytes_need_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    made = make("byte", tmp_path / "a.txt", tmp_path / "t", special=("<a>", "<b>", "<a>"))
    assert made.vocab_size == 259
    assert made.encode_markup("<b>").tolist() == [258]
    assert not (tmp_path / "t").exists()


def test_a_file_of_the_users_own(tmp_path):
    own = tokenizers.train_bpe([words(500)], 280)
    (tmp_path / "tokenizer.json").write_text(own.json, encoding="utf-8")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    assert make(str(tmp_path), tmp_path / "a.txt", tmp_path / "t").digest == own.digest
    with pytest.raises(DataError, match="no such file"):
        make(str(tmp_path / "x.json"), tmp_path / "a.txt", tmp_path / "t")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_an_equal_request_reuses_the_tokenizer(tmp_path, kind, caplog):
    path, folder = tmp_path / "a.txt", tmp_path / "t"
    path.write_text(words(2000), encoding="utf-8")
    first = make(kind, path, folder)
    (file,) = folder.iterdir()
    stamp = file.stat().st_mtime_ns
    assert make(kind, path, folder).digest == first.digest
    assert file.stat().st_mtime_ns == stamp
    make(kind, path, folder, vocab_size=290)
    make(kind, path, folder, fractions=Fractions(0.2))
    assert len([*folder.iterdir()]) == (1 if kind == "char" else 3)
    assert make(kind, path, folder, special=("<x>",)).digest != first.digest
    for content in ("", "{", file.read_text()[:-50]):
        file.write_text(content, encoding="utf-8")
        assert make(kind, path, folder).digest == first.digest
        assert "training it again" in caplog.text
        caplog.clear()
    path.write_text(words(2000, seed=1), encoding="utf-8")
    assert make("bpe", path, folder).digest != first.digest


def test_bpe_has_the_requested_size_and_special_tokens(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000), encoding="utf-8")
    made = make("bpe", tmp_path, tmp_path / "t", special=("<|x|>",), vocab_size=290)
    assert made.vocab_size == 290
    assert len(made.encode_markup("<|x|>")) == 1
    assert len(made.encode("<|x|>")) > 1


SECRET = "qzqzqzqz " * 400


def merges(made) -> str:
    return " ".join(made.token(n) for n in range(made.vocab_size))


@pytest.mark.parametrize("test_fraction", [0.0, 0.1])
def test_bpe_does_not_learn_from_documents_that_are_held_out(tmp_path, test_fraction):
    fractions = Fractions(0.3 - test_fraction, test_fraction)
    texts = [words(30, seed=n) + str(n) for n in range(200)]
    names = [splits.name_of(document_key([TextSpan(SECRET + text)]), fractions) for text in texts]
    assert {"train", "val"} <= set(names)
    lines = [SECRET + t if name != "train" else t for t, name in zip(texts, names, strict=True)]
    # Those that have the secret text in them are held out by what they then say.
    lines = [
        line for line, name in zip(lines, names, strict=True)
        if name != "train" or splits.name_of(document_key([TextSpan(line)]), fractions) == "train"
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", lines)
    assert "qz" not in merges(make("bpe", path, tmp_path / "t", fractions=fractions))
    assert "qz" in merges(make("bpe", path, tmp_path / "t", fractions=Fractions()))


def test_bpe_does_not_learn_from_the_end_of_few_documents(tmp_path):
    path = tmp_path / "a.txt"
    text = words(4000)
    path.write_text(text + SECRET, encoding="utf-8")
    held_out = Fractions(len(SECRET) / len(text + SECRET) + 0.01)
    assert "qz" not in merges(make("bpe", path, tmp_path / "t", fractions=held_out))
    assert "qz" in merges(make("bpe", path, tmp_path / "t", fractions=Fractions()))
    texts = [words(30, seed=n) for n in range(100)] + [SECRET]
    lines = write(tmp_path / "a.jsonl", texts)
    # Where the end is, is told by the bytes of the file, with all that is not text.
    size = lines.stat().st_size
    tail = Fractions((size - len("".join(texts[:-1]))) / size + 0.01)
    assert "qz" not in merges(make("bpe", lines, tmp_path / "t", fractions=tail, hold_out="tail"))


def test_few_is_fewer_than_ten(tmp_path):
    for count, is_few in ((9, True), (10, False)):
        path = write(tmp_path / "a.jsonl", [f"text {n}" for n in range(count)])
        with path.open("a", encoding="utf-8") as file:
            file.write('\n{"text": ""}\n' * 5)  # No text is no document.
        assert vocabulary._are_few(open_files(str(path)), Format()) == is_few


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("hold_out", ["auto", "documents", "tail"])
def test_bpe_of_a_tiny_text(tmp_path, count, hold_out):
    for seed in range(6):
        path = write(tmp_path / "a.jsonl", [f"{seed} {n}" for n in range(count)])
        made = make("bpe", path, tmp_path / "t", fractions=Fractions(0.6, 0.3), hold_out=hold_out)
        assert made.decode(made.encode("a b")) == "a b"
    path.write_text(json.dumps({"text": "x"}), encoding="utf-8")
    assert make("bpe", path, tmp_path / "t", hold_out=hold_out).vocab_size == 257


def test_a_sample_is_spread_over_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 5000)
    monkeypatch.setattr(documents, "PIECE_CHARS", 200)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n:06} of many words\n" for n in range(5000)), encoding="utf-8")
    found = [*vocabulary.sample(open_files(str(path)), Format(), Fractions(), "tail", 10_000)]
    assert 8_000 < sum(map(len, found)) < 12_000
    starts = [int(text.split("\n")[1][:6]) for text in found]
    assert starts == sorted(starts)
    assert starts[0] < 300 and starts[-1] > 4700
    whole = vocabulary.sample(open_files(str(path)), Format(), Fractions(), "tail", 10**9)
    assert "".join(whole) == path.read_text(encoding="utf-8")


def test_each_source_of_a_mixture_gives_its_part_of_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    (tmp_path / "a.txt").write_text("qzqz " * 40_000, encoding="utf-8")
    (tmp_path / "b.txt").write_text(words(2000), encoding="utf-8")
    both = [tmp_path / "a.txt", tmp_path / "b.txt"]
    made = make("bpe", both, tmp_path / "t", max_chars=20_000)
    assert "qz" in merges(made) and "cat" in merges(made)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_no_text(tmp_path, kind):
    path = write(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"^data.path=.*the text is empty"):
        make(kind, path, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "t").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot write the tokenizer"):
        make("char", tmp_path / "a.txt", tmp_path / "t")
