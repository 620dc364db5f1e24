"""Weights in files and folders: whatever disagrees is named, and shards are as Hugging Face's."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from craft_jax.errors import CraftError
from interop.errors import (
    AmbiguousSourceError,
    CorruptFileError,
    InteropError,
    UnknownArchitectureError,
    UnsafePickleError,
)
from interop.files.safetensors import SafetensorsWriter
from interop.files.shards import Shard, index_json, plan_shards
from interop.files.torch_writer import Placeholder, TorchFileWriter
from interop.files.weights import Weights, open_weights
from interop.mapping.tensors import Abstract, same_bits

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
Arrays = dict[str, np.ndarray]


def arrays(count: int = 4) -> Arrays:
    rng = np.random.default_rng(0)
    return {f"h.{i}.w": rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(count)}


def described(tensors: Arrays) -> dict[str, Abstract]:
    return {name: Abstract(array.shape, array.dtype) for name, array in tensors.items()}


def save(path: Path, tensors: Arrays, metadata: dict | None = None) -> Path:
    with SafetensorsWriter(path, described(tensors), metadata or {"format": "pt"}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return path


def save_torch(path: Path, tensors: Arrays, also: dict[str, str] | None = None) -> Path:
    """Saves a flat dict of tensors; `also` gives second names to some of them."""
    names = {name: name for name in tensors} | (also or {})
    return save_nested(path, placeholders(tensors, names), tensors)


def placeholders(tensors: Arrays, names: dict[str, str] | None = None) -> dict[str, Placeholder]:
    kinds = described(tensors)
    names = names or {name: name for name in tensors}
    return {name: Placeholder(key, kinds[key]) for name, key in names.items()}


def save_nested(path: Path, value: object, tensors: Arrays) -> Path:
    with TorchFileWriter(path, value) as writer:
        for key in writer.keys:
            writer.write(key, tensors[key])
    return path


def shard(folder: Path, tensors: Arrays, limit: int = 40, write=save, suffix=".safetensors"):
    """Saves shards and their index; returns the names of the shards."""
    shards = plan_shards(described(tensors), limit)
    if suffix == ".bin":
        shards = [
            Shard(f"pytorch_{s.file.removesuffix('.safetensors')}.bin", s.names) for s in shards
        ]
    for one in shards:
        write(folder / one.file, {name: tensors[name] for name in one.names})
    index = BIN_INDEX if suffix == ".bin" else INDEX
    (folder / index).write_text(json.dumps(index_json(shards, described(tensors))))
    return [one.file for one in shards]


def shard_torch(folder: Path, tensors: Arrays) -> list[str]:
    return shard(folder, tensors, write=save_torch, suffix=".bin")


def edit_index(folder: Path, change, name: str = INDEX) -> None:
    found = json.loads((folder / name).read_text())
    change(found)
    (folder / name).write_text(json.dumps(found))


def assert_holds(weights: Weights, tensors: Arrays) -> None:
    assert weights.tensors.keys() == tensors.keys()
    assert all(same_bits(weights.tensors[name].read(), tensors[name]) for name in tensors)


def refusal(path: Path, kind: type[InteropError] = CorruptFileError, code: int = 65) -> str:
    """Returns the message with which a path is refused: one line that names it."""
    with pytest.raises(CraftError) as caught:
        open_weights(path)
    assert type(caught.value) is kind, caught.value
    assert caught.value.exit_code == code
    text = str(caught.value)
    assert str(path) in text and text.isprintable()
    return text


# ---- one file


def test_a_safetensors_file(tmp_path):
    path = save(tmp_path / "any.safetensors", arrays(), {"format": "pt", "a": "b"})
    weights = open_weights(path)
    assert_holds(weights, arrays())
    assert (weights.files, weights.notes, weights.container) == ((path,), (), None)
    assert weights.metadata == {"format": "pt", "a": "b"}


@pytest.mark.parametrize("name", ["ckpt.pt", "a.bin", "a.pth", "a.ckpt", "no_suffix", "a.json"])
def test_content_determines_the_format(tmp_path, name):
    assert_holds(open_weights(save(tmp_path / name, arrays())), arrays())
    (tmp_path / name).unlink()
    weights = open_weights(save_torch(tmp_path / name, arrays()))
    assert_holds(weights, arrays())
    assert weights.container.keys() == arrays().keys()
    assert (weights.files, weights.metadata) == ((tmp_path / name,), {})


def test_a_torch_file_named_safetensors(tmp_path):
    assert_holds(open_weights(save_torch(tmp_path / SINGLE, arrays())), arrays())


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_looks_like_a_pickle_is_a_header(tmp_path, length):
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    text = header + b" " * (length - len(header))
    (tmp_path / "x.pt").write_bytes(length.to_bytes(8, "little") + text + b"\7")
    assert open_weights(tmp_path / "x.pt").tensors["a"].read().tolist() == [7]


def test_a_nested_torch_file_is_a_container(tmp_path):
    tensors = arrays(2)
    value = {"model": placeholders(tensors), "iter_num": 7}
    weights = open_weights(save_nested(tmp_path / "ckpt.pt", value, tensors))
    assert weights.tensors == {}
    assert weights.container["iter_num"] == 7
    assert same_bits(weights.container["model"]["h.1.w"].read(), tensors["h.1.w"])


@pytest.mark.torch
def test_a_file_of_torch_and_what_is_not_read_in_it(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in arrays().items()}
    torch.save(tensors, tmp_path / "a.bin")
    assert_holds(open_weights(tmp_path / "a.bin"), arrays())
    torch.save({"model": tensors, "type": torch.nn.Linear(1, 1)}, tmp_path / "b.bin")
    notes = open_weights(tmp_path / "b.bin").notes
    assert any("b.bin" in note and "Linear" in note for note in notes)


@pytest.mark.torch
def test_unsafe_pickles_are_refused_unless_their_names_are_allowed(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2), "run": os.system}, tmp_path / "a.pt")
    name = f"{os.system.__module__}.system"
    assert name in refusal(tmp_path / "a.pt", UnsafePickleError, 77)
    weights = open_weights(tmp_path / "a.pt", allow_globals=[name])
    assert weights.container["a"].read().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.pt", b"", "empty file"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.pth", b"<html>Sign in</html>", "HTML page"),
        ("a.safetensors", b"<html>Sign in</html>", "HTML page"),
        ("a", b"some text", "text"),
        ("a.pt", bytes(range(144, 200)), "no PyTorch checkpoint"),
        ("a.safetensors", bytes(range(144, 200)), "not a safetensors file"),
        ("a.pt", b"PK\x03\x04" + bytes(50), "zip"),
        ("a.safetensors", b"PK\x03\x04" + bytes(50), "zip"),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    assert words in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing", "nothing.pt", "nothing.safetensors"])
def test_a_missing_path(tmp_path, name):
    assert "no such file" in refusal(tmp_path / name)


# ---- folders


def test_a_folder_with_one_file(tmp_path):
    save(tmp_path / SINGLE, arrays(), {"format": "np"})
    (tmp_path / "config.json").write_text("{}")
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert (weights.files, weights.notes) == ((tmp_path / SINGLE,), ())
    assert (weights.metadata, weights.container) == ({"format": "np"}, None)


def test_a_folder_with_shards(tmp_path):
    files = shard(tmp_path, arrays(), 40)
    assert len(files) == 3
    for weights in (open_weights(tmp_path), open_weights(tmp_path / INDEX)):
        assert_holds(weights, arrays())
        assert weights.files == tuple(tmp_path / file for file in files)
        assert (weights.notes, weights.metadata) == ((), {"format": "pt"})


def test_a_folder_with_a_torch_file(tmp_path):
    save_torch(tmp_path / BIN, arrays())
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert (weights.files, weights.notes, weights.container) == ((tmp_path / BIN,), (), None)


def test_a_folder_with_torch_shards(tmp_path):
    files = shard_torch(tmp_path, arrays())
    assert len(files) == 3
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert weights.files == tuple(tmp_path / file for file in files)


@pytest.mark.torch
def test_a_folder_that_transformers_sharded(tmp_path):
    torch = pytest.importorskip("torch")
    hub = pytest.importorskip("huggingface_hub")
    tensors = {name: torch.from_numpy(array) for name, array in arrays().items()}
    hub.save_torch_state_dict(tensors, tmp_path, max_shard_size=60)
    assert (tmp_path / INDEX).is_file()
    assert_holds(open_weights(tmp_path), arrays())
    hub.save_torch_state_dict(
        tensors, tmp_path, max_shard_size=60, safe_serialization=False, is_main_process=True
    )
    assert any("has the same tensors" in note for note in open_weights(tmp_path).notes)


def test_a_folder_of_links_as_in_the_cache_of_the_hub(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, file in enumerate(shard(tmp_path / "blobs", arrays())):
        (tmp_path / "blobs" / file).rename(tmp_path / "blobs" / f"{i}")
        (tmp_path / "snapshot" / file).symlink_to(f"../blobs/{i}")
    (tmp_path / "snapshot" / INDEX).symlink_to(f"../blobs/{INDEX}")
    assert_holds(open_weights(tmp_path / "snapshot"), arrays())


def test_a_folder_with_another_file_alone(tmp_path):
    save(tmp_path / "weights.safetensors", arrays())
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert len(weights.notes) == 1 and "weights.safetensors is used" in weights.notes[0]


def test_a_folder_with_several_other_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path / name, arrays())
    text = refusal(tmp_path, AmbiguousSourceError)
    assert "a.safetensors, b.safetensors" in text and "name one" in text


def test_a_folder_without_weights_lists_its_files(tmp_path):
    assert "it is empty" in refusal(tmp_path)
    for name in ("config.json", "ckpt.pt", ".hidden.safetensors"):
        (tmp_path / name).write_text("{}")
    text = refusal(tmp_path)
    assert "it has ckpt.pt, config.json;" in text and SINGLE in text


def test_system_files_are_ignored(tmp_path):
    save(tmp_path / SINGLE, arrays())
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    assert open_weights(tmp_path).notes == ()


@pytest.mark.parametrize(
    "names", [["adapter_config.json"], ["adapter_config.json", "adapter_model.safetensors"]]
)
def test_an_adapter_alone_is_no_model(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    text = refusal(tmp_path, UnknownArchitectureError, 78)
    assert "adapter" in text and "merge" in text


def test_an_adapter_beside_a_model_is_noted(tmp_path):
    save(tmp_path / SINGLE, arrays())
    save(tmp_path / "adapter_model.safetensors", arrays(1))
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert weights.notes == ("adapter_model.safetensors: beside the weights, not used",)


def test_shards_without_an_index(tmp_path):
    files = shard(tmp_path, arrays())
    (tmp_path / INDEX).unlink()
    text = refusal(tmp_path)
    assert "shards without an index" in text and files[0] in text and INDEX in text


def test_shards_of_another_save_are_noted(tmp_path):
    shard(tmp_path, arrays())
    old = "model-00001-of-00007.safetensors"
    save(tmp_path / old, arrays(1))
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert weights.notes == (f"{old}: in no index, not used",)


def test_a_torch_file_in_a_folder_must_be_flat(tmp_path):
    tensors = arrays(1)
    save_nested(tmp_path / BIN, {"model": placeholders(tensors)}, tensors)
    assert "not a flat dict" in refusal(tmp_path)


# ---- folders that say something twice


def write_single(folder: Path, tensors: Arrays) -> list[str]:
    return [save(folder / SINGLE, tensors).name]


def write_torch(folder: Path, tensors: Arrays) -> list[str]:
    return [save_torch(folder / BIN, tensors).name]


# (what is used, its name, what is compared with it, its name)
PAIRS = {
    "single and shards": (write_single, SINGLE, shard, INDEX),
    "single and torch": (write_single, SINGLE, write_torch, BIN),
    "single and torch shards": (write_single, SINGLE, shard_torch, BIN_INDEX),
    "shards and torch": (shard, INDEX, write_torch, BIN),
    "torch and torch shards": (write_torch, BIN, shard_torch, BIN_INDEX),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_that_are_the_same_are_noted(tmp_path, pair):
    write, first, write_other, other = PAIRS[pair]
    files = write(tmp_path, arrays())
    write_other(tmp_path, dict(reversed(arrays().items())))
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert weights.files == tuple(tmp_path / file for file in files)
    assert weights.notes == (f"{other} has the same tensors as {first}, which is used",)


def changed(tensors: Arrays, kind: str) -> Arrays:
    """Returns tensors of which one differs a little."""
    name = "h.2.w"
    array = tensors[name].copy()
    if kind == "bit":
        array.view(np.uint32)[-1, -1] ^= 1
    elif kind == "sign of zero":
        array[0, 0] = -0.0
    elif kind == "shape":
        array = array.reshape(-1)
    elif kind == "dtype":
        array = array.view(np.int32)
    changed = tensors | {name: array}
    if kind == "lost":
        del changed[name]
    if kind == "more":
        changed["h.9.w"] = array
    return changed


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bit", "'h.2.w' has other values"),
        ("sign of zero", "'h.2.w' has other values"),
        ("shape", "'h.2.w' is float32 [3, 3] in"),
        ("dtype", "and int32 [3, 3] in"),
        ("lost", "'h.2.w' is only in {first}"),
        ("more", "'h.9.w' is only in {other}"),
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_two_that_differ_are_refused(tmp_path, pair, kind, words):
    write, first, write_other, other = PAIRS[pair]
    tensors = arrays()
    tensors["h.2.w"][0, 0] = 0.0
    write(tmp_path, tensors)
    write_other(tmp_path, changed(tensors, kind))
    text = refusal(tmp_path, AmbiguousSourceError)
    assert words.format(first=first, other=other) in text
    assert first in text and other in text
    assert_holds(open_weights(tmp_path / first), tensors)


def test_only_the_first_differences_are_named(tmp_path):
    save(tmp_path / SINGLE, arrays(9))
    save_torch(tmp_path / BIN, {name: array + 1 for name, array in arrays(9).items()})
    text = refusal(tmp_path, AmbiguousSourceError)
    assert all(f"'h.{i}.w'" in text for i in range(3)) and "'h.3.w'" not in text


def test_nan_is_the_same_as_itself(tmp_path):
    tensors = arrays() | {"nan": np.array([np.nan, -np.nan], np.float32)}
    save(tmp_path / SINGLE, tensors)
    save_torch(tmp_path / BIN, tensors)
    assert len(open_weights(tmp_path).notes) == 1


def test_the_second_name_of_a_shared_array_is_no_difference(tmp_path):
    save(tmp_path / SINGLE, arrays())
    save_torch(tmp_path / BIN, arrays(), {"lm_head.weight": "h.0.w"})
    weights = open_weights(tmp_path)
    assert_holds(weights, arrays())
    assert len(weights.notes) == 1


def test_an_equal_array_that_is_not_shared_is_a_difference(tmp_path):
    save(tmp_path / SINGLE, arrays())
    save_torch(tmp_path / BIN, arrays() | {"lm_head.weight": arrays()["h.0.w"]})
    assert "'lm_head.weight' is only in" in refusal(tmp_path, AmbiguousSourceError)


def test_three_are_all_compared(tmp_path):
    save(tmp_path / SINGLE, arrays())
    shard(tmp_path, arrays())
    save_torch(tmp_path / BIN, changed(arrays(), "bit"))
    assert BIN in refusal(tmp_path, AmbiguousSourceError)
    save_torch(tmp_path / BIN, arrays())
    assert len(open_weights(tmp_path).notes) == 2


def test_an_unreadable_second_file_is_named_with_the_reason(tmp_path):
    save(tmp_path / SINGLE, arrays())
    (tmp_path / BIN).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    text = refusal(tmp_path, AmbiguousSourceError)
    assert "cannot be compared" in text and "git-lfs pointer" in text
    assert_holds(open_weights(tmp_path / SINGLE), arrays())


def test_a_damaged_first_choice_is_not_passed_over(tmp_path):
    save(tmp_path / SINGLE, arrays())
    save_torch(tmp_path / BIN, arrays())
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 1)
    assert "truncated" in refusal(tmp_path)


# ---- indexes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' is there twice"),
        ("[" * 100_000, "no JSON"),
        ('"\xe4"', "no JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"h.0.w": 3}}', "'h.0.w' to 3"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path, text, words):
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "..\\x.safetensors",
        "C:\\x",
        "x\0y",
        "x\ny",
        "\ud800",
        "./model-00001-of-00003.safetensors",
    ],
)
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    inner = tmp_path / "model"
    inner.mkdir()
    shard(inner, arrays())
    save(tmp_path / "x.safetensors", arrays(1))
    edit_index(inner, lambda index: index["weight_map"].update({"h.0.w": name}))
    text = refusal(inner)
    assert "'h.0.w'" in text and "not the name of a file beside it" in text


def test_missing_shards_are_all_named(tmp_path):
    files = shard(tmp_path, arrays())
    for file in files[1:]:
        (tmp_path / file).unlink()
    text = refusal(tmp_path)
    assert files[1] in text and files[2] in text and files[0] not in text


def test_a_broken_symlink_is_a_missing_shard(tmp_path):
    files = shard(tmp_path, arrays())
    (tmp_path / files[0]).unlink()
    (tmp_path / files[0]).symlink_to("../blobs/1")
    assert files[0] in refusal(tmp_path)


def test_a_truncated_shard(tmp_path):
    files = shard(tmp_path, arrays())
    size = (tmp_path / files[1]).stat().st_size
    os.truncate(tmp_path / files[1], size - 4)
    text = refusal(tmp_path)
    assert files[1] in text and str(size) in text and str(size - 4) in text


def invent(index: dict) -> None:
    index["weight_map"]["h.7.w"] = index["weight_map"]["h.3.w"]


@pytest.mark.parametrize("write", [shard, shard_torch])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].pop("h.0.w"), "lacks h.0.w, which"),
        (invent, "maps h.7.w to"),
        (lambda index: index["metadata"].update(total_size=5), "total_size 5, and its shards have"),
        (lambda index: index["metadata"].update(total_size="120"), "total_size '120'"),
        (lambda index: index.update(metadata=[]), "metadata []"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path, write, change, words):
    write(tmp_path, arrays())
    index = INDEX if write is shard else BIN_INDEX
    edit_index(tmp_path, change, index)
    text = refusal(tmp_path)
    assert words in text and index in text


def test_a_total_size_gives_both_numbers(tmp_path):
    shard(tmp_path, arrays())
    edit_index(tmp_path, lambda index: index["metadata"].update(total_size=119))
    assert "119" in refusal(tmp_path) and "120" in refusal(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    files = shard(tmp_path, arrays())
    edit_index(tmp_path, lambda index: index["weight_map"].update({"h.0.w": files[2]}))
    text = refusal(tmp_path)
    assert f"maps h.0.w to {files[2]}, and {files[0]} has it" in text


def test_a_tensor_in_two_shards(tmp_path):
    files = shard(tmp_path, arrays())
    (tmp_path / files[2]).unlink()
    save(tmp_path / files[2], {name: arrays()[name] for name in ("h.3.w", "h.0.w")})
    text = refusal(tmp_path)
    assert f"{files[0]} and {files[2]}, which both have h.0.w" in text


@pytest.mark.parametrize("total", [None, 120.0])
def test_indexes_of_other_writers(tmp_path, total):
    shard(tmp_path, arrays())
    edit_index(tmp_path, lambda index: index["metadata"].update(total_size=total))
    assert_holds(open_weights(tmp_path), arrays())
    edit_index(tmp_path, lambda index: index.pop("metadata"))
    assert_holds(open_weights(tmp_path), arrays())


@pytest.mark.parametrize(("total", "good"), [(120, True), (132, True), (108, False), (133, False)])
def test_shared_arrays_may_be_counted_once_or_twice(tmp_path, total, good):
    file = "pytorch_model-00001-of-00001.bin"
    save_torch(tmp_path / file, arrays(), {"again": "h.0.w"})
    home = dict.fromkeys([*arrays(), "again"], file)
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (tmp_path / BIN_INDEX).write_text(json.dumps(index))
    if good:
        assert len(open_weights(tmp_path).tensors) == 5
    else:
        assert str(total) in refusal(tmp_path)


def test_a_huge_index_is_not_read(tmp_path):
    (tmp_path / INDEX).write_text("{}")
    os.truncate(tmp_path / INDEX, 100_000_001)
    assert "100000001 bytes" in refusal(tmp_path)


def test_an_index_that_is_a_folder_or_not_there(tmp_path):
    assert INDEX in refusal(tmp_path / INDEX)
    (tmp_path / INDEX).mkdir()
    with pytest.raises(CorruptFileError, match=INDEX):
        open_weights(tmp_path)
