"""PyTorch files that are written here: torch reads them, and no half of one looks whole."""

import collections
import os
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from interop.files.pickles import StoredTensor
from interop.files.torch_writer import Placeholder, TorchFileWriter
from interop.files.torchfile import read_torch_file
from interop.mapping.tensors import DTYPES, Abstract, same_bits
from tests.interop.files.torch_files import (
    TORCH_NAMES,
    abstracts,
    odd_bits,
    refused,
    some_arrays,
    write,
)


def test_written_files_are_read_back(tmp_path):
    value = {
        "model": collections.OrderedDict(
            a=Placeholder("w", Abstract((2, 3), np.dtype(np.float32))),
            b=Placeholder("w", Abstract((2, 3), np.dtype(np.float32))),
        ),
        "config": {"n": 1, "big": [1 << 31, -(1 << 31), -(1 << 31) - 1, 1 << 200, -1], 3: "three"},
        "plain": (1.5, float("inf"), None, True, False, "é\ud800", [], {}, ()),
    }
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    with TorchFileWriter(tmp_path / "t.pt", value) as writer:
        assert writer.keys == ("w",)
        writer.write("w", array)
    file = read_torch_file(tmp_path / "t.pt")
    assert file.shared == (("model.a", "model.b"),)
    assert file.dropped == ()
    assert isinstance(file.value["model"]["a"], StoredTensor)
    assert same_bits(file.value["model"]["b"].read(), array)
    assert file.value["config"] == value["config"]
    assert file.value["plain"] == value["plain"]


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_every_dtype_to_the_bit(torch, tmp_path, mmap):
    arrays = {name: odd_bits(dtype) for name, dtype in DTYPES.items()}
    arrays |= {
        "scalar": np.array(-0.0, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "one": np.ones((1, 1, 1), np.int8),
        "transposed": np.arange(12.0).reshape(3, 4).T,
    }
    path = write(tmp_path / "t.pt", arrays)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        tensor = loaded[name]
        kind = TORCH_NAMES.get(name, str(array.dtype))
        assert tensor.dtype == getattr(torch, kind)
        assert tuple(tensor.shape) == array.shape
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        found = tensor.reshape(-1).view(torch.uint8).numpy()
        assert found.tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [True, False])
def test_tied_names_are_one_storage_in_torch(torch, tmp_path, mmap):
    place = Placeholder("w", Abstract((3, 2), np.dtype(np.float32)))
    other = Placeholder("v", Abstract((3, 2), np.dtype(np.float32)))
    value = collections.OrderedDict(a=place, b=other, c=place)
    with TorchFileWriter(tmp_path / "t.pt", value) as writer:
        for key in writer.keys:
            writer.write(key, np.full((3, 2), len(key), np.float32))
    loaded = torch.load(tmp_path / "t.pt", weights_only=True, mmap=mmap)
    assert type(loaded) is collections.OrderedDict
    assert loaded["a"].data_ptr() == loaded["c"].data_ptr() != loaded["b"].data_ptr()
    assert loaded["a"] is not loaded["c"]
    with zipfile.ZipFile(tmp_path / "t.pt") as file:
        stored = [n for n in file.namelist() if n.startswith("archive/data/")]
    assert stored == ["archive/data/0", "archive/data/1"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_torch_reads_plain_values_and_any_map_location(torch, tmp_path):
    value = {
        "w": Placeholder("w", Abstract((2,), np.dtype(np.float32))),
        "plain": [1 << 40, -(1 << 70), 1.5, None, True, "é", (1, [2]), {}],
    }
    with TorchFileWriter(tmp_path / "t.pt", value, name="gpt2") as writer:
        writer.add_record("manifest.json", b'{"a": 1}')
        writer.write("w", np.ones(2, np.float32))
    for options in ({"weights_only": True}, {"weights_only": False}, {"map_location": "meta"}):
        loaded = torch.load(tmp_path / "t.pt", **options)
        assert loaded["plain"] == value["plain"]
        assert loaded["w"].shape == (2,)
    with zipfile.ZipFile(tmp_path / "t.pt") as file:
        assert file.read("gpt2/manifest.json") == b'{"a": 1}'


@pytest.mark.parametrize("limit", [None, 40])
def test_records_are_whole_and_aligned(tmp_path, limit, monkeypatch):
    if limit:  # As if every record were larger than 4 GiB.
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = some_arrays()
    path = write(tmp_path / "t.pt", arrays, name="a_long_name_for_a_folder")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        names = file.namelist()
        for entry in file.infolist():
            header = data[entry.header_offset : entry.header_offset + 30]
            begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            assert begin % 64 == 0
            assert data[begin : begin + entry.file_size] == file.read(entry)
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.compress_type == zipfile.ZIP_STORED
        if limit:
            assert b"\x01\x00\x10\x00" in data  # The extra field of zip64.
    root = "a_long_name_for_a_folder"
    records = ["data.pkl", "byteorder", *(f"data/{i}" for i in range(len(arrays))), "version"]
    assert names == [f"{root}/{record}" for record in records]
    found = read_torch_file(path).value
    assert all(same_bits(found[key].read(), arrays[key]) for key in arrays)


@pytest.mark.torch
def test_torch_reads_zip64(torch, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 40)
    arrays = some_arrays()
    path = write(tmp_path / "t.pt", arrays)
    for mmap in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert np.array_equal(loaded["wte.weight"].numpy(), arrays["wte.weight"])


def test_the_same_input_gives_the_same_bytes(tmp_path, monkeypatch):
    first = write(tmp_path / "a.pt", some_arrays()).read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert write(tmp_path / "b.pt", some_arrays()).read_bytes() == first


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("b", np.zeros(3, np.float32)),
        ("c", np.zeros(3, np.float32)),
        ("a", np.zeros(4, np.float32)),
        ("a", np.zeros((3, 1), np.float32)),
        ("a", np.zeros(3, np.float64)),
        ("a", np.zeros(3, ">f4")),
        ("a", np.zeros(3, np.int32)),
    ],
)
def test_write_wants_the_next_array(tmp_path, key, array):
    places = {k: Placeholder(k, Abstract((3,), np.dtype(np.float32))) for k in "ab"}
    writer = TorchFileWriter(tmp_path / "t.pt", places)
    with pytest.raises(ValueError, match=key):
        writer.write(key, array)
    writer.write("a", np.zeros(3, np.float32))
    writer.write("b", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="None"):
        writer.write("b", np.zeros(3, np.float32))
    writer.close()
    assert len(read_torch_file(tmp_path / "t.pt").value) == 2


