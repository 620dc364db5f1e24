"""safetensors files: ours and the official library's are the same bytes, and damage is named."""

import concurrent.futures
import errno
import json
import os
import random
import resource
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from interop.errors import CorruptFileError, DtypeError, InteropError
from interop.files import safetensors as module
from interop.files.safetensors import SafetensorsWriter, read_safetensors
from interop.mapping.tensors import DTYPES, Abstract, bits, lazy, same_bits

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.fixture
def official():
    return pytest.importorskip("safetensors.numpy")


def described(arrays: dict[str, np.ndarray]) -> dict[str, Abstract]:
    return {name: Abstract(array.shape, array.dtype) for name, array in arrays.items()}


def written(path: Path, arrays: dict, metadata: dict | None = None) -> Path:
    """Writes arrays, last first."""
    with SafetensorsWriter(path, described(arrays), metadata or {}) as writer:
        for name in reversed(writer.order):
            writer.write(name, arrays[name])
    return path


def made(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Writes a file from a header, given as an object or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def random_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns random bits: NaNs, infinities, subnormals and all."""
    dtype = DTYPES[name]
    rng = np.random.default_rng(seed)
    if name == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(shape)


def one_of_each() -> dict[str, np.ndarray]:
    """Returns an array of each dtype, in an order that is not the file's."""
    return {f"{i}.{name}": random_array(name, (3, 5), i) for i, name in enumerate(DTYPES)}


def of_numpy() -> dict[str, np.ndarray]:
    """Returns those of `one_of_each` that the official library saves for numpy."""
    return {name: v for name, v in one_of_each().items() if v.dtype.isbuiltin == 1}


def refusal(path: Path, kind: type[InteropError] = CorruptFileError) -> str:
    """Returns the message with which a file is refused, which is one line and names the file."""
    with pytest.raises(kind) as caught:
        read_safetensors(path)
    text = str(caught.value)
    assert type(caught.value) is kind
    assert str(path) in text and "\n" not in text and text.isprintable()
    assert caught.value.exit_code == 65
    return text


# ---- round trips


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (3, 5), (2, 1, 3, 4)])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_keeps_its_bits(tmp_path, name, shape):
    array = random_array(name, shape)
    file = read_safetensors(written(tmp_path / "x.safetensors", {"x": array}))
    tensor = file.tensors["x"]
    assert (tensor.shape, tensor.dtype) == (shape, array.dtype)
    assert same_bits(tensor.read(), array)
    assert file.nbytes == array.nbytes


SPECIAL = {
    "F64": [0x7FF8000000000001, 0xFFF4DEADBEEF0001, 0x8000000000000000, 1, 0x7FF0000000000000],
    "F32": [0x7FC00001, 0xFFA5A5A5, 0x7F800001, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000],
    "F16": [0x7E01, 0xFD55, 0x7C01, 0x8000, 0x0001, 0x83FF, 0xFC00],
    "BF16": [0x7FC1, 0xFFA5, 0x7F81, 0x8000, 0x0001, 0x807F, 0xFF80],
    "F8_E4M3": [0x7F, 0xFF, 0x80, 0x01, 0x87, 0x7E],
    "F8_E5M2": [0x7D, 0x7E, 0xFF, 0x80, 0x01, 0x83, 0x7C],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_nan_payloads_negative_zero_and_subnormals_keep_their_bits(tmp_path, name):
    dtype = DTYPES[name]
    numbers = np.array(SPECIAL[name], f"u{dtype.itemsize}")
    path = written(tmp_path / "x.safetensors", {"x": numbers.view(dtype)})
    assert bits(read_safetensors(path).tensors["x"].read()).tolist() == SPECIAL[name]
    assert path.read_bytes().endswith(numbers.tobytes())


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2],
        lambda a: a[:, 1:5],
        lambda a: a[1, ::2],
        lambda a: a[::-1, ::-3],
        lambda a: np.broadcast_to(a[0], (3, 8)),
        np.asfortranarray,
    ],
)
@pytest.mark.parametrize("name", ["F32", "BF16", "F8_E4M3", "BOOL"])
def test_arrays_that_are_not_contiguous_are_written_as_what_they_show(tmp_path, name, view):
    array = view(random_array(name, (6, 8)))
    assert not array.flags.c_contiguous
    path = written(tmp_path / "x.safetensors", {"x": array})
    assert same_bits(read_safetensors(path).tensors["x"].read(), np.array(array, order="C"))
    assert path.read_bytes().endswith(array.tobytes(order="C"))


