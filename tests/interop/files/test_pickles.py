"""Pickles: tensors are read to the bit, other values are plain or inert, and nothing runs."""

import argparse
import collections
import datetime
import enum
import pathlib
import pickle
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from interop.errors import CorruptFileError, DtypeError, InteropError, UnsafePickleError
from interop.files.pickles import Stub
from interop.files.torchfile import read_torch_file
from interop.mapping.tensors import DTYPES, LazyTensor, same_bits
from tests.interop.files.torch_files import (
    BOTH,
    MAGIC,
    TORCH_NAMES,
    Config,
    archive,
    calls,
    legacy,
    odd_bits,
    refused,
    tensor_pickle,
    unsafe,
)


class Colour(enum.Enum):
    RED = 1


class Slotted:
    """Pickles as a NEWOBJ with keywords, and a state of slots."""

    __slots__ = ("a",)

    def __getnewargs_ex__(self):
        return (1,), {"b": 2}


@pytest.mark.torch
@BOTH
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_to_the_bit(torch, tmp_path, name, new):
    array = odd_bits(DTYPES[name])
    flat = torch.from_numpy(array.view(np.uint8).copy())
    tensor = flat.view(getattr(torch, TORCH_NAMES[name]))
    torch.save({"t": tensor}, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    found = read_torch_file(tmp_path / "t.pt").value["t"]
    assert isinstance(found, LazyTensor)
    assert found.shape == array.shape
    assert found.dtype == DTYPES[name]
    assert same_bits(found.read(), array)


@pytest.mark.torch
@BOTH
def test_special_numbers_keep_their_bits(torch, tmp_path, new):
    words = [0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000]
    bits = np.array(words, np.uint32)
    tensor = torch.from_numpy(bits.view(np.int32).copy()).view(torch.float32)
    torch.save(tensor, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    found = read_torch_file(tmp_path / "t.pt").value.read()
    assert found.view(np.uint32).tolist() == words


@pytest.mark.torch
@BOTH
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[2:, 3:7],
        lambda t: t[::2, ::3],
        lambda t: t[1],
        lambda t: t[:, 1],
        lambda t: t[3, 5],
        lambda t: t.reshape(2, 3, 8).permute(2, 0, 1),
        lambda t: t[:0],
        lambda t: t[1:2],
        lambda t: t[0].expand(5, 8),
        lambda t: t.unfold(1, 3, 1),
        lambda t: t.unsqueeze(0).unsqueeze(-1),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_views_are_read_as_what_they_show(torch, tmp_path, view, dtype, new):
    shown = view(torch.arange(48).reshape(6, 8).to(getattr(torch, dtype)))
    torch.save({"t": shown}, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    found = read_torch_file(tmp_path / "t.pt").value["t"]
    array = found.read()
    assert found.shape == array.shape == tuple(shown.shape)
    assert array.flags.c_contiguous
    assert not array.flags.writeable
    assert array.dtype == found.dtype
    assert np.array_equal(array.astype(np.int64), shown.to(torch.int64).numpy())


@pytest.mark.torch
def test_contiguous_tensors_are_views_of_the_file(torch, tmp_path):
    torch.save(torch.arange(1000.0), tmp_path / "t.pt")
    tensor = read_torch_file(tmp_path / "t.pt").value
    assert np.shares_memory(tensor.read(), tensor.read())
    assert tensor.read().flags.aligned


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@BOTH
def test_plain_and_foreign_values(torch, tmp_path, protocol, new):
    slotted = Slotted()
    slotted.a = "slot"
    recursive = Config(name="gpt")
    recursive.parent = recursive
    slots = protocol > 3  # Before that, pickle needs functools.partial for such an object.
    value = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=1)),
        "space": types.SimpleNamespace(a=[1]),
        "path": pathlib.Path("/data/run"),
        "relative": pathlib.Path("a/b"),
        "windows": pathlib.PureWindowsPath("c:/x"),
        "numbers": (np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(2.5), 1 << 70, 1e300),
        "array": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "dtype": torch.bfloat16,
        "device": [torch.device("cuda:1"), torch.device("cpu")],
        "size": torch.Size([2, 3]),
        "sets": [{1, "a"}, frozenset({2})],
        "bytes": [b"\x00\xff", bytearray(b"xy")],
        "containers": [
            collections.OrderedDict(b=1, a=2),
            collections.defaultdict(list, {"k": [1]}),
            collections.Counter("aab"),
            collections.deque([1, 2], maxlen=5),
        ],
        "complex": 1 - 2j,
        "constants": [None, True, False, "é\ud800\U0001f600", ""],
        "keys": {1: "a", (1, 2): "b", None: "c"},
        "config": recursive,
        "colour": Colour.RED,
        "when": datetime.date(2020, 1, 2),
        "slotted": slotted if slots else None,
        "klass": Config,
    }
    path = tmp_path / "t.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    file = read_torch_file(path)
    found = file.value
    assert found["args"] == {"lr": 0.1, "nested": {"x": 1}}
    assert found["space"] == {"a": [1]}
    assert (found["path"], found["relative"]) == ("/data/run", "a/b")
    assert found["windows"] == "c:\\x"
    assert found["numbers"] == (1.5, -3, True, 2.5, 1 << 70, 1e300)
    assert [type(n) for n in found["numbers"]] == [float, int, bool, float, int, float]
    assert same_bits(found["array"].read(), np.ascontiguousarray(value["array"]))
    assert same_bits(found["big"].read(), np.arange(3, dtype=np.float32))
    assert found["dtype"] == "torch.bfloat16"
    assert found["device"] == ["cuda:1", "cpu"]
    assert found["size"] == (2, 3)
    assert type(found["size"]) is tuple
    assert found["sets"] == value["sets"]
    assert found["bytes"] == value["bytes"]
    assert found["containers"] == [{"b": 1, "a": 2}, {"k": [1]}, {"a": 2, "b": 1}, [1, 2]]
    assert {type(c) for c in found["containers"]} == {dict, list}
    assert found["complex"] == 1 - 2j
    assert found["constants"] == value["constants"]
    assert found["keys"] == value["keys"]
    config = found["config"]
    assert isinstance(config, Stub)
    assert config.name == "gone.away.Config"
    assert config.fields["name"] == "gpt"
    assert config.fields["parent"] is config
    assert found["colour"].args == (1,)
    if slots:
        assert found["slotted"].args == (1,)
        assert found["slotted"].fields == {"a": "slot", "b": 2}
    assert found["klass"].args is None
    notes = ["config: gone.away.Config", f"colour: {__name__}.Colour", "when: datetime.date"]
    assert file.dropped == (*notes, *([f"slotted: {__name__}.Slotted"] if slots else []))