def test_a_file_that_was_not_finished_does_not_load(tmp_path):
    path = tmp_path / "t.pt"
    places = abstracts(some_arrays())
    writer = TorchFileWriter(path, places)

    def interrupted() -> None:
        with writer:
            writer.write("wte.weight", some_arrays()["wte.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "zip archive" in str(refused(path))
    with pytest.raises(ValueError, match=r"5 arrays were not written: wte\.weight, bias"):
        TorchFileWriter(path, places).close()
    assert "zip archive" in str(refused(path))
    writer.close()
    writer.abandon()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    path = tmp_path / "t.pt"
    array = np.zeros(1 << 20, np.float32)
    writer = TorchFileWriter(path, abstracts({"a": array}))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        writer.write("a", array)
    writer.abandon()
    refused(path)


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "version", "data/0", "constants.pkl"])
def test_extra_records_cannot_take_the_place_of_torchs(tmp_path, name):
    with TorchFileWriter(tmp_path / "t.pt", {}) as writer:
        with pytest.raises(ValueError, match=name):
            writer.add_record(name, b"")
        writer.add_record("mine", b"")
        with pytest.raises(ValueError, match="mine"):
            writer.add_record("mine", b"")
    assert read_torch_file(tmp_path / "t.pt").value == {}


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", np.float32(1), 1j, ...], ids=repr)
def test_values_other_than_plain_data_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match=r"config\.1.*is no plain data"):
        TorchFileWriter(tmp_path / "t.pt", {"config": [0, value]})
    assert not (tmp_path / "t.pt").exists()


def test_placeholders_must_agree_and_exist_in_torch(tmp_path):
    one, two = (Placeholder("w", Abstract((n,), np.dtype(np.float32))) for n in (1, 2))
    with pytest.raises(ValueError, match="two shapes or dtypes"):
        TorchFileWriter(tmp_path / "t.pt", [one, two])
    odd = Placeholder("w", Abstract((1,), np.dtype(np.complex64)))
    with pytest.raises(ValueError, match="complex64, which PyTorch lacks"):
        TorchFileWriter(tmp_path / "t.pt", [odd])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_bounded_by_one_tensor(tmp_path):
    script = """
        import re, sys, threading, time
        import numpy as np
        from interop.files.torch_writer import Placeholder, TorchFileWriter
        from interop.files.torchfile import read_torch_file
        from interop.mapping.tensors import Abstract

        def anonymous():
            status = open("/proc/self/status").read()
            return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) / 1024

        peaks, stop = [0.0], threading.Event()
        def sample():
            while not stop.wait(0.001):
                phase = len(peaks) - 1  # Before the sample: it never counts for a later phase.
                peaks[phase] = max(peaks[phase], anonymous())

        shape = (25_000_000,)  # 100 MB
        place = {k: Placeholder(k, Abstract(shape, np.dtype(np.float32))) for k in "abc"}
        start = anonymous()
        thread = threading.Thread(target=sample)
        thread.start()
        with TorchFileWriter(sys.argv[1], place) as writer:
            for i, key in enumerate(writer.keys):
                writer.write(key, np.full(shape, i, np.float32))
        peaks.append(0.0)
        value = read_torch_file(sys.argv[1]).value
        total = sum(float(tensor.read().max()) for tensor in value.values())
        stop.set()
        thread.join()
        print(peaks[0] - start, peaks[1] - start, total)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "t.pt")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    written, read, total = map(float, run.stdout.split())
    assert total == 3
    assert 90 < written < 200  # One array of 100 MB, and less than another.
    assert read < 50
