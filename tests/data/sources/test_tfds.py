"""TFDS datasets: built without TensorFlow, read by name, and never misread when damaged."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from craft_jax.data.sources import tfds as tfds_source
from craft_jax.data.sources.tfds import TfdsSource, feature_kinds, open_builder
from craft_jax.errors import DataError, OutputError
from scripts import tfds_builder

tfds = pytest.importorskip("tensorflow_datasets")

ROOT = Path(__file__).parents[3]
TEXTS = [f"Text {i}: äöü 🦊\n" + "words and more words " * (i % 7 * 20) for i in range(120)]
CHATS = [
    {
        "id": i,
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": "Ja 🦊"},
        ][: i % 3 or 2],
        "tags": ["a", "ä"][: i % 3],
        "meta": {"score": i / 2, "good": i % 2 == 0},
    }
    for i in range(1, 10)
]


def build_text(name, data_dir, splits):
    """Writes texts, each a record with one field."""
    rows = {split: ({"text": text} for text in texts) for split, texts in splits.items()}
    return tfds_builder.build_records(name, data_dir, rows)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    build_text("my_texts", root, {"train": TEXTS, "validation": iter(["one"])})
    return root


def fields(source) -> list:
    parts = pickle.loads(pickle.dumps(source.parts()))
    return [dict(d.fields) for part in parts for d in part.documents()]


def shard(root: Path) -> Path:
    return next(root.glob("my_texts/1.0.0/*-train.*"))


def damaged(root: Path, tmp_path: Path, content: bytes) -> TfdsSource:
    if not (tmp_path / "my_texts").exists():
        shutil.copytree(root / "my_texts", tmp_path / "my_texts")
    shard(tmp_path).write_bytes(content)
    return TfdsSource("my_texts", str(tmp_path))


def test_text_comes_back_in_order_without_tensorflow(built):
    source = TfdsSource("my_texts", str(built), "train", "data.name=my_texts")
    assert [f["text"] for f in fields(source)] == TEXTS
    assert source.describe() == {
        "version": "1.0.0",
        "split": "train",
        "records": 120,
        "files": 1,
    }
    assert tfds_source.feature_kinds(source.builder) == {"text": "text"}
    first = next(iter(source.parts()[0].documents()))
    assert first.where() == f"data.name: {shard(built)} record 0"
    assert "tensorflow" not in sys.modules
    assert list(tfds_source.open_builder("my_texts", str(built)).info.splits) == [
        "train",
        "validation",
    ]


def test_parts_are_ranges_of_records(built, monkeypatch):
    monkeypatch.setattr(tfds_source, "PART_BYTES", 10_000)
    source = TfdsSource("my_texts", str(built))
    assert len(source.parts()) > 3
    assert [f["text"] for f in fields(source)] == TEXTS


def test_slices_of_splits(built):
    source = TfdsSource("my_texts", str(built), "train[90%:]")
    assert [f["text"] for f in fields(source)] == TEXTS[108:]
    both = TfdsSource("my_texts", str(built), "train[:2]+validation")
    assert [f["text"] for f in fields(both)] == [*TEXTS[:2], "one"]
    assert len({source.digest(), both.digest(), TfdsSource("my_texts", str(built)).digest()}) == 3
    for split in ("dev", "train[", "train[:900%]", ""):
        with pytest.raises(DataError, match=r"no split .* it has: train, validation") as caught:
            TfdsSource("my_texts", str(built), split)
        assert "\n" not in str(caught.value)


def test_records_of_all_kinds(tmp_path):
    tfds_builder.build_records("chats", tmp_path, {"train": CHATS})
    source = TfdsSource("chats", str(tmp_path))
    assert fields(source) == CHATS
    assert tfds_source.feature_kinds(source.builder) == dict.fromkeys(CHATS[0], "other")


def test_the_same_texts_give_the_same_bytes_and_digest(built, tmp_path):
    build_text("my_texts", tmp_path, {"train": TEXTS, "validation": ["one"]})
    assert shard(tmp_path).read_bytes() == shard(built).read_bytes()
    names = sorted(p.name for p in tmp_path.rglob("*"))
    assert names == sorted(p.name for p in built.rglob("*"))
    again = TfdsSource("my_texts", str(tmp_path))
    assert again.digest() == TfdsSource("my_texts", str(built)).digest()


def png(shape: tuple[int, ...], value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_images_and_their_classes(tmp_path):
    rows = [(png((4, 3), i), ("cat", "dog")[i % 2]) for i in range(5)]
    tfds_builder.build_images(
        "pets", tmp_path, {"train": rows, "test": [(rows[0][0], 0)]}, ["cat", "dog"]
    )
    builder = open_builder("pets", str(tmp_path))
    assert feature_kinds(builder) == {"image": "image", "label": "label"}
    source = TfdsSource("pets", str(tmp_path))
    assert [(f["image"], f["label"]) for f in fields(source)] == [
        (rows[i][0], i % 2) for i in range(5)
    ]
    for row, message in (
        ((png((4, 3, 3), 0), 0), "image 1 has 3 channels where the first image has 1"),
        ((rows[0][0], "fox"), "has the class 'fox', which is none of cat, dog"),
        ((rows[0][0], 2), "has the class 2"),
        ((b"GIF", 0), "is no PNG file"),
    ):
        with pytest.raises(DataError, match=message):
            tfds_builder.build_images("bad", tmp_path, {"train": [rows[0], row]}, ["cat", "dog"])
        assert not (tmp_path / "bad" / "1.0.0").exists()


def test_the_newest_version_and_configs_are_found(built, tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        target = tmp_path / "my_texts" / version
        shutil.copytree(built / "my_texts" / "1.0.0", target)
        path = target / "dataset_info.json"
        path.write_text(path.read_text().replace('"1.0.0"', f'"{version}"'))
    for name, version in (
        ("", "1.10.0"),
        (":1.9.0", "1.9.0"),
        (":1.*.*", "1.10.0"),
        ("/1.0.0", "1.0.0"),
    ):
        assert str(open_builder(f"my_texts{name}", str(tmp_path)).info.version) == version
    with pytest.raises(DataError, match=r"not prepared as version 2\.0\.0 in "):
        open_builder("my_texts:2.0.0", str(tmp_path))
    for config in ("en", "de"):
        shutil.copytree(built / "my_texts" / "1.0.0", tmp_path / "wiki" / config / "1.0.0")
    with pytest.raises(DataError, match="several configs; name one: wiki/de, wiki/en"):
        open_builder("wiki", str(tmp_path))
    assert open_builder("wiki/en", str(tmp_path)).info.splits["train"].num_examples == 120


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_text", "no dataset of that name in .*; near: my_texts"),
        ("gsm8", "near: gsm8k"),
        ("gsm8k", "not prepared in .*main prepare --config=.*data.data_dir"),
        ("huggingface:wikitext", "not a name of TFDS.*data.source=huggingface"),
        ("../my_texts", "not a name of TFDS"),
    ],
)
def test_names_that_are_not_there(built, name, message):
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        open_builder(name, str(built))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"data.name={name}: ")
    assert time.monotonic() - start < 10


def test_the_wrong_data_dir_is_explained(built):
    with pytest.raises(DataError, match=r"data\.data_dir is the folder above"):
        open_builder("my_texts", str(built / "my_texts"))


def test_another_format_is_refused(built, tmp_path):
    shutil.copytree(built / "my_texts", tmp_path / "my_texts")
    path = tmp_path / "my_texts/1.0.0/dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"was prepared as tfrecord.*file_format='array_record'"):
        open_builder("my_texts", str(tmp_path))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}"])
def test_damaged_descriptions(built, tmp_path, file, content):
    shutil.copytree(built / "my_texts", tmp_path / "my_texts")
    (tmp_path / "my_texts/1.0.0" / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        fields(TfdsSource("my_texts", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_flipped_bits_are_noticed_or_change_nothing(built, tmp_path):
    whole = shard(built).read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    # The records stand at the start, the index at the end; between them is padding.
    places = [*rng.integers(0, 20_000, 80), *rng.integers(0, len(whole), 40)]
    for place in [*range(0, 64, 5), *places, *range(len(whole) - 64, len(whole), 5)]:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        try:
            found = fields(damaged(built, tmp_path, bytes(content)))
        except DataError as error:
            messages.append(str(error))
        else:
            assert [f["text"] for f in found] == TEXTS
    assert len(messages) > 40
    assert all(str(shard(tmp_path)) in m and "\n" not in m for m in messages)


def test_cut_files_are_noticed(built, tmp_path):
    whole = shard(built).read_bytes()
    for length in [0, 1, 63, 64, *range(100, len(whole), 7919), len(whole) - 1]:
        source = damaged(built, tmp_path, whole[:length])
        with pytest.raises(DataError, match=r"is damaged|has 0 records") as caught:
            fields(source)
        assert str(shard(tmp_path)) in str(caught.value)
    with pytest.raises(DataError, match="has 0 records where"):
        fields(damaged(built, tmp_path, whole[:100] + bytes(len(whole) - 100)))


def test_a_file_with_other_records_is_noticed(built, tmp_path):
    other = next(built.glob("my_texts/1.0.0/*-validation.*")).read_bytes()
    with pytest.raises(DataError, match=r"has 1 records where dataset_info.json says 120"):
        fields(damaged(built, tmp_path, other))
    shard(tmp_path).unlink()
    with pytest.raises(DataError, match="is missing"):
        TfdsSource("my_texts", str(tmp_path))


def test_the_digest_depends_on_content_and_names(built, tmp_path):
    content = bytearray(shard(built).read_bytes())
    content[len(content) // 2] ^= 1
    changed = damaged(built, tmp_path, bytes(content))
    assert changed.digest() != TfdsSource("my_texts", str(built)).digest()


def test_text_that_is_not_utf8_names_the_record(tmp_path):
    build_text("latin", tmp_path, {"train": ["fine", b"M\xfcnchen"]})
    with pytest.raises(DataError, match=r"record 1, field 'text', has text .* 0xfc at offset 1"):
        fields(TfdsSource("latin", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "splits", "message"),
    [
        ("My-Texts", {"train": ["a"]}, "no name of a dataset"),
        ("../up", {"train": ["a"]}, "no name of a dataset"),
        ("texts", {}, "needs a split"),
        ("texts", {"a/b": ["a"]}, "no name of a split"),
        ("texts", {"train": []}, "is empty"),
    ],
)
def test_what_cannot_be_built(tmp_path, name, splits, message):
    with pytest.raises(DataError, match=message):
        build_text(name, tmp_path / "root", splits)


def test_records_unlike_the_first_are_refused(tmp_path):
    for rows, message in (
        ([{"a": "x"}, {"b": "x"}], "record 1 has the fields b where the first record has a"),
        ([{"a": [{"b": ["x"]}]}], "lists in a list, which need TensorFlow"),
        ([{"a": None}], "does not tell its type"),
        ([{"a": 1}, {"a": "x"}], "cannot be written"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            tfds_builder.build_records("rows", tmp_path, {"train": rows})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "rows" / "1.0.0").exists()


def test_a_dataset_that_exists_is_not_replaced(built):
    before = shard(built).read_bytes()
    with pytest.raises(OutputError, match="exists; remove it"):
        build_text("my_texts", built, {"train": ["new"]})
    assert shard(built).read_bytes() == before


def test_downloading_where_there_is_no_network(tmp_path, monkeypatch, capfd):
    def unreachable(address, timeout):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(tfds_source.socket, "create_connection", unreachable)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with pytest.raises(DataError) as caught:
        tfds_source.download("tiny_shakespeare", str(tmp_path))
    words = str(caught.value)
    assert "tried https://raw.githubusercontent.com/" in words and "data.data_dir" in words
    assert "\n" not in words
    with pytest.raises(DataError, match=r"needs .*apache_beam|could not reach"):
        tfds_source.download("wiki40b/en", str(tmp_path))
    with pytest.raises(DataError, match="nor does TFDS know one"):
        tfds_source.download("tiny_shakespear_", str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_builder_that_needs_tensorflow(tmp_path, monkeypatch):
    def fail(*args, **options):
        try:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        except ModuleNotFoundError as error:
            raise RuntimeError("Failed to encode example:\n{...}") from error

    monkeypatch.setattr(tfds_source, "_check_network", lambda urls, here: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(DataError, match=r"mnist: preparing this dataset needs TensorFlow, "):
        tfds_source.download("mnist", str(tmp_path))


def test_features_that_other_builders_use(tmp_path):
    kinds = tfds.features
    features = kinds.FeaturesDict(
        {
            "names": kinds.Tensor(shape=(None,), dtype=np.str_),
            "title": kinds.Scalar(np.str_),
            "turns": kinds.Sequence({"said": kinds.Text(), "n": np.int32}),
            "pair": kinds.Translation(["en", "de"]),
            "image": kinds.Image(shape=(None, None, 1)),
            "raw": kinds.Tensor(shape=(2,), dtype=np.float32),
        }
    )
    row = {
        "names": ["a", "é"],
        "title": "é",
        "turns": [{"said": "ä", "n": 1}, {"said": "", "n": 2}],
        "pair": {"en": "a", "de": "ä"},
        "image": png((2, 2), 5),
        "raw": [0.5, 2.0],
    }
    given = row | {"image": io.BytesIO(row["image"]), "raw": np.array(row["raw"], np.float32)}
    tfds_builder._build("odd", tmp_path, features, {"train": iter([given])})
    source = TfdsSource("odd", str(tmp_path))
    # An image is left as it is stored.
    assert fields(source) == [row]
    assert tfds_source.feature_kinds(source.builder) == {
        "names": "other",
        "title": "text",
        "turns": "other",
        "pair": "other",
        "image": "image",
        "raw": "other",
    }


def test_what_is_prepared_is_not_downloaded(built):
    assert tfds_source.download("my_texts", str(built)) == built / "my_texts/1.0.0"


def make(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/make_tfds.py", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script(tmp_path):
    text, chats, folder = tmp_path / "a.txt", tmp_path / "chats.jsonl", tmp_path / "texts"
    text.write_text("one\ntwo\n\n\nthree\n", "utf-8")
    chats.write_text("\n".join(map(json.dumps, CHATS)), "utf-8")
    folder.mkdir()
    (folder / "1.txt").write_text("first\n\nstill\n", "utf-8")
    for split, kind, value in (("train", "cat", 1), ("train", "dog", 2), ("val", "dog", 3)):
        place = tmp_path / "images" / split / kind
        place.mkdir(parents=True)
        (place / "1.png").write_bytes(png((2, 2), value))
    root = tmp_path / "root"
    done = make("--name=texts", f"--data_dir={root}", f"--train={text}", f"--validation={folder}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"written to {root}/texts/1.0.0\ntrain on it with: --config.data.source=tfds "
        f"--config.data.name=texts --config.data.data_dir={root}\n"
    )
    assert fields(TfdsSource("texts", str(root))) == [{"text": "one\ntwo"}, {"text": "three"}]
    validation = TfdsSource("texts", str(root), "validation")
    assert fields(validation) == [{"text": "first\n\nstill\n"}]
    assert make("--name=chats", f"--data_dir={root}", f"--train={chats}").returncode == 0
    assert fields(TfdsSource("chats", str(root))) == CHATS
    place = tmp_path / "images"
    words = (f"--train={place}/train", f"--validation={place}/val", "--images")
    assert make("--name=pets", f"--data_dir={root}", *words).returncode == 0
    assert [f["label"] for f in fields(TfdsSource("pets", str(root), "validation"))] == [1]
    again = make("--name=texts", f"--data_dir={root}", f"--train={text}", "--lines")
    assert again.returncode == 73 and "exists" in again.stderr
    missing = make("--name=new", f"--data_dir={root}", "--train=nowhere")
    assert missing.returncode == 65 and missing.stderr.count("\n") == 1