@pytest.mark.torch
def test_parameters_and_subclasses_are_their_tensors(torch, tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    noted = torch.randn(2)
    noted.note = "an attribute"
    noted_parameter = torch.nn.Parameter(torch.randn(4))
    noted_parameter.note = "another"
    torch.save([parameter, noted, noted_parameter], tmp_path / "t.pt")
    found = read_torch_file(tmp_path / "t.pt").value
    for tensor, original in zip(found, (parameter, noted, noted_parameter), strict=True):
        assert same_bits(tensor.read(), original.detach().numpy())


@pytest.mark.torch
@BOTH
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda torch: torch.zeros(2, dtype=torch.complex64), "complexfloat"),
        (lambda torch: torch.eye(2).to_sparse(), "sparse"),
        (lambda torch: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda torch: torch.zeros(2, device="meta"), "meta"),
        (lambda torch: torch.zeros(4).to(torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
        (lambda torch: torch.ones(2, dtype=torch.complex64).conj(), "complexfloat"),
        (lambda torch: torch.ones(2, dtype=torch.cfloat).conj().imag, "negative"),
        (lambda torch: torch.ones(2).untyped_storage(), "storage"),
    ],
    ids=["complex", "sparse", "quantised", "meta", "float8", "conj", "neg", "storage"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_a_dense_real_array_are_refused_by_name(torch, tmp_path, make, word, new):
    value = {"model": {"odd.weight": make(torch)}}
    torch.save(value, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(DtypeError, match=word) as caught:
        read_torch_file(tmp_path / "t.pt")
    assert "'model.odd.weight'" in str(caught.value)
    assert str(tmp_path / "t.pt") in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_reads_objects(tmp_path, protocol):
    value = {
        "config": Config(a=1),
        "args": argparse.Namespace(x=2),
        "any": [1.5, -7, 1 << 40, "text\n", None, True, (), [], {}, (1,), {1}],
        "ordered": collections.OrderedDict(a=1),
    }
    for path in (
        archive(tmp_path / "zip.pt", pickle.dumps(value, protocol)),
        legacy(tmp_path / "legacy.pt", value, protocol),
    ):
        found = read_torch_file(path).value
        assert found["config"].fields == {"a": 1}
        assert found["args"] == {"x": 2}
        assert found["any"] == value["any"]
        assert found["ordered"] == {"a": 1}


def test_a_kind_of_dict_or_list_keeps_its_items(tmp_path):
    pickled = (
        b"\x80\x02]q\x00(ceasy.dict\nEasyDict\n)\x81q\x01(X\x01\x00\x00\x00aK\x01u}X\x01\x00\x00"
        b"\x00bK\x02sb" + b"clists\nMyList\n)\x81(K\x03K\x04ee."
    )
    first, second = read_torch_file(archive(tmp_path / "t.pt", pickled)).value
    assert first.fields == {"a": 1, "b": 2}
    assert second.elements == [3, 4]


def test_names_of_python_2_are_known(tmp_path):
    pickled = b"c__builtin__\nset\n((lp0\nI1\natR."
    assert read_torch_file(archive(tmp_path / "t.pt", pickled)).value == {1}


KINDS = list(calls(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(6))
def test_nothing_runs(tmp_path, marker, kind, protocol):
    evil, name = calls(marker)[kind]
    if kind == "loads" and protocol < 3:
        name = "pickle.loads"  # What old protocols call it.
    for value in (evil, {"model": {"w": [evil]}}, Config(x=evil), {"safe": 1, "x": (evil,)}):
        pickled = pickle.dumps(value, protocol)
        (tmp_path / "raw.bin").write_bytes(pickled)
        unsafe(tmp_path / "raw.bin", name, marker)
        unsafe(archive(tmp_path / "zip.pt", pickled), name, marker)
        unsafe(legacy(tmp_path / "legacy.pt", value, protocol), name, marker)


def test_the_pickles_of_these_tests_do_run(marker):
    evil, _ = calls(marker)["system"]
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()


@pytest.mark.torch
@BOTH
def test_saved_objects_do_not_run(torch, tmp_path, marker, new):
    evil, name = calls(marker)["system"]
    value = {"model": {"w": torch.zeros(3)}, "x": evil}
    torch.save(value, tmp_path / "t.pt", _use_new_zipfile_serialization=new)
    unsafe(tmp_path / "t.pt", name, marker)


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"(S'touch {}'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch {}'\no.", "os.system"),
        (b"cos\nsystem\n(S'touch {}'\ntR.", "os.system"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", "os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x01x\x85R.", "os.system"),
        (b"\x80\x04\x8c\x03foo\x8c\x0bBar.__new__\x93.", "foo.Bar.__new__"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0bos.__name__\x93.", "numpy.os.__name__"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.", "os.system"),
        (b"\x80\x02\x82\x01.", "copyreg.extension_1"),
        (b"\x80\x02\x83\x01\x02.", "copyreg.extension_513"),
        (b"\x80\x02\x84\x01\x00\x00\x01.", "copyreg.extension_16777217"),
        (b"ctorch\nload\n(S'x'\ntR.", "torch.load"),
        (b"ctorch.hub\nload\n(S'x'\ntR.", "torch.hub.load"),
        (b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", "torch.storage._load_from_bytes"),
        (b"ctorch.jit\nScriptModule\n.", "torch.jit.ScriptModule"),
        (
            b"ctorch.utils.cpp_extension\nBuildExtension\n.",
            "torch.utils.cpp_extension.BuildExtension",
        ),
        (b"cnumpy.testing\nTestCase\n.", "numpy.testing.TestCase"),
        (b"cthird.party\nfunction\n.", "third.party.function"),
        (b"crunpy\nrun_path\n.", "runpy.run_path"),
        (b"cimportlib\nimport_module\n.", "importlib.import_module"),
        (b"ccode\nInteractiveInterpreter\n.", "code.InteractiveInterpreter"),
        (b"cctypes\nCDLL\n.", "ctypes.CDLL"),
        (b"cnt\nsystem\n.", "nt.system"),
        (b"c\nEval\n.", ".Eval"),
    ],
)
def test_every_way_to_name_a_function_is_detected(tmp_path, marker, pickled, name):
    pickled = pickled.replace(b"{}", str(marker).encode())
    unsafe(archive(tmp_path / "t.pt", pickled), name, marker)
    (tmp_path / "t.bin").write_bytes(pickled)
    unsafe(tmp_path / "t.bin", name, marker)


def test_an_allowed_name_is_a_stub_and_is_not_run(tmp_path, marker):
    evil, name = calls(marker)["system"]
    for path in (
        archive(tmp_path / "zip.pt", pickle.dumps({"x": evil})),
        legacy(tmp_path / "legacy.pt", {"x": evil}),
    ):
        file = read_torch_file(path, [name])
        assert isinstance(file.value["x"], Stub)
        assert file.value["x"].args == (f"touch {marker}",)
        assert file.dropped == ("x: posix.system",)
        assert not marker.exists()
        with pytest.raises(UnsafePickleError):
            read_torch_file(path, ["os.system", "posix", "system"])


def test_reading_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = archive(tmp_path / "t.pt", b"\x80\x02cloud\nLoud\n)\x81.")
    assert read_torch_file(path).value.name == "loud.Loud"
    assert "loud" not in sys.modules


def test_a_state_cannot_change_the_reader(tmp_path):
    hostile = {"__class__": 1, "__setstate__": 2, "args": 3, "__init__": 4}
    state = pickle.dumps((None, hostile), 2)[2:-1]
    path = archive(tmp_path / "t.pt", b"\x80\x02ca.b\nThing\n" + state + b"b)\x81" + state + b"b.")
    with pytest.raises(CorruptFileError):  # The class itself had a state, and became no function.
        read_torch_file(archive(tmp_path / "u.pt", b"\x80\x02ccollections\nOrderedDict\n)R)R."))
    stub = read_torch_file(path).value
    assert (stub.name, stub.args) == ("a.b.Thing", ())
    assert stub.state == (None, hostile)
    assert Stub("x").args is None


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02K\x01)R.",
        b"\x80\x02ca\nB\n)R)R.",
        b"\x80\x02]K\x01b.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02h\x07.",
        b"\x80\x02t.",
        b"\x80\x02.",
        b"\x80\x020.",
        b"\x80\x05\x97.",
        b"\x80\x02K\x01Q.",
        b"P1\n.",
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02cbuiltins\nbytes\nK\x01K\x01",
        b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f\x01.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f\x01.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        b"\x80\x02}" + b"N\x85" * 100_000 + b"K\x01s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02ctorch\nFloatStorage\nR.",
        b"\x80\x02ctorch\nSize\n(K\x01J\xff\xff\xff\xfft\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR.",
        b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00O8tRcnumpy._core.multiarray\nscalar\nh\x00R.",
    ],
    ids=range(27),
)
def test_senseless_pickles_are_damage(tmp_path, pickled):
    tracemalloc.start()
    try:
        refused(archive(tmp_path / "t.pt", pickled))
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: (n, "x")], ids=["plain", "tuple"])
def test_a_number_too_long_to_print_is_a_key(tmp_path, wrap):
    number = 1 << 20_000
    value = {wrap(number): [Config()], "protocol": number}
    file = read_torch_file(archive(tmp_path / "t.pt", pickle.dumps(value, 2)))
    assert file.dropped == ("(a large number).0: gone.away.Config",)
    assert file.value["protocol"] == number
    parts = (MAGIC, number, {})
    (tmp_path / "t.pt").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    assert "another version" in str(refused(tmp_path / "t.pt"))
    refused(archive(tmp_path / "t.pt", tensor_pickle(numel=number), {"data/0": bytes(24)}))