def test_names_and_metadata_of_any_text(tmp_path):
    names = ["", "a.b", 'q"uote\\', "line\nfeed", "\x01\x7f", "ß", "日本", "\u2028", "😀", "/x"]
    arrays = {name: np.full((i + 1,), i, np.int32) for i, name in enumerate(names)}
    metadata = {"format": "pt", "ключ": "\t\x02 ü"}
    file = read_safetensors(written(tmp_path / "x.safetensors", arrays, metadata))
    assert file.metadata == metadata
    assert {name: t.read().tolist() for name, t in file.tensors.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_a_file_without_tensors(tmp_path):
    file = read_safetensors(written(tmp_path / "x.safetensors", {}))
    assert (file.tensors, file.metadata, file.nbytes) == ({}, {}, 0)


# ---- against the official library


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_official_library(official, tmp_path, metadata):
    arrays = of_numpy()
    arrays |= {"scalar": np.float32(3.5), "none": np.zeros((0, 3), np.float64)}
    arrays |= {'odd "name"\n\x01\x7f\\ ü😀\u2028/': np.arange(5, dtype=np.uint8)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    assert len({array.dtype for array in arrays.values()}) == 12
    official.save_file(arrays, tmp_path / "official", metadata)
    written(tmp_path / "ours", arrays, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "official").read_bytes()


@pytest.mark.parametrize("length", range(9))
def test_the_padding_is_that_of_the_official_library(official, tmp_path, length):
    arrays = {"x" * (length + 1): np.arange(3, dtype=np.float32)}
    written(tmp_path / "ours", arrays)
    assert (tmp_path / "ours").read_bytes() == official.save(arrays)


def test_the_order_is_that_of_the_official_library_for_every_dtype(tmp_path):
    library = pytest.importorskip("safetensors")
    arrays = one_of_each()
    if not hasattr(library, "TensorSpec"):
        pytest.skip("this version of safetensors has no way to name a dtype")
    specs = {
        name: library.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    written(tmp_path / "ours", arrays)
    assert (tmp_path / "ours").read_bytes() == bytes(library.serialize(specs))


def test_the_official_library_reads_ours(official, tmp_path):
    arrays = of_numpy()
    loaded = official.load_file(written(tmp_path / "x.safetensors", arrays, {"a": "b", "c": "d"}))
    assert loaded.keys() == arrays.keys()
    assert all(same_bits(loaded[name], array) for name, array in arrays.items())


def test_what_the_official_library_writes_is_read(official, tmp_path):
    arrays = of_numpy()
    official.save_file(arrays, tmp_path / "x.safetensors", {"a": "1", "b": "2"})
    file = read_safetensors(tmp_path / "x.safetensors")
    assert file.metadata == {"a": "1", "b": "2"}
    assert file.tensors.keys() == arrays.keys()
    assert all(same_bits(file.tensors[name].read(), array) for name, array in arrays.items())


@pytest.mark.torch
def test_torch_reads_ours_and_writes_the_same_bytes(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    arrays = one_of_each()
    path = written(tmp_path / "x.safetensors", arrays, {"format": "pt"})
    loaded = library.load_file(path)
    for name, array in arrays.items():
        assert tuple(loaded[name].shape) == array.shape
        assert loaded[name].view(torch.uint8).numpy().tobytes() == array.tobytes()
        assert str(loaded[name].dtype).removeprefix("torch.") == array.dtype.name
    library.save_file(loaded, tmp_path / "torch", {"format": "pt"})
    assert (tmp_path / "torch").read_bytes() == path.read_bytes()


# ---- how it is read


def test_reading_takes_a_view_of_one_read_only_map(tmp_path):
    arrays = {"a": np.arange(4000.0), "b": np.arange(12).reshape(3, 4)}
    tensors = read_safetensors(written(tmp_path / "x.safetensors", arrays)).tensors
    a, again, b = tensors["a"].read(), tensors["a"].read(), tensors["b"].read()
    assert np.shares_memory(a, again)
    assert a.base is b.base
    assert not a.flags.owndata and not a.flags.writeable and b.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 1


def test_only_the_header_is_read_until_a_tensor_is(tmp_path):
    path = tmp_path / "x.safetensors"
    big = {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}
    made(path, {"big": big})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 30))
    tracemalloc.start()
    tensor = read_safetensors(path).tensors["big"]
    assert tensor.read()[-1] == 0
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["F64", "BF16", "I32"])
def test_offsets_that_are_not_aligned(tmp_path, name):
    values = random_array(name, (5,))
    header = {
        "u": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": name, "shape": [5], "data_offsets": [3, 3 + values.nbytes]},
    }
    for padding in range(8):
        text = json.dumps(header).encode() + b" " * padding
        path = made(tmp_path / f"{padding}", text, b"abc" + values.tobytes())
        array = read_safetensors(path).tensors["x"].read()
        assert same_bits(array, values)
        assert array.flags.aligned and not array.flags.writeable


def test_tensors_may_lie_in_another_order_than_the_header(tmp_path):
    header = {"a": F32 | {"data_offsets": [4, 8]}, "e": F32 | {"shape": [0, 2]}, "b": F32}
    header["e"]["data_offsets"] = [4, 4]
    path = made(tmp_path / "x", header, np.array([1, 2], np.float32).tobytes())
    tensors = read_safetensors(path).tensors
    assert list(tensors) == ["a", "e", "b"]
    assert [tensors[name].read().tolist() for name in tensors] == [[2], [], [1]]


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path):
    path = written(tmp_path / "x", {"a": np.arange(9000.0)})
    tensor = read_safetensors(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match="changed after its header was read"):
        tensor.read()


