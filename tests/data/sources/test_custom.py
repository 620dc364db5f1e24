import itertools

import numpy as np
import pytest

from craft_jax.data import pipeline
from craft_jax.data.cache import encoding
from craft_jax.data.settings import DataConfig
from craft_jax.data.sources import custom
from craft_jax.errors import ConfigError, DataError

OWN = """
from craft_jax.data.base import BaseDataset

class Texts(BaseDataset):
    def __init__(self, config):
        self.count = 200

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return f"text {index} naïve " * (index % 7 + 1)

class Pairs(Texts):
    def __getitem__(self, index):
        return {"question": f"What is {index}? ", "answer": f"Number {index}.", "id": index}

class Chats(Texts):
    def __getitem__(self, index):
        said = [("user", f"What is {index}?"), ("assistant", f"Number {index}.")]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

class Fails(Texts):
    def __getitem__(self, index):
        if index == 150:
            raise KeyError("no such\\nrecord")
        return "text"

class NoText(Texts):
    def __getitem__(self, index):
        return 7

class NoField(Texts):
    def __getitem__(self, index):
        return {"body": "x"}

class Empty(Texts):
    def __len__(self):
        return 0

class NeedsMore(Texts):
    def __init__(self, config, more): ...

class Neither: ...
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


def opened(source, tmp_path, **changes):
    values = {"source": source, "tokenizer": "byte", "seq_len": 16, "batch_size": 4} | changes
    config = DataConfig(**values)
    return pipeline.prepare(config, tmp_path / "outputs")[0].caches["train"], config


def documents_of(tokens) -> list[np.ndarray]:
    bounds = [*tokens.documents["start"].tolist(), len(tokens.tokens)]
    pairs = itertools.pairwise(bounds)
    return [np.arange(start, stop) for start, stop in pairs]


def test_texts(own, tmp_path):
    tokens, config = opened(own("Texts"), tmp_path)
    texts = [tokens.tokenizer.decode(tokens.tokens.take(d)) for d in documents_of(tokens)]
    assert texts == [f"text {n} naïve " * (n % 7 + 1) for n in range(200)]
    assert tokens.loss_mask is None
    assert tokens.manifest["source"]["name"] == "Texts"
    assert tokens.manifest["source"]["origin"] == f"data.source={own('Texts')}"
    data = pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0)
    assert data.train.name == "Texts"
    assert data.train.num_bytes + data.val.num_bytes == sum(len(t.encode()) for t in texts)
    assert data.train.batch(0)["tokens"].shape == (4, 16)


def test_records(own, tmp_path):
    tokens, _ = opened(own("Pairs"), tmp_path, prompt_field="question", text_field="answer")
    decode = tokens.tokenizer.decode
    for n, index in enumerate(documents_of(tokens)):
        ids, mask = tokens.tokens.take(index), tokens.loss_mask.take(index)
        assert decode(ids) == f"What is {n}? Number {n}."
        assert decode(ids[mask > 0]) == f"Number {n}."


def test_chats(own, tmp_path):
    tokens, _ = opened(own("Chats"), tmp_path, messages_field="messages", tokenizer="char")
    decode = tokens.tokenizer.decode
    for n, index in enumerate(documents_of(tokens)):
        ids, mask = tokens.tokens.take(index), tokens.loss_mask.take(index)
        assert decode(ids) == f"user\nWhat is {n}?\nassistant\nNumber {n}.\n"
        assert decode(ids[mask > 0]) == f"Number {n}.\n"


def test_parts_and_processes_give_the_same(own, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda _: {0, 1})
    whole, _ = opened(own("Texts"), tmp_path / "whole")
    monkeypatch.setattr(custom, "PART_BYTES", 1000)
    source = custom.OwnSource(own("Texts"), DataConfig(source=own("Texts")))
    assert len(source.parts()) > 5
    assert [n for part in source.parts() for n in part.numbers] == list(range(200))
    monkeypatch.setattr(encoding, "_IN_ONE_PROCESS", 0)
    parts, _ = opened(own("Texts"), tmp_path / "parts")
    assert parts.digest == whole.digest
    for name in ("tokens-00000.bin", "documents.bin"):
        assert (parts.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_digest_follows_the_examples(own, tmp_path):
    digests = {
        name: custom.OwnSource(own(name), DataConfig(source=own(name))).digest()
        for name in ("Texts", "Pairs", "Chats")
    }
    assert len(set(digests.values())) == 3
    other = tmp_path / "other.py"
    other.write_text(OWN.replace("naïve", "naive"), encoding="utf-8")
    again = custom.OwnSource(f"{other}:Texts", DataConfig(source=f"{other}:Texts"))
    assert again.digest() != digests["Texts"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Fails", r": example 150 failed with KeyError: "),
        ("NoText", r": example 0 is a int; return a text, or a dict with one"),
        ("NoField", r": example 0 has no text in the field 'text' \(it has: body\)"),
        ("Empty", r": the text is empty"),
    ],
)
def test_examples_that_cannot_be_read(own, tmp_path, name, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(own(name), tmp_path)
    assert str(caught.value).startswith(f"data.source={own(name)}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NeedsMore", r"is built as Class\(config\)"),
        ("Neither", "no class Neither there that derives from"),
        ("Missing", "no class Missing"),
    ],
)
def test_classes_that_cannot_be_used(own, tmp_path, name, message):
    with pytest.raises(ConfigError, match=rf"^config error: data.source=.*{message}"):
        opened(own(name), tmp_path)