def test_a_long_index_does_not_fill_memory(tmp_path):
    path = archive(tmp_path / "t.pt", b"\x80\x02K\x07r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.")
    tracemalloc.start()
    try:
        assert read_torch_file(path).value == (7, 7)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_bombs_are_damage(tmp_path):
    layers = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    doubled = b"\x80\x02]" + layers + b"."
    key = b"\x80\x02}K\x01" + layers + b"K\x01s."
    many = b"".join(b"h\x00\x85R" + b"0cbuiltins\nlist\n" for _ in range(2000))
    copies = b"\x80\x02](" + b"K\x01" * 50_000 + b"eq\x000cbuiltins\nlist\n" + many + b"."
    for pickled in (doubled, key, copies):
        tracemalloc.start()
        try:
            refused(archive(tmp_path / "t.pt", pickled))
            assert tracemalloc.get_traced_memory()[1] < 400e6
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"numel": 5},
        {"numel": 7},
        {"numel": -6},
        {"numel": 1 << 62},
        {"numel": 1 << 200},
        {"numel": "6"},
        {"numel": True},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 61},
        {"offset": 1.0},
        {"size": (3, 3)},
        {"size": (-1, 3)},
        {"size": (1 << 40, 1 << 40)},
        {"size": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"size": (1 << 62,) * 3, "stride": (0,) * 3},
        {"size": (True, 3)},
        {"size": [2, 3]},
        {"size": (2, 3, 1)},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"stride": (4, 1)},
        {"stride": (-3, 1)},
        {"stride": (1 << 61, 1)},
        {"stride": None},
        {"kind": "DoubleStorage"},
        {"kind": "NoStorage"},
    ],
    ids=str,
)
def test_sizes_that_leave_the_storage(tmp_path, changes):
    path = tmp_path / "t.pt"
    whole = {"data/0": np.arange(6, dtype=np.float32).tobytes()}
    assert read_torch_file(archive(path, tensor_pickle(), whole)).value.read().sum() == 15
    archive(path, tensor_pickle(**changes), whole)
    tracemalloc.start()
    try:
        with pytest.raises(InteropError) as caught:
            read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    names_unknown_class = changes.get("kind") == "NoStorage"
    assert isinstance(caught.value, UnsafePickleError if names_unknown_class else CorruptFileError)
