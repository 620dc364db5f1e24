import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import interop
from craft_jax.data import tokenizers
from craft_jax.errors import CraftError
from interop import __main__ as cli
from interop.errors import NotRepresentableError, OutputExistsError, ParityError
from interop.files.safetensors import SafetensorsWriter
from interop.mapping.tensors import lazy, same_bits
from interop.sources.opening import open_source
from interop.targets.registry import TARGETS
from tests.conftest import environment
from tests.interop.models import DTYPES, SPECS, array, in_memory, make_run, spec

QUICK = {"probe": "none"}
TEXT = "the quick brown fox jumps over the lazy dog\n"
CASES = [
    (target, name, dtype)
    for name in ("plain", "untied", "no bias", "nanogpt, no bias", "twelve layers")
    for target in ("gpt2", "craft-torch", "nanogpt")
    for dtype in DTYPES
    if TARGETS[target].answer(spec(**SPECS[name])).exact
]
# The other targets share that machinery: each with every architecture, and one dtype.
CASES += [
    (target, name, "mixed" if dtypes_may_differ else "bfloat16")
    for target, dtypes_may_differ in (
        ("biogpt", True),
        ("opt", True),
        ("torch-encoder", False),
        ("torch-decoder", False),
        ("torch-transformer", False),
        ("craft-torch", True),
        ("craft-e", False),
        ("craft-f", False),
        ("craft-d", True),
        ("craft-d0", True),
        ("craft-c", False),
        ("craft-b", False),
    )
    for name in SPECS
    if ("craft" in name or "seq2seq" in name or "post" in name)
    and TARGETS[target].answer(spec(**SPECS[name])).exact
]
# By default through a run and a second export: every target, architecture and dtype, not every
# combination. All combinations are written and opened in `test_exports_open_again`,
# and mapped both ways in tests/interop/mapping/test_table.py.
BOTH_WAYS = {
    ("gpt2", "plain", "float32"),
    ("gpt2", "untied", "bfloat16"),
    ("gpt2", "no bias", "float16"),
    ("gpt2", "nanogpt, no bias", "mixed"),
    ("craft-torch", "nanogpt, no bias", "bfloat16"),
    ("nanogpt", "nanogpt, no bias", "mixed"),
    ("gpt2", "twelve layers", "mixed"),
    ("biogpt", "craft e", "mixed"),
    ("biogpt", "craft d, no bias, relu", "mixed"),
    ("opt", "post-norm, nothing after it", "mixed"),
    ("torch-encoder", "craft b, sinusoidal", "bfloat16"),
    ("torch-encoder", "craft e, no bias", "bfloat16"),
    ("torch-decoder", "craft f, post-norm", "bfloat16"),
    ("torch-transformer", "seq2seq", "bfloat16"),
    ("craft-torch", "seq2seq, post-norm, no bias, all apart", "mixed"),
    ("craft-e", "craft e, post-norm, relu", "bfloat16"),
    ("craft-f", "craft f", "bfloat16"),
    ("craft-f", "craft f, no bias", "bfloat16"),
    ("craft-d", "craft d", "mixed"),
    ("craft-d0", "craft d, no bias, relu", "mixed"),
    ("craft-c", "craft c", "bfloat16"),
    ("craft-b", "craft b", "bfloat16"),
}


def test_each_target_architecture_and_dtype_goes_both_ways_by_default():
    assert set(CASES) > BOTH_WAYS
    for column in range(3):
        assert {case[column] for case in BOTH_WAYS} == {case[column] for case in CASES}