def test_a_file_that_is_replaced_while_it_is_mapped_keeps_its_values(tmp_path):
    path = written(tmp_path / "x", {"a": np.arange(9000.0)})
    tensor = read_safetensors(path).tensors["a"]
    before = tensor.read()
    written(tmp_path / "y", {"a": np.zeros(9000)}).replace(path)
    assert np.array_equal(tensor.read(), np.arange(9000.0))
    assert np.array_equal(before, np.arange(9000.0))


def test_threads_share_the_map(tmp_path):
    arrays = {f"{i}": np.full((1000,), i) for i in range(40)}
    tensors = read_safetensors(written(tmp_path / "x", arrays)).tensors
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: tensors[name].read(), tensors))
    assert all(np.array_equal(a, arrays[n]) for n, a in zip(tensors, found, strict=True))
    assert len({id(array.base) for array in found}) == 1


# ---- what is refused

BAD_FILES = {
    "empty": (b"", ["an empty file (0 bytes)"]),
    "five bytes": (b"\1\2\3\4\5", ["5 bytes", "8"]),
    "zeros": (bytes(400), ["400 bytes that start with zeros"]),
    "length 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", ["10 bytes", str(8 + (1 << 63))]),
    "header beyond the file": ((50).to_bytes(8, "little") + b'{"a":', ["13 bytes", "58"]),
    "no brace": (b"\x04" + bytes(7) + b"[{}]", ["begins with b'[{}]'"]),
    "space first": (b"\x03" + bytes(7) + b" {}", ["begins with b' {}'"]),
    "no header": (bytes(8) + b"x" * 8, ["no header", "not finished"]),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n",
        ["git-lfs pointer", "git lfs pull"],
    ),
    "html": (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", ["HTML page"]),
    "zip": (b"PK\x03\x04" + bytes(100), ["a zip archive", "104 bytes"]),
    "pickle": (
        b"\x80\x02}q\x00X\x01\x00\x00\x00a" + bytes(90),
        ["a pickle (101 bytes)", "PyTorch"],
    ),
    "json": (b'{"model_type": "gpt2", "n_layer": 12}', ["JSON text"]),
    "not UTF-8": (b'\x08\0\0\0\0\0\0\0{"\xff":{}}', ["no JSON", "0xff"]),
    "not JSON": (b'\x07\0\0\0\0\0\0\0{"a":,}', ["no JSON"]),
    "zeros as padding": (b"\x04\0\0\0\0\0\0\0{}\0\0", ["no JSON"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_no_safetensors_file_is_named(tmp_path, case):
    data, words = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    text = refusal(path)
    assert all(word in text for word in words), text


def entry(**changes: object) -> dict:
    return {"tensor.a": F32 | changes}


BAD_HEADERS = {
    "name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), ["'a' is there twice"]),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F16"}}', ["'dtype' is there twice"]),
    "half a surrogate pair": (b'{"\\ud800":{}}', ["not Unicode"]),
    "deep": (b'{"a":' * 100_000, ["no JSON"]),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", ["no JSON"]),
    "metadata list": ({"__metadata__": ["x"]}, ["__metadata__ is ['x']"]),
    "metadata null": ({"__metadata__": None}, ["__metadata__ is None"]),
    "metadata number": ({"__metadata__": {"step": 3}}, ["'step' is 3"]),
    "metadata surrogate": (b'{"__metadata__":{"k":"\\udfff"}}', ["'k'"]),
    "not an object": ({"tensor.a": [1]}, ["'tensor.a'", "[1]"]),
    "no dtype": ({"tensor.a": {"shape": [1], "data_offsets": [0, 4]}}, ["'tensor.a'"]),
    "another field": (entry(strides=[1]), ["'tensor.a'", "strides"]),
    "dtype number": (entry(dtype=3), ["'tensor.a'", "3"]),
    "dtype null": (entry(dtype=None), ["'tensor.a'", "None"]),
    "shape text": (entry(shape="1"), ["'tensor.a'"]),
    "shape negative": (entry(shape=[-1]), ["'tensor.a' is described by", "-1"]),
    "shape float": (entry(shape=[1.0]), ["'tensor.a'", "1.0"]),
    "shape bool": (entry(shape=[True]), ["'tensor.a'", "True"]),
    "shape not a number": (b'{"tensor.a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "n"),
    "one offset": (entry(data_offsets=[4]), ["'tensor.a'"]),
    "three offsets": (entry(data_offsets=[0, 4, 4]), ["'tensor.a'"]),
    "offset bool": (entry(data_offsets=[False, 4]), ["'tensor.a'", "False"]),
    "offset float": (entry(data_offsets=[0, 4.0]), ["'tensor.a'", "4.0"]),
    "offsets negative": (entry(data_offsets=[-4, 0]), ["'tensor.a' is described by", "-4"]),
    "offsets backwards": (entry(data_offsets=[4, 0]), ["'tensor.a'", "span -4"]),
    "unknown dtype": (entry(dtype="F33"), ["'tensor.a'", "'F33'", "BF16"]),
    "more bytes than the shape": (entry(shape=[2]), ["'tensor.a'", "8 bytes", "span 4"]),
    "fewer bytes than the shape": (entry(shape=[]) | entry(dtype="I16"), ["2 bytes", "span 4"]),
    "overflow": (entry(shape=[1 << 40, 1 << 40]), ["'tensor.a'", "larger than"]),
    "overflow to zero": (entry(shape=[1 << 32, 1 << 32, 4]), ["larger than"]),
    "overflow beside zero": (entry(shape=[0, 1 << 62, 8], data_offsets=[0, 0]), ["larger than"]),
    "65 dimensions": (entry(shape=[1] * 65), ["65 dimensions"]),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [2, 6]}}, ["'a' and 'b' overlap"]),
    "same place": ({"a": F32, "b": F32}, ["'a' and 'b' overlap"]),
    "empty inside another": (
        {"a": F32, "b": {"dtype": "F32", "shape": [0], "data_offsets": [2, 2]}},
        ["'a' and 'b' overlap"],
    ),
    "hole": ({"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, ["4 bytes before tensor 'b'"]),
    "hole at the start": (entry(data_offsets=[1, 5]), ["1 bytes before tensor 'tensor.a'"]),
    "long and odd name": ({"\n\x1b[31m" + "n" * 9000: 1}, [r"'\n\x1b[31mnn"]),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path, case):
    header, words = BAD_HEADERS[case]
    text = refusal(made(tmp_path / "model.safetensors", header, b"abcd"))
    assert all(word in text for word in words), text
    assert len(text) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("dtype", ["C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ"])
def test_dtypes_that_numpy_lacks_are_refused_by_name(tmp_path, dtype):
    text = refusal(made(tmp_path / "x", entry(dtype=dtype), b"abcd"), DtypeError)
    assert "'tensor.a'" in text and dtype in text and "save it as F32" in text


@pytest.mark.parametrize(("change", "word"), [(-1, "truncated"), (1, "not fully covered")])
def test_a_wrong_size_gives_both_sizes(tmp_path, change, word):
    path = written(tmp_path / "x", {"a": np.arange(1000.0)})
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)
    text = refusal(path)
    assert word in text and str(size) in text and str(size + change) in text


