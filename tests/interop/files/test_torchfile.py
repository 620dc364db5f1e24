"""The formats of PyTorch files: whole ones are read, damaged and other ones are named."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from interop.errors import InteropError
from interop.files.torchfile import read_torch_file
from interop.mapping.tensors import LazyTensor, same_bits
from tests.interop.files.torch_files import (
    BOTH,
    MAGIC,
    Config,
    archive,
    calls,
    legacy,
    refused,
    some_arrays,
    tensor_pickle,
    unsafe,
    write,
)


@pytest.mark.torch
@BOTH
def test_names_of_the_same_memory_are_known(torch, tmp_path, new):
    a = torch.randn(4, 4)
    value = {
        "model": {"lm_head": a, "wte": a.view(4, 4), "row": a[0], "copy": a.clone()},
        "ema": [a.detach(), torch.nn.Parameter(a)],
        "transposed": a.T,
        "none": [torch.zeros(0), torch.zeros(0)],
    }
    torch.save(value, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    file = read_torch_file(tmp_path / "t.pt")
    [same] = [names for names in file.shared if "none.0" not in names]
    assert set(same) == {"model.lm_head", "model.wte", "ema.0", "ema.1"}
    model = file.value["model"]
    assert model["lm_head"].memory == model["wte"].memory
    assert model["lm_head"].memory != model["row"].memory
    assert model["lm_head"].memory != model["copy"].memory
    assert file.format == ("zip" if new else "legacy")


@pytest.mark.torch
@BOTH
def test_a_module_and_its_optimizer_are_plain_data(torch, tmp_path, new):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    value = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(3).get_state(),
        "step": 7,
    }
    torch.save(value, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    file = read_torch_file(tmp_path / "t.pt")
    assert file.dropped == ()
    assert type(file.value["model"]) is dict
    assert list(file.value["model"]) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert same_bits(file.value["model"][name].read(), tensor.numpy())
    group = file.value["optimizer"]["param_groups"][0]
    assert group == optimizer.state_dict()["param_groups"][0]
    moment = file.value["optimizer"]["state"][0]["exp_avg"]
    assert same_bits(moment.read(), optimizer.state_dict()["state"][0]["exp_avg"].numpy())
    assert file.value["step"] == 7
    assert file.value["numpy_rng"][0] == "MT19937"
    assert same_bits(file.value["numpy_rng"][1].read(), value["numpy_rng"][1])


@pytest.mark.torch
@BOTH
def test_a_whole_module_is_a_stub_with_its_tensors(torch, tmp_path, new):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    file = read_torch_file(tmp_path / "t.pt")
    assert file.value.name == "torch.nn.modules.linear.Linear"
    assert file.value.fields["_parameters"]["weight"].shape == (2, 3)
    assert file.dropped == ("the whole file: torch.nn.modules.linear.Linear",)


def test_the_oldest_rebuild_function_and_a_view_of_a_storage(tmp_path):
    array = np.arange(6, dtype=np.float32)
    pickled = (
        tensor_pickle(size=(2, 2), stride=(2, 1)).replace(b"_v2", b"").replace(b"\x89NtR.", b"tR.")
    )
    view = pickle.dumps(("viewed", 2, 4), 2)[2:-1]
    pickled = pickled.replace(b"tQ", view + b"tQ")
    path = legacy(tmp_path / "t.pt", None)
    head, _, _ = path.read_bytes().partition(pickle.dumps(None, 2) + pickle.dumps([], 2))
    data = struct.pack("<q", 6) + array.tobytes()
    path.write_bytes(head + pickled + pickle.dumps(["0"], 2) + data)
    assert read_torch_file(path).value.read().tolist() == [[2, 3], [4, 5]]


def test_a_view_that_leaves_its_storage_is_refused(tmp_path):
    view = pickle.dumps(("viewed", 3, 4), 2)[2:-1]
    pickled = tensor_pickle(size=(2, 2), stride=(2, 1)).replace(b"tQ", view + b"tQ")
    path = legacy(tmp_path / "t.pt", None)
    head, _, _ = path.read_bytes().partition(pickle.dumps(None, 2) + pickle.dumps([], 2))
    path.write_bytes(head + pickled + pickle.dumps(["0"], 2) + struct.pack("<q", 6) + bytes(24))
    assert "leaves it" in str(refused(path))


@pytest.mark.parametrize("extra", ["extra.pkl", "nested/deep.pkl"])
def test_other_pickles_in_the_archive_are_checked(tmp_path, marker, extra):
    evil, name = calls(marker)["system"]
    harmless = pickle.dumps({"a": 1}, 2)
    for protocol in range(6):
        record = {extra: pickle.dumps([Config(), evil], protocol)}
        unsafe(archive(tmp_path / "t.pt", harmless, record), name, marker)
    assert read_torch_file(archive(tmp_path / "t.pt", harmless, {extra: harmless})).value == {
        "a": 1
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("prefix", [b"", b"\x80\x02NR0", b"Ix\n0"])
def test_pickles_behind_damage_are_checked(tmp_path, marker, protocol, prefix):
    evil, name = calls(marker)["system"]
    pickled = prefix + pickle.dumps(["text", Config(), evil], protocol)
    if prefix == b"Ix\n0":
        refused(archive(tmp_path / "t.pt", pickled))
    else:
        unsafe(archive(tmp_path / "t.pt", pickled), name, marker)
    assert not marker.exists()


@pytest.mark.parametrize("member", ["pickle", "tensors", "storages", "sys_info", "x/data.pkl"])
def test_the_pickles_of_a_tar_archive_are_checked(tmp_path, marker, member):
    evil, name = calls(marker)["system"]
    path = tmp_path / "t.pt"
    for data in (pickle.dumps(evil, 2), pickle.dumps(1, 2) + pickle.dumps((1, evil), 2)):
        tar(path, {"pickle": pickle.dumps({}, 2), member: data})
        unsafe(path, name, marker)


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is an empty file (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer of 46 bytes"),
        (b"<!DOCTYPE html><html>", "is an HTML page (21 bytes)"),
        (b'{"model": 1}', "is JSON text (12 bytes)"),
        (b"Not found", "is text (9 bytes)"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "is a safetensors file (16 bytes)"),
        (b'\x80\x02\0\0\0\0\0\0{"a":1}' + b" " * 700, "is a safetensors file (715 bytes)"),
        (bytes(100), "is 100 bytes that start with zeros"),
        (b"\x1f\x8bxxxx", "is a gzip archive"),
        (b"\xd1\xd2\xd3\xd4", "is no PyTorch checkpoint (4 bytes)"),
        (b"PK\x03\x04 and no more", "is a truncated or damaged zip archive: 16 bytes"),
        (pickle.dumps({"a": 1}), "is a plain pickle, not a PyTorch checkpoint"),
        (pickle.dumps({"a": 1}, 0), "is a plain pickle, not a PyTorch checkpoint"),
        (pickle.dumps(MAGIC, 2), "is damaged or truncated"),
        (pickle.dumps(MAGIC, 2) + pickle.dumps(9, 2) + pickle.dumps({}, 2), "has another version"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_file_that_is_something_else(tmp_path, data, words):
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    assert words in str(refused(path))


def test_no_file_and_a_folder(tmp_path):
    assert "no such file" in str(refused(tmp_path / "none.pt"))
    assert "is a folder, not a file" in str(refused(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in str(refused(tmp_path / "pipe"))


def test_archives_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "t.pt"
    np.savez(tmp_path / "a.npz", w=np.zeros(3))
    assert "0 records */data.pkl, not a PyTorch checkpoint; it has w.npy" in str(
        refused(tmp_path / "a.npz")
    )
    script = {"constants.pkl": b"\x80\x02N.", "code/__torch__.py": b"pass"}
    assert "TorchScript" in str(refused(archive(path, b"\x80\x02N.", script)))
    tar(path, {name: pickle.dumps(0, 2) for name in ("pickle", "tensors", "storages")})
    assert "tar format of PyTorch before 0.1.10" in str(refused(path))
    tar(path, {"model.pt": b"x"})
    assert "tar archive (10240 bytes); unpack it first" in str(refused(path))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_named(torch, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "t.pt")
    assert "TorchScript" in str(refused(tmp_path / "t.pt"))


def test_zip_records_that_torch_does_not_write(tmp_path):
    path = tmp_path / "t.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
    assert "compressed record 'archive/data.pkl'" in str(refused(path))
    encrypted = bytearray(archive(path, b"\x80\x02N.").read_bytes())
    encrypted[encrypted.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    assert "encrypted record 'archive/data.pkl'" in str(refused(path))
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, b"\x80\x02N.", {"data.pkl": b"\x80\x02K\x01."})
    assert "two records 'archive/data.pkl'" in str(refused(path))
    assert "byte order b'big'" in str(refused(archive(path, b"\x80\x02N.", {"byteorder": b"big"})))
    assert read_torch_file(archive(path, b"\x80\x02N.", {"byteorder": b"little"})).value is None


def test_a_record_that_is_not_there(tmp_path):
    assert "lacks the record data/0" in str(refused(archive(tmp_path / "t.pt", tensor_pickle())))


def test_truncated_files_are_damage(tmp_path):
    data = write(tmp_path / "whole.pt", some_arrays()).read_bytes()
    path = tmp_path / "t.pt"
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        assert "zip archive" in str(refused(path)) or size < 4


@pytest.mark.torch
@BOTH
def test_truncated_files_of_torch_are_damage(torch, tmp_path, new):
    value = {"a": torch.randn(30, 4), "b": torch.randn(9).to(torch.bfloat16), "c": Config(x=1)}
    torch.save(value, tmp_path / "whole.pt", _use_new_zipfile_serialization=new)
    data = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "t.pt"
    for size in {*range(0, len(data), 97), *range(len(data) - 60, len(data))}:
        path.write_bytes(data[:size])
        refused(path)


def read_all(path: Path) -> None:
    """Reads a file and its tensors, or is refused."""
    try:
        todo = [read_torch_file(path).value]
    except InteropError:
        return
    while todo:
        one = todo.pop()
        if isinstance(one, LazyTensor):
            assert one.read().shape == one.shape
        elif isinstance(one, (dict, list, tuple)):
            todo += one.values() if isinstance(one, dict) else one


def flipped(data: bytes, span: range, count: int, seed: int) -> bytes:
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(count):
        damaged[rng.choice(span)] = rng.randrange(256)
    return bytes(damaged)


def span_of(data: bytes, part: bytes) -> range:
    start = data.index(part)
    return range(start, start + len(part))


def _seeds(count: int) -> list:
    """Chances to find what is not refused: a few whenever tests run, many in a soak."""
    return [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, count))]


@pytest.mark.parametrize("seed", _seeds(8))
def test_random_damage_is_refused_or_read(tmp_path, seed):
    path = write(tmp_path / "t.pt", some_arrays())
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        span = span_of(data, file.read("archive/data.pkl"))
    directory = range(data.index(b"PK\x01\x02"), len(data))
    tracemalloc.start()
    try:
        for i in range(200):
            where = directory if i % 4 == 3 else span
            path.write_bytes(flipped(data, where, 1 + i % 3, 1000 * seed + i))
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.torch
@pytest.mark.parametrize("seed", _seeds(4))
@pytest.mark.parametrize("protocol", [2, 4])
@BOTH
def test_random_damage_to_files_of_torch(torch, tmp_path, new, protocol, seed):
    tied = torch.randn(4, 4)
    value = {
        "model": collections.OrderedDict(a=tied, b=tied.T, c=tied),
        "config": Config(x=[1, 2]),
        "args": argparse.Namespace(y=np.float32(1)),
        "array": np.arange(4),
        "path": pathlib.Path("/a"),
        "set": {1, 2},
    }
    path = tmp_path / "t.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    span = range(len(data) - 80)
    if new:
        with zipfile.ZipFile(path) as file:
            span = span_of(data, file.read("t/data.pkl"))
    tracemalloc.start()
    try:
        for i in range(150):
            path.write_bytes(flipped(data, span, 1 + i % 3, 150 * seed + i))
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