def tree(folder):
    """The content of every file below a folder, or of a file."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_of(tmp_path, name="run", dtype="float32", tokenizer=None, **changes):
    return make_run(tmp_path / "models" / name, spec(**changes), dtype, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run, for tests that do not change it."""
    return run_of(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A run that nanoGPT can hold, for tests that do not change it."""
    return run_of(tmp_path_factory.mktemp("nano"), d_ff=192)


@pytest.mark.parametrize(("target", "name", "dtype"), CASES)
def test_exports_open_again(tmp_path, target, name, dtype):
    """The architecture and every bit."""
    known = spec(**SPECS[name])
    model = in_memory(known, dtype)
    done = interop.export_checkpoint(model, tmp_path / "a", target, **QUICK)
    again = open_source(done.out)
    assert again.kind == target and again.spec == known
    assert set(again.leaves) == set(model.leaves)
    for leaf, tensor in model.leaves.items():
        assert same_bits(tensor.read(), again.leaves[leaf].read()), leaf


@pytest.mark.parametrize(
    ("target", "name", "dtype"),
    [pytest.param(*case, marks=[] if case in BOTH_WAYS else pytest.mark.soak) for case in CASES],
)
def test_out_back_and_out_again(tmp_path, target, name, dtype):
    """Bit-identical in every leaf, and the second export is the first, byte for byte."""
    known = spec(**SPECS[name])
    model = in_memory(known, dtype)
    first = interop.export_checkpoint(model, tmp_path / "a", target, **QUICK)
    imported = tmp_path / "models" / "again"
    interop.import_checkpoint(first.out, imported)
    again = open_source(imported)
    assert again.spec == known
    for leaf, tensor in model.leaves.items():
        assert same_bits(tensor.read(), again.leaves[leaf].read()), leaf
    second = interop.export_checkpoint(imported, tmp_path / "b", target, **QUICK)
    made, remade = tree(first.out), tree(second.out)
    assert made == remade
    assert tree(interop.export_checkpoint(model, tmp_path / "c", target, **QUICK).out) == made


def test_bits_that_arithmetic_would_change(tmp_path):
    """NaN payloads, -0.0, subnormals and infinities survive."""
    known = spec(num_layers=1)
    run = make_run(tmp_path / "models" / "run", known)
    odd = np.array([0x7FC12345, 0xFF800001, 0x80000000, 1, 0x7F800000, 0xFF800000], np.uint32)
    model = open_source(run)
    name = "blocks.0.mlp.up.kernel"
    values = model.leaves[name].read().copy()
    values.reshape(-1)[:6] = odd.view(np.float32)
    changed = dataclasses.replace(model, leaves=model.leaves | {name: lazy(values)})
    done = interop.export_checkpoint(changed, tmp_path / "out", "gpt2", **QUICK)
    assert any("4 values are NaN or infinite" in note for note in done.notes)
    assert same_bits(array(tmp_path / "out", "transformer.h.0.mlp.c_fc.weight"), values)
    interop.import_checkpoint(tmp_path / "out", tmp_path / "models" / "back")
    assert same_bits(open_source(tmp_path / "models" / "back").leaves[name].read(), values)
    with pytest.raises(interop.InteropError, match="strict_finite"):
        interop.export_checkpoint(changed, tmp_path / "x", "gpt2", strict_finite=True, **QUICK)
    assert not (tmp_path / "x").exists()


def test_shards(plain, tmp_path):
    whole = interop.export_checkpoint(plain, tmp_path / "whole", "gpt2", **QUICK)
    for size in ("1", "20KB", "50000"):
        out = tmp_path / f"s{size}"
        done = interop.export_checkpoint(
            plain, out, "gpt2", max_shard_size=size, workers=4, **QUICK
        )
        assert len(list(out.glob("*.safetensors"))) > 1
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == done.plan.num_bytes
        assert interop.diff(whole.out, out) == []
    with pytest.raises(CraftError, match="max_shard_size"):
        interop.export_checkpoint(plain, tmp_path / "z", "gpt2", max_shard_size="0")


def test_the_number_of_threads_changes_nothing(plain, tmp_path):
    for workers in (1, 4):
        interop.export_checkpoint(plain, tmp_path / str(workers), "gpt2", workers=workers, **QUICK)
    assert tree(tmp_path / "1") == tree(tmp_path / "4")


def test_models_beyond_a_target_are_refused_with_reasons(tmp_path):
    run = run_of(tmp_path, activation="gelu_tanh", norm_eps=1e-6, d_ff=192)
    with pytest.raises(NotRepresentableError) as caught:
        interop.export_checkpoint(run, tmp_path / "x.pt", "nanogpt", **QUICK)
    text = str(caught.value)
    assert "activation=gelu_tanh" in text and "norm_eps=1e-06" in text
    assert "allow_approx=eps,gelu" in text and "exact targets: gpt2, craft-torch" in text
    with pytest.raises(NotRepresentableError, match="norm_eps"):
        interop.export_checkpoint(run, tmp_path / "x.pt", "nanogpt", allow_approx="gelu")
    done = interop.export_checkpoint(run, tmp_path / "x.pt", "nanogpt", allow_approx=True, **QUICK)
    assert not done.plan.is_exact and set(done.plan.approximations) == {"gelu", "eps"}
    assert interop.explain(run, "nanogpt") and not interop.explain(run, "gpt2")


def test_auto_takes_the_best_that_is_exact(plain):
    assert interop.plan(plain).target.name == "gpt2"
    exact = ["gpt2", "biogpt", "opt", "craft-torch", "torch-encoder", "torch-decoder"]
    assert [a.target for a in interop.targets_for(plain) if a.exact] == exact
    assert interop.plan(plain, "hf").target.name == "gpt2"


def test_a_plan_reads_no_array_and_writes_nothing(plain):
    model = open_source(plain)

    def forbidden():
        raise AssertionError("a plan reads no array")

    leaves = {n: dataclasses.replace(t, read=forbidden) for n, t in model.leaves.items()}
    made = interop.plan(dataclasses.replace(model, leaves=leaves), "gpt2")
    described = made.to_json()
    assert described["bytes"] == sum(t.nbytes for t in model.leaves.values())
    fused = described["tensors"]["transformer.h.0.attn.c_attn.weight"]
    assert fused["shape"] == [48, 144] and len(fused["from"]) == 3
    json.dumps(described)


def test_dtype_and_trimmed_rows_are_recorded(tmp_path):
    tokenizer = tokenizers.characters(TEXT, end_token=True)
    run = run_of(tmp_path, tokenizer=tokenizer)
    size = tokenizer.vocab_size
    out = tmp_path / "out"
    done = interop.export_checkpoint(run, out, "gpt2", dtype="bf16", trim_vocab=True, **QUICK)
    assert array(out, "transformer.wte.weight").shape == (size, 48)
    assert array(out, "transformer.wte.weight").dtype.name == "bfloat16"
    assert done.manifest["trimmed"]["rows"] == 97 - size and not done.plan.is_exact
    assert interop.verify(run, out).passed
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_padding_ids_are_never_generated(tmp_path):
    tokenizer = tokenizers.characters(TEXT, end_token=True)
    out = tmp_path / "out"
    interop.export_checkpoint(run_of(tmp_path, tokenizer=tokenizer), out, "gpt2", **QUICK)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(tokenizer.vocab_size, 97))
    assert generation["eos_token_id"] == tokenizer.end_id


def test_a_run_without_tokenizer_is_noted(tmp_path):
    done = interop.export_checkpoint(run_of(tmp_path), tmp_path / "out", "gpt2", **QUICK)
    assert any(note.startswith("tokenizer: the run has none") for note in done.notes)
    assert not list((tmp_path / "out").glob("tokenizer*"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] is None and config["bos_token_id"] is None


def test_nothing_is_overwritten_unless_asked(plain, tmp_path):
    out = tmp_path / "out"
    interop.export_checkpoint(plain, out, "gpt2", max_shard_size="20KB", **QUICK)
    before = tree(out)
    with pytest.raises(OutputExistsError, match="overwrite"):
        interop.export_checkpoint(plain, out, "gpt2", **QUICK)
    assert tree(out) == before
    interop.export_checkpoint(plain, out, "craft-torch", overwrite=True, **QUICK)
    # No shard of the earlier model may be left beside the new one.
    assert sorted(p.name for p in out.glob("model*")) == ["model.safetensors", "modeling_craft.py"]


@pytest.mark.parametrize("is_folder", [True, False])
def test_overwrite_replaces_models_and_nothing_else(tmp_path, is_folder):
    run = run_of(tmp_path, d_ff=192)
    target = "gpt2" if is_folder else "nanogpt"
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    for out in (work, work / "thesis.txt"):
        before = tree(work)
        with pytest.raises(OutputExistsError, match="not an earlier"):
            interop.export_checkpoint(run, out, target, overwrite=True, **QUICK)
        assert tree(work) == before
    for _ in range(2):
        interop.export_checkpoint(run, tmp_path / "out", target, overwrite=True, **QUICK)


@pytest.mark.parametrize("place", ["run", "run/inside", "."])
def test_the_source_is_never_written_to(tmp_path, place):
    run = run_of(tmp_path)
    before = tree(run)
    with pytest.raises(OutputExistsError):
        interop.export_checkpoint(run, tmp_path / "models" / place, "gpt2", overwrite=True, **QUICK)
    assert tree(run) == before


def test_read_back_compares_with_the_source(plain, tmp_path, monkeypatch):
    honest = SafetensorsWriter.write

    def careless(self, name, values):
        honest(self, name, values.T.copy().reshape(values.shape) if values.ndim == 2 else values)

    monkeypatch.setattr(SafetensorsWriter, "write", careless)
    with pytest.raises(ParityError, match="differ from the source"):
        interop.export_checkpoint(plain, tmp_path / "out", "gpt2", **QUICK)
    assert not (tmp_path / "out").exists()
    interop.export_checkpoint(plain, tmp_path / "out", "gpt2", verify="none", **QUICK)


def test_a_model_in_memory_a_checkpoint_and_a_run_are_the_same(tmp_path):
    run = run_of(tmp_path)
    model = interop.from_pretrained(run)
    sums = {
        interop.save_pretrained(source, tmp_path / str(i), target="gpt2", **QUICK).manifest[
            "model_sha256"
        ]
        for i, source in enumerate((run, str(run / "checkpoints" / "0"), model))
    }
    assert len(sums) == 1
    state = interop.to_state_dict(model, "gpt2")
    back = interop.from_state_dict(dict(state), model.config, "gpt2")
    for name, leaf in open_source(run).leaves.items():
        assert same_bits(leaf.read(), back[name])


def start(run, out, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "interop", "export", str(run), str(out), *words],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run whose export takes a while: 60 MB in many tensors."""
    known = spec(d_model=384, num_heads=6, d_ff=1536, num_layers=8, vocab_size=997)
    return make_run(tmp_path_factory.mktemp("large") / "models" / "run", known)


def test_killed_at_any_moment(large, tmp_path):
    """Either the old output or none, or the whole new one; the next export clears up."""
    out = tmp_path / "out"
    outcomes = set()
    for i in range(12):
        process = start(large, out, "--to", "craft-torch", "--probe", "none")
        time.sleep(0.25 + 0.06 * i)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        outcomes.add(out.exists())
        if out.exists():
            assert interop.verify(large, out).passed
            break
    assert False in outcomes
    done = start(large, out, "--to", "craft-torch", "--probe", "none", "--overwrite")
    done.communicate()
    assert done.returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(large, tmp_path, number, code):
    out = tmp_path / "out"
    process = start(large, out, "--to", "craft-torch")
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("out.tmp-*/model.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert "nothing was left behind" in said and list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow(large, tmp_path):
    """As on a full disk: exit 74, nothing left, the source as it was."""
    before = tree(large)
    process = subprocess.run(
        [
            "bash",
            "-c",
            f"ulimit -f 20000; exec {sys.executable} -m interop export {large} "
            f"{tmp_path / 'out'} --to gpt2 --probe none",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 74, process.stderr
    assert "File too large" in process.stderr and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == [] and tree(large) == before


@pytest.fixture(scope="module")
def large_folder(large, tmp_path_factory):
    """What the large run is for Hugging Face."""
    out = tmp_path_factory.mktemp("large_folder") / "out"
    return interop.export_checkpoint(large, out, "gpt2", **QUICK).out


@pytest.mark.parametrize(
    ("number", "code"),
    [
        # How SIGINT becomes an exit code, `test_stopped_by_a_signal` shows.
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak),
        (signal.SIGTERM, 143),
    ],
)
def test_an_import_is_stopped_by_a_signal(large_folder, tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "interop", "import", str(large_folder), str(tmp_path / "new")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    # While Orbax writes in threads of its own.
    while not list(tmp_path.glob("new.tmp-*/checkpoints/0/*/ocdbt*/d/*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert "nothing was left behind" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_import_onto_a_full_disk(large_folder, tmp_path):
    process = subprocess.run(
        ["bash", "-c", f"ulimit -f 1000; exec {sys.executable} -m interop import {large_folder} "
         f"{tmp_path / 'new'}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 74, process.stderr
    assert "File too large" in process.stderr and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_one_wins(large, tmp_path):
    out = tmp_path / "out"
    both = [start(large, out, "--to", "craft-torch", "--probe", "none") for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 73], said
    assert interop.verify(large, out).passed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_torch_transformers_and_jax(tmp_path):
    """Export and import of safetensors need none of what they are for."""
    run = run_of(tmp_path)
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        blocked = ("torch", "transformers", "safetensors", *sys.argv[1:])
        if name.partition(".")[0] in blocked:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from interop.__main__ import main
steps = [["export", {str(run)!r}, {str(tmp_path / "out")!r}, "--to", "hf", "--probe", "none"],
         ["verify", {str(run)!r}, {str(tmp_path / "out")!r}],
         ["inspect", {str(tmp_path / "out")!r}]]
if "jax" not in sys.argv:
    steps.append(["import", {str(tmp_path / "out")!r}, {str(tmp_path / "models" / "new")!r}])
for words in steps:
    assert main(words) == 0, words
"""
    for blocked in (["jax", "flax", "orbax"], []):
        done = subprocess.run(
            [sys.executable, "-c", code, *blocked],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if blocked:
            for path in sorted((tmp_path / "out").iterdir(), reverse=True):
                path.unlink()
            (tmp_path / "out").rmdir()


def test_the_command_line_in_words_and_as_json(nano, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(nano), str(out), "--to", "hf", "--json", "--probe=none"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["exact"] and shown["target"] == "gpt2" and shown["verified"] == "bits"
    assert cli.main(["targets", str(nano), "--json"]) == 0
    assert [row["target"] for row in json.loads(capsys.readouterr().out)] == list(TARGETS)
    assert cli.main(["export", str(nano), str(tmp_path / "x"), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "x").exists()
    assert cli.main(["inspect", str(out)]) == 0
    assert "transformer.wte.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export", "RUN", "OUT", "--to", "llama"], 2, "llama"),
        (["export", "RUN", "OUT", "--family", "llama"], 2, "llama"),
        (["export", "RUN", "OUT", "--with-optimizer"], 2, "--with-optimizer"),
        (["export", "RUN", "OUT", "--to", "hf-custom"], 2, "hf-custom"),
        (["export", "RUN", "OUT", "--verify", "some"], 2, "--verify=some"),
        (["export", "RUN", "OUT", "--probe", "some"], 2, "--probe=some"),
        (["export", "RUN", "OUT", "--dtype", "int8"], 2, "--dtype=int8"),
        (["export", "RUN", "OUT", "--workers", "0"], 2, "--workers: 0 must be"),
        (["import", "RUN", "OUT", "--workers=-1"], 2, "--workers: -1 must be"),
        (["export", "RUN", "OUT", "--max-memory", "x"], 2, "--max-memory"),
        (["export", "RUN", "OUT", "--trim-vocab"], 2, "--trim-vocab"),
        (["export", "RUN", "OUT.pt", "--to", "nanogpt", "--probe", "always"], 2, "one file"),
        (["export", "nowhere", "OUT"], 65, "no such file"),
        (["export", "RUN", "/dev/null/out"], 73, "/dev/null"),
        (["verify", "RUN", "RUN", "--level", "x"], 2, "--level=x"),
        (["import", "RUN", "OUT"], 2, "init_from"),
        (["export", "RUN", "OUT", "--from", "nope"], 2, "--from=nope"),
        (["export", "RUN", "OUT", "--n-head", "3"], 2, "--n-head"),
        (["export", "RUN", "OUT", "--config", "x.json"], 2, "--config"),
        (["export", "RUN", "OUT", "--ignore-keys", "*"], 2, "--ignore-keys"),
        (["export", "RUN", "OUT", "--allow-approx=foo"], 2, "--allow-approx=foo"),
        (["export", "RUN", "OUT", "--allow-approx="], 2, "--allow-approx="),
        (["export", "RUN", "O", "--to=nanogpt", "--max-shard-size=1KB"], 2, "one file"),
        (["export", "RUN", ""], 2, "out: is empty"),
        (["inspect", ""], 2, "path: is empty"),
        (["nonsense"], 2, "nonsense"),
        ([], 2, "COMMAND"),
    ],
)
def test_invalid_command_lines(nano, tmp_path, capsys, words, code, said):
    before = tree(nano)
    places = {"RUN": str(nano), "OUT": str(tmp_path / "out"), "OUT.pt": str(tmp_path / "o.pt")}
    assert cli.main([places.get(word, word) for word in words]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == [] and tree(nano) == before


@pytest.mark.parametrize(("stdout", "code"), [(">&-", 0), ("> /dev/full", 74), ("| head -c1", 0)])
def test_unwritable_standard_output(plain, stdout, code):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m interop inspect {plain} {stdout}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert code == 0 or "standard output" in done.stderr


def test_leftovers_are_not_mistaken_for_checkpoints(tmp_path):
    run = run_of(tmp_path)
    for path in ("checkpoints/0/params", "checkpoints/7", "checkpoints"):
        with pytest.raises(interop.InteropError) as caught:
            interop.export_checkpoint(run / path, tmp_path / "out", "gpt2")
        assert caught.value.exit_code == 65
    (run / "checkpoints" / ".8.tmp-12").mkdir()
    with pytest.raises(interop.InteropError, match="no finished checkpoint"):
        interop.export_checkpoint(run / "checkpoints" / ".8.tmp-12", tmp_path / "out", "gpt2")
    os.remove(run / "checkpoints" / "0" / "meta.json")
    with pytest.raises(interop.InteropError, match=r"damaged: meta.json is missing"):
        interop.export_checkpoint(run, tmp_path / "out", "gpt2")
    assert not (tmp_path / "out").exists()