def test_every_truncation_is_refused(tmp_path):
    data = written(tmp_path / "x", {"a": np.arange(3.0), "b": np.arange(2)}).read_bytes()
    path = tmp_path / "model.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refusal(path)


@pytest.mark.parametrize("length", [100_000_001, 1 << 30])
def test_a_long_header_is_refused_before_it_is_read(tmp_path, length):
    path = made(tmp_path / "model.safetensors", b'{"a":', length=length)
    with path.open("r+b") as file:
        file.truncate(length + 8)
    tracemalloc.start()
    text = refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(length) in text and "100000000" in text


def test_huge_claims_allocate_nothing(tmp_path):
    huge = {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}
    claims = [made(tmp_path / "shape", {"a": huge}), made(tmp_path / "length", b"{}", b"", 1 << 62)]
    for path in claims:
        tracemalloc.start()
        text = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert str(path.stat().st_size) in text


def test_what_is_no_file(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "nothing.safetensors")
    (tmp_path / "file").write_bytes(b"")
    assert "no such file" in refusal(tmp_path / "file" / "inside")
    (tmp_path / "broken").symlink_to(tmp_path / "blob")
    assert "no such file" in refusal(tmp_path / "broken")
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe" in refusal(tmp_path / "pipe")
    assert "cannot be opened" in refusal(tmp_path / ("n" * 300))


