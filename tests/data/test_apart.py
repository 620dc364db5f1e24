"""Held-out data is removed from the training split; splits whose loss weights are all 0."""

import json

import numpy as np
import pytest
from PIL import Image

from craft_jax import main as cli
from craft_jax.data import partition, pipeline
from craft_jax.data.settings import DataConfig
from craft_jax.errors import DataError, OutputError
from tests.conftest import micro, words

TEXTS = [words(60, seed) for seed in range(40)]


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def texts_of(parts, split):
    found = []
    for part in (p[split] for p in parts if split in p):
        tokens = part.cache.tokens
        found += [part.cache.tokenizer.decode(tokens.read(*s)) for s in part.spans.tolist()]
    return found


def divided(tmp_path, **values):
    config = DataConfig(**({"tokenizer": "byte"} | values))
    return partition.partition(pipeline.prepare(config, tmp_path / "outputs"), config)


def test_a_named_split_is_removed_from_training(tmp_path, caplog):
    path = lines(tmp_path / "a.jsonl", TEXTS)
    val = lines(tmp_path / "val.jsonl", [*TEXTS[3:6], "another"])
    test = lines(tmp_path / "test.jsonl", TEXTS[5:9])
    parts = divided(tmp_path, path=path, val_split=val, test_split=test)
    assert texts_of(parts, "train") == TEXTS[:3] + TEXTS[9:]
    assert sorted(texts_of(parts, "val")) == sorted([*TEXTS[3:5], "another"])
    assert sorted(texts_of(parts, "test")) == sorted(TEXTS[5:9])
    for part in parts[0].values():
        number = len(part.spans)
        assert part.num_bytes == part.num_tokens - number  # One end token each.
    assert "6 of 40 documents of the training split are also held out" in caplog.text


def test_sources_of_a_mixture_hold_out_for_each_other(tmp_path):
    many = lines(tmp_path / "many.jsonl", TEXTS)
    one = lines(tmp_path / "one.jsonl", TEXTS[7:8])  # Its end is held out.
    parts = divided(tmp_path, mixture=(f"{many}=1", f"{one}=1"))
    trains, held = (texts_of(parts[:1], split) for split in ("train", "val"))
    assert TEXTS[7] not in trains
    assert not set(trains) & set(held)
    (begins,), (ends,) = (texts_of(parts[1:], split) for split in ("train", "val"))
    assert begins + ends == TEXTS[7]


def test_bits_per_byte_count_unmasked_text(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"prompt": "a long question " * 9, "text": f"answer {n}"} for n in range(50)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (parts,) = divided(tmp_path, path=str(path), prompt_field="prompt")
    for part in parts.values():
        text = "".join(texts_of([{"x": part}], "x")).replace("a long question " * 9, "")
        assert part.num_bytes == len(text)


@pytest.mark.parametrize("roles", ["asistant", "assistant"])
def test_all_loss_weights_are_zero(tmp_path, workdir, capfd, roles):
    path = tmp_path / "chats.jsonl"
    chats = [
        {"messages": [{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant")]}
        for n in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    changes = {
        "data__messages_field": "messages",
        "data__learned_roles": roles,
        "model__vocab_size": 300,  # As in other tests, which compile the same program.
        "training__sample_every": 0,
    }
    code = cli.main([*micro(path, **changes), f"--workdir={workdir}"])
    said = capfd.readouterr().err
    if roles == "assistant":
        assert code == 0, said
        return
    assert (code, said.count("\n")) == (65, 1)
    assert "no message has a role in data.learned_roles=asistant" in said
    assert not (workdir / "models").exists()


def pictures(folder, classes, first=0):
    for n, name in enumerate(classes, start=first):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(3):
            pixels = np.random.default_rng([n, k]).integers(0, 256, (4, 4), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return str(folder)


def images(**values):
    config = DataConfig(source="images", image_channels=1, batch_size=3, **values)
    return pipeline.open_datasets(config, workdir=None, seed=0)


def test_classes_of_a_named_split_match_the_training_split(tmp_path):
    train = pictures(tmp_path / "train", ["cat", "dog"])
    val = pictures(tmp_path / "val", ["dog"], first=9)
    data = images(path=train, val_split=val)
    assert data.val.batch(0)["labels"].tolist() == [1, 1, 1]
    assert len(data.train.indices) == 6
    for folder in (pictures(tmp_path / "x", ["zebra"]), str(tmp_path / "train/cat")):
        with pytest.raises(DataError, match=r"^data.val_split=.*training images cat, dog"):
            images(path=train, val_split=folder)


def test_images_that_are_held_out_do_not_train(tmp_path, caplog):
    train = pictures(tmp_path / "train", ["cat", "dog"])
    val = pictures(tmp_path / "val", ["cat"])
    data = images(path=train, val_split=val)
    assert data.train.indices.tolist() == [3, 4, 5]
    assert len(data.val.indices) == 3
    assert "3 images that are also held out" in caplog.text


def test_a_place_where_no_folder_can_be(text_file, tmp_path):
    config = DataConfig(path=str(text_file), tokenizer="byte")
    with pytest.raises(OutputError, match="cannot write the token cache"):
        pipeline.prepare(config, tmp_path.__class__("/proc/nowhere"))


def test_the_field_that_names_a_path_is_named(text_file, tmp_path):
    for field, values in (
        ("data.val_split", {"path": str(text_file), "val_split": str(tmp_path / "nope")}),
        ("data.mixture", {"mixture": (f"{tmp_path / 'nope'}=1",)}),
    ):
        with pytest.raises(DataError, match=rf"^{field}=.*nope: no such file"):
            divided(tmp_path, **values)


@pytest.mark.parametrize("field", ["source", "dataset"])
def test_a_class_that_cannot_be_built(tmp_path, field):
    (tmp_path / "own.py").write_text(
        "from craft_jax.data.base import BaseDataset\n"
        "class Mine(BaseDataset):\n"
        "    def __init__(self, *_):\n"
        "        raise RuntimeError('no database')\n"
        "    def __len__(self): return 1\n"
        "    def __getitem__(self, index): return ''\n",
        encoding="utf-8",
    )
    config = DataConfig(**{field: f"{tmp_path / 'own.py'}:Mine", "tokenizer": "byte"})
    with pytest.raises(DataError, match=rf"data.{field}=.*RuntimeError: no database; correct it"):
        pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0)
