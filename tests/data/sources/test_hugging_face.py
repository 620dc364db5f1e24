"""Folders of Hugging Face datasets: Arrow streams of save_to_disk, and Parquet of the hub."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from craft_jax.data.sources import hugging_face
from craft_jax.data.sources.hugging_face import HuggingFaceSource
from craft_jax.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"Text {i}: äöü 🦊\n" + "words and more words " * (i % 7 * 20) for i in range(300)]


def splits_of(folder: Path) -> list[str]:
    return list(hugging_face._splits(folder, str(folder), "data.path"))


def save(folder: Path, tables: list, split: str | None = "train", rows: int = 25, **state) -> Path:
    """Writes what `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        path = folder / name
        with path.open("wb") as file, pa.RecordBatchStreamWriter(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    values = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "9e1b2c",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(values | state), "utf-8")
    features = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}), "utf-8")
    return folder


def table(texts: list[str], **columns) -> pa.Table:
    return pa.table({"text": texts, **columns})


@pytest.fixture
def saved(tmp_path) -> Path:
    root = tmp_path / "my-texts"
    save(root / "train", [table(TEXTS[:120]), table(TEXTS[120:])])
    save(root / "test", [table(["one"])], "test")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', "utf-8")
    return root


def documents(source: HuggingFaceSource) -> list:
    parts = pickle.loads(pickle.dumps(source.parts()))
    return [d for part in parts for d in part.documents()]


def texts(source: HuggingFaceSource) -> list:
    return [d.fields["text"] for d in documents(source)]


def test_a_saved_dict_of_datasets(saved, monkeypatch):
    source = HuggingFaceSource(str(saved))
    assert source.name == "my_texts" and source.describe() == {"split": "train", "files": 2}
    assert texts(source) == TEXTS
    assert splits_of(saved) == ["train", "test"]
    assert texts(HuggingFaceSource(str(saved), "test")) == ["one"]
    monkeypatch.setattr(hugging_face, "PART_BYTES", 30_000)
    assert len(source.parts()) > 5 and texts(source) == TEXTS
    place = documents(source)[130].where()
    assert place == f"data.name: {saved}/train/data-00001-of-00002.arrow row 10"
    with pytest.raises(DataError, match=r"no split 'validation'; it has: train, test"):
        HuggingFaceSource(str(saved), "validation")


def test_a_saved_dataset(tmp_path):
    one = save(tmp_path / "one", [table(TEXTS)], None)
    assert texts(HuggingFaceSource(str(one))) == TEXTS
    two = save(tmp_path / "two", [table(TEXTS)], "validation")
    assert texts(HuggingFaceSource(str(two), "validation")) == TEXTS
    with pytest.raises(DataError, match=r"no split 'train'; it has: validation"):
        HuggingFaceSource(str(two))


def test_values_of_python(tmp_path):
    messages = [[{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b"}], []]
    turned = pa.array([{"role": ["u"], "content": ["x"]}, {"role": [], "content": []}])
    label = pa.array(["a", "b"]).dictionary_encode()
    when = pa.array([1, 2], pa.timestamp("ns"))
    columns = dict(messages=messages, turned=turned, label=label, when=when)
    root = save(tmp_path / "chats", [table(["a", None], **columns)])
    first, second = (d.fields for d in documents(HuggingFaceSource(str(root))))
    assert first == {
        "text": "a",
        "messages": messages[0],
        "turned": [{"role": "u", "content": "x"}],
        "label": "a",
    }
    assert second["text"] is None and second["messages"] == [] and second["turned"] == []
    chosen = HuggingFaceSource(str(root), columns=("text",))
    assert [d.fields for d in documents(chosen)] == [{"text": "a"}, {"text": None}]


def test_the_digest_depends_on_content_and_names(saved):
    source = HuggingFaceSource(str(saved))
    before = source.digest()
    assert before == HuggingFaceSource(str(saved)).digest()
    assert before != HuggingFaceSource(str(saved), "test").digest()
    path = source.paths[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert source.digest() != before


def test_cut_files_are_noticed(saved):
    path = HuggingFaceSource(str(saved)).paths[0]
    whole = path.read_bytes()
    # Also where one record batch ends and the next begins.
    for length in [0, 1, 8, *range(100, len(whole), 3989), len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is damaged|is truncated") as caught:
            texts(HuggingFaceSource(str(saved)))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_flipped_bits_never_crash(saved):
    path = HuggingFaceSource(str(saved)).paths[0]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for place in [*range(0, 900, 7), *rng.integers(0, len(whole), 150)]:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            documents(HuggingFaceSource(str(saved)))
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(path) in m and "\n" not in m for m in messages)


def test_text_that_is_not_utf8_names_the_row(tmp_path):
    values = [b"x"] * 60 + [b"M\xfcnchen"] + [b"y"] * 10
    column = pa.Array.from_buffers(pa.string(), len(values), pa.array(values).buffers())
    root = save(tmp_path / "latin", [pa.table({"text": column})])
    with pytest.raises(DataError, match=r"arrow row 60 has text that is not UTF-8"):
        documents(HuggingFaceSource(str(root)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_indices_files": [{"filename": "indices.arrow"}]}, r"flatten_indices\(\)"),
        ({"_data_files": None}, "lists no _data_files"),
        ({"_data_files": [{"filename": "../../secret.arrow"}]}, "outside its folder"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "is missing"),
    ],
)
def test_states_that_are_refused(tmp_path, change, message):
    root = save(tmp_path / "one", [table(TEXTS)], **change)
    with pytest.raises(DataError, match=message):
        HuggingFaceSource(str(root))


def test_descriptions_that_are_damaged(saved):
    for name in ("train/state.json", "dataset_dict.json"):
        whole = (saved / name).read_bytes()
        for content in (b"", b"{", b"[]", b"\xff", b"{}", b'{"splits": 3, "_data_files": 3}'):
            (saved / name).write_bytes(content)
            with pytest.raises(DataError, match=r"\.json (is|lists)"):
                HuggingFaceSource(str(saved))
        (saved / name).write_bytes(whole)
    (saved / "test/state.json").unlink()
    with pytest.raises(DataError, match=r"the split test has no state\.json"):
        HuggingFaceSource(str(saved))


def test_a_name_of_the_hub_is_not_downloaded(tmp_path):
    with pytest.raises(DataError, match=r"nothing is downloaded; .*save_to_disk") as caught:
        HuggingFaceSource("Salesforce/wikitext", origin="data.name=Salesforce/wikitext")
    assert str(caught.value).startswith("data.name=Salesforce/wikitext: there is no such folder")
    with pytest.raises(DataError, match=r"no \.parquet file"):
        HuggingFaceSource(str(tmp_path))


def parquet(root: Path, files: dict[str, list[str]]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(content), root / name)
    return root


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            {
                "data/train-00000-of-00002.parquet": ["a"],
                "data/train-00001-of-00002.parquet": ["b"],
                "data/validation-00000-of-00001-1f2e3d.parquet": ["c"],
            },
            {"train": ["a", "b"], "validation": ["c"]},
        ),
        (
            {
                "default/train/0000.parquet": ["a"],
                "default/train/0001.parquet": ["b"],
                "default/test/0000.parquet": ["c"],
            },
            {"test": ["c"], "train": ["a", "b"]},
        ),
        ({"train.parquet": ["a"], "dev.parquet": ["c"]}, {"validation": ["c"], "train": ["a"]}),
        ({"train_sft-00000-of-00001.parquet": ["a"]}, {"train_sft": ["a"]}),
        ({"some.parquet": ["a"], ".cache/other.parquet": ["b"]}, {"train": ["a"]}),
    ],
)
def test_parquet_of_the_hub(tmp_path, files, splits):
    root = parquet(tmp_path, files)
    assert splits_of(root) == list(splits)
    for split, content in splits.items():
        assert texts(HuggingFaceSource(str(root), split)) == content
    if "validation" in splits:
        assert texts(HuggingFaceSource(str(root), "valid")) == ["c"]
    place = documents(HuggingFaceSource(str(root), next(iter(splits))))[0].where()
    assert place.startswith(f"data.name: {root}/") and place.endswith(".parquet row 0")


def test_parquet_that_is_not_whole(tmp_path):
    parquet(tmp_path / "a", {"data/train-00001-of-00002.parquet": ["b"]})
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet is missing"):
        HuggingFaceSource(str(tmp_path / "a"))
    names = ("en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet")
    parquet(tmp_path / "b", {name: ["b"] for name in names})
    with pytest.raises(DataError, match="has several datasets: de, en; name the folder of one"):
        HuggingFaceSource(str(tmp_path / "b"))
    assert texts(HuggingFaceSource(str(tmp_path / "b/en"))) == ["b"]