def test_links_are_followed(tmp_path):
    written(tmp_path / "blob", {"a": np.arange(3)})
    (tmp_path / "model.safetensors").symlink_to("blob")
    array = read_safetensors(tmp_path / "model.safetensors").tensors["a"].read()
    assert array.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_refused_or_read(tmp_path, seed):
    rng = random.Random(seed)
    data = written(tmp_path / "x", one_of_each(), {"format": "pt"}).read_bytes()
    header_size = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            place = rng.randrange(header_size)
            kind = rng.randrange(4)
            if kind == 0:
                damaged[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                damaged[place] = rng.choice(b'0123456789{}[]",:-.eE \\')
            elif kind == 2:
                del damaged[place : place + rng.randrange(1, 20)]
            else:
                damaged[place:place] = damaged[rng.randrange(header_size) :][: rng.randrange(1, 30)]
        path.write_bytes(damaged)
        text = outcome(path)
        refused += text is not None
        assert text is None or (str(path) in text and text.isprintable())
    assert 75 < refused < 150


def outcome(path: Path) -> str | None:
    """Reads all of a file; returns the message if it is refused."""
    try:
        for tensor in read_safetensors(path).tensors.values():
            assert tensor.read().shape == tensor.shape
    except InteropError as error:
        return str(error)
    return None


# ---- how it is written


def test_sizes_are_known_before_anything_is_written(tmp_path):
    arrays = one_of_each()
    writer = SafetensorsWriter(tmp_path / "x", described(arrays), {"format": "pt"})
    assert not (tmp_path / "x").exists()
    written(tmp_path / "x", arrays, {"format": "pt"})
    data = (tmp_path / "x").read_bytes()
    assert writer.nbytes == len(data)
    assert writer.header_size == 8 + int.from_bytes(data[:8], "little")
    assert writer.header_size % 8 == 0


def test_the_order_is_that_of_the_file(tmp_path):
    arrays = {"b": np.zeros(2, np.float32), "c": np.zeros(1), "a": np.zeros(3, np.float32)}
    writer = SafetensorsWriter(tmp_path / "x", described(arrays), {})
    assert writer.order == ("c", "a", "b")
    assert tuple(read_safetensors(written(tmp_path / "y", arrays)).tensors) == writer.order


def test_the_order_of_metadata_does_not_change_the_bytes(tmp_path):
    arrays = {"a": np.zeros(1)}
    first = written(tmp_path / "x", arrays, {"a": "1", "b": "2"}).read_bytes()
    assert written(tmp_path / "y", arrays, {"b": "2", "a": "1"}).read_bytes() == first


def test_threads_write_at_once(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((i, 700)) for i in range(60)}
    with (
        SafetensorsWriter(tmp_path / "x", described(arrays), {}) as writer,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda name: writer.write(name, arrays[name]), arrays))
    assert (tmp_path / "x").read_bytes() == written(tmp_path / "y", arrays).read_bytes()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    arrays = {"a": np.arange(1000.0), "b": random_array("BF16", (33,))}
    whole = written(tmp_path / "whole", arrays).read_bytes()
    pwrite, sizes = os.pwrite, []

    def short(handle: int, data: memoryview, position: int) -> int:
        sizes.append(len(data))
        return pwrite(handle, data[: max(1, len(data) // 3)], position)

    monkeypatch.setattr(module, "_CHUNK", 1001)
    monkeypatch.setattr(os, "pwrite", short)
    assert written(tmp_path / "x", arrays).read_bytes() == whole
    assert max(sizes) == 1001


def test_a_system_that_writes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        written(tmp_path / "x", {"a": np.zeros(3)})


def test_memory_is_bounded_by_one_tensor(tmp_path):
    tensor = Abstract((1 << 20,), np.dtype(np.float32))
    with SafetensorsWriter(tmp_path / "x", {f"{i}": tensor for i in range(16)}, {}) as writer:
        tracemalloc.start()
        for name in writer.order:
            writer.write(name, np.full(tensor.shape, int(name), np.float32))
        assert tracemalloc.get_traced_memory()[1] < 3 * tensor.nbytes
        tracemalloc.stop()
    tensors = read_safetensors(tmp_path / "x").tensors
    assert all(tensors[name].read()[[0, -1]].tolist() == [int(name)] * 2 for name in tensors)


def test_a_file_that_is_not_finished_is_none(tmp_path):
    arrays = {"a": np.ones(3), "b": np.ones(4)}
    writer = SafetensorsWriter(tmp_path / "x", described(arrays), {})
    writer.write("a", arrays["a"])
    with pytest.raises(ValueError, match="x is not finished: it lacks b"):
        writer.close()
    assert "a save that was not finished" in refusal(tmp_path / "x")
    with pytest.raises(ValueError, match="closed already"):
        writer.write("b", arrays["b"])
    with pytest.raises(ValueError, match="closed already"):
        writer.close()


def test_leaving_by_an_exception_does_not_finish(tmp_path):
    arrays = {"a": np.ones(3)}
    writer = SafetensorsWriter(tmp_path / "x", described(arrays), {})

    def interrupted() -> None:
        with writer:
            writer.write("a", arrays["a"])
            raise RuntimeError("the first")

    with pytest.raises(RuntimeError, match="the first"):
        interrupted()
    refusal(tmp_path / "x")
    with pytest.raises(ValueError, match="closed already"):
        writer.close()


def test_abort_and_close_leave_no_open_file(tmp_path):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for i, end in enumerate(["close", "abort"]):
        writer = SafetensorsWriter(tmp_path / f"{i}", described({"a": np.ones(1)}), {})
        writer.write("a", np.ones(1))
        assert count() == before + 1
        getattr(writer, end)()
        assert count() == before


def test_close_and_abort_after_close_do_nothing(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x", described({"a": np.ones(1)}), {})
    writer.write("a", np.ones(1))
    writer.close()
    writer.close()
    writer.abort()
    assert read_safetensors(tmp_path / "x").tensors["a"].read().tolist() == [1]


def test_closing_waits_for_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    written(tmp_path / "x", {"a": np.ones(1)})
    assert synced == [(tmp_path / "x").stat().st_ino]


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("h.0.wieght", np.zeros((2, 3), np.float32), r"h.0.wieght.*nearest present: h.0.weight"),
        ("h.0.weight", np.zeros((3, 2), np.float32), r"float32 \[3, 2\], announced as float32 \[2"),
        ("h.0.weight", np.zeros((6,), np.float32), r"\[6\]"),
        ("h.0.weight", np.zeros((2, 3)), r"float64 \[2, 3\], announced as float32"),
        ("h.0.weight", np.zeros((2, 3), ">f4"), r">f4"),
        ("h.0.weight", np.zeros((2, 3), np.int32), r"int32"),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path, name, array, words):
    announced = {"h.0.weight": Abstract((2, 3), np.dtype(np.float32))}
    writer = SafetensorsWriter(tmp_path / "x", announced, {})
    with pytest.raises(ValueError, match=words):
        writer.write(name, array)
    writer.write("h.0.weight", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="written twice"):
        writer.write("h.0.weight", np.zeros((2, 3), np.float32))
    writer.close()


def test_an_existing_file_is_not_touched(tmp_path):
    path = written(tmp_path / "x", {"a": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        written(path, {"a": np.zeros(3)})
    assert path.read_bytes() == before


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "x"
    for dtype in (np.complex64, ">f4", ml_dtypes.float8_e4m3fnuz, "U3"):
        with pytest.raises(DtypeError, match=f"'h.a' has dtype {np.dtype(dtype)}"):
            SafetensorsWriter(path, {"h.a": Abstract((1,), np.dtype(dtype))}, {})
    with pytest.raises(ValueError, match="__metadata__"):
        SafetensorsWriter(path, {"__metadata__": lazy(np.ones(1))}, {})
    with pytest.raises(ValueError, match="step"):
        SafetensorsWriter(path, {}, {"step": 3})
    with pytest.raises(ValueError, match="surrogates"):
        SafetensorsWriter(path, {"\ud800": lazy(np.ones(1))}, {})
    with pytest.raises(ValueError, match="more than the 100000000"):
        SafetensorsWriter(path, {"n" * 100_000_000: lazy(np.ones(1))}, {})
    assert not path.exists()


def test_a_limit_on_the_size_of_files_is_told(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError) as caught:
            written(tmp_path / "x", {"a": np.ones(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_told_and_leaves_no_file_that_reads(tmp_path, monkeypatch):
    pwrite = os.pwrite

    def full(handle: int, data: memoryview, position: int) -> int:
        if position > 5000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data[:1000], position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError) as caught:
        written(tmp_path / "x", {"a": np.ones(4000), "b": np.ones(4)})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    refusal(tmp_path / "x")
