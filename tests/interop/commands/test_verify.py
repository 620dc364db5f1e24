import importlib.util
import json
import os
import re
import shutil

import numpy as np
import pytest

import interop
from craft_jax.data import tokenizers
from interop import __main__ as cli
from interop.errors import InteropError, MissingDependencyError, ParityError
from tests.interop.models import SPECS, flip, in_memory, make_run, spec
from tests.interop.proofs import prove, prove_alone

QUICK = {"probe": "none"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, and what it is in every target."""
    place = tmp_path_factory.mktemp("exported")
    tokenizer = tokenizers.characters("the quick brown fox\n", end_token=True)
    known = spec(num_layers=2, d_ff=192)
    found = {"run": make_run(place / "models" / "run", known, tokenizer=tokenizer)}
    for target in ("gpt2", "nanogpt", "craft-torch"):
        out = place / (f"{target}.pt" if target == "nanogpt" else target)
        probe = {} if target != "nanogpt" else QUICK
        found[target] = interop.export_checkpoint(found["run"], out, target, **probe).out
    return found


@pytest.fixture
def copied(exported, tmp_path):
    """Copies what may be changed."""

    def copy(target):
        out = tmp_path / exported[target].name
        if exported[target].is_dir():
            return shutil.copytree(exported[target], out)
        return shutil.copy(exported[target], out)

    return copy


@pytest.mark.torch
@pytest.mark.parametrize("level", ["structure", "bits", "logits", "generate"])
@pytest.mark.parametrize("target", ["gpt2", "nanogpt", "craft-torch"])
def test_every_level_passes(exported, target, level):
    report = interop.verify(exported["run"], exported[target], level)
    assert report.passed, report.problems
    json.dumps(report.to_json())
    if level == "logits":
        assert report.figures["tokens"] == [2, 33] and report.figures["largest"] < 1e-12


@pytest.mark.torch
@pytest.mark.own_process
def test_torch_has_a_process_of_its_own(exported, copied):
    """And what goes wrong there is told."""
    report = interop.verify(exported["run"], exported["craft-torch"], "logits")
    assert report.passed and report.figures["largest"] < 1e-12
    out = copied("craft-torch")
    (out / "modeling_craft.py").write_text("import os\nraise RuntimeError(f'of {os.getpid()}')\n")
    with pytest.raises(InteropError, match=r"PyTorch cannot run .*: RuntimeError: of \d+$") as told:
        interop.verify(exported["run"], out, "structure")
    assert not str(told.value).endswith(f" {os.getpid()}")
    assert not list(out.glob("__pycache__"))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("target", "name", "level"),
    [
        ("biogpt", "craft e", "logits"),
        ("opt", "post-norm, nothing after it", "logits"),
        ("torch-encoder", "craft e, post-norm, relu", "logits"),
        ("torch-decoder", "craft c", "generate"),
        ("torch-transformer", "seq2seq", "logits"),
        ("torch-transformer", "seq2seq, post-norm, no bias, all apart", "generate"),
        ("craft-torch", "seq2seq", "logits"),
        ("craft-d", "craft d", "structure"),
        ("craft-f", "craft f", "logits"),
    ],
)
def test_the_other_targets(tmp_path, target, name, level):
    model = in_memory(spec(**SPECS[name]))
    out = interop.export_checkpoint(model, tmp_path / "out", target, **QUICK).out
    report = interop.verify(model, out, level)
    assert report.passed, report.problems
    if level == "logits":
        assert report.figures["largest"] < 1e-12


@pytest.mark.torch
def test_a_folder_of_an_encoder_decoder_proves_itself(tmp_path):
    known = spec(**SPECS["seq2seq"])
    out = interop.export_checkpoint(in_memory(known), tmp_path / "out", "craft-torch").out
    done = prove(out)
    assert done.returncode == 0 and "logits agree" in done.stdout, done.stderr
    imported = interop.import_checkpoint(out, tmp_path / "models" / "again")
    assert imported.probe > 97
    probe = json.loads((out / "probe.json").read_text())
    probe["source"][0] = (probe["source"][0] + 1) % 97
    (out / "probe.json").write_text(json.dumps(probe))
    with pytest.raises(ParityError, match="differ by"):
        interop.import_checkpoint(out, tmp_path / "models" / "other")


def test_two_targets_without_the_run(exported):
    assert interop.verify(exported["gpt2"], exported["nanogpt"]).passed
    assert interop.diff(exported["craft-torch"], exported["gpt2"]) == []


def test_one_flipped_bit_names_the_tensor(exported, copied, capsys):
    out = copied("gpt2")
    flip(out / "model.safetensors", "transformer.h.1.attn.c_attn.weight")
    assert cli.main(["verify", str(exported["run"]), str(out)]) == 70
    shown = capsys.readouterr().out
    assert "blocks.1.attn.value.kernel" in shown and "transformer.h.1.attn.c_attn.weight" in shown
    assert "1 of 2304 values" in shown
    (row,) = interop.diff(exported["run"], out)
    assert row["count"] == 1 and row["first"] == (47, 47)


def test_any_flipped_byte_of_any_tensor_is_detected(exported, copied, rng):
    out = copied("craft-torch")
    file = out / "model.safetensors"
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in rng.integers(begin, len(whole), 40):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        assert not interop.verify(exported["run"], out).passed
    file.write_bytes(whole)
    assert interop.verify(exported["run"], out).passed


def test_a_changed_config_is_detected(exported, copied):
    out = copied("gpt2")
    edit(out / "config.json", layer_norm_epsilon=1e-6)
    for level in ("structure", "bits"):
        report = interop.verify(exported["run"], out, level)
        assert not report.passed and "norm_eps is 1e-05 and 1e-06" in report.summary


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# What is wrong, and the submodule that must be named.
BROKEN = {
    "epsilon": ("gpt2", {"layer_norm_epsilon": 1e-6}, "blocks.0.attn_norm"),
    "activation": ("gpt2", {"activation_function": "gelu_new"}, "blocks.0.mlp "),
    "heads": ("gpt2", {"n_head": 8}, "blocks.0.attn "),
    "a norm": ("gpt2", "transformer.h.1.ln_2.bias", "blocks.1.mlp_norm"),
    "attention": ("craft-torch", "blocks.1.attn.out.kernel", "blocks.1.attn "),
    "the MLP": ("craft-torch", "blocks.0.mlp.down.bias", "blocks.0.mlp "),
    "the last norm": ("gpt2", "transformer.ln_f.weight", "final_norm"),
    "positions": ("gpt2", "transformer.wpe.weight", "position_embedding"),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", BROKEN)
def test_the_first_submodule_that_differs_is_named(exported, copied, name):
    target, change, submodule = BROKEN[name]
    out = copied(target)
    if isinstance(change, dict):
        edit(out / "config.json", **change)
    else:
        damage(out / "model.safetensors", change)
    report = interop.verify(exported["run"], out, "logits")
    assert not report.passed
    found = re.search(r"first submodule that differs is (\S+ )", report.problems[1]).group(1)
    assert found.startswith(submodule), report.problems


def damage(file, name):
    """Adds a little to one value of a tensor that is used at every position."""
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    start = 8 + length + header[name]["data_offsets"][0]
    values = np.memmap(file, np.float32, "r+", offset=start, shape=(1,))
    values += 0.01
    values.flush()


@pytest.mark.torch
@pytest.mark.parametrize("target", ["gpt2", "craft-torch"])
def test_the_folder_proves_itself(exported, copied, target):
    out = copied(target)
    assert "OK: " in proved(prove(out), 0).stdout
    change = {"gpt2": {"layer_norm_epsilon": 1e-6}, "craft-torch": None}[target]
    if change:
        edit(out / "config.json", **change)
    else:
        described = json.loads((out / "config.json").read_text())
        edit(out / "config.json", model=described["model"] | {"norm_eps": 1e-6})
    assert "FAILED: these are not the logits" in proved(prove(out), 1).stderr
    assert not list(out.glob("__pycache__"))


@pytest.mark.torch
def test_the_folder_sees_a_changed_weight(copied):
    """As its users run it, in a process of its own."""
    out = copied("craft-torch")
    assert "OK: " in proved(prove_alone(out), 0).stdout
    assert not list(out.glob("__pycache__"))
    flip(out / "model.safetensors", "blocks.1.mlp.down.bias")
    told = proved(prove_alone(out), 1).stderr
    assert "1 tensors are not those exported: blocks.1.mlp.down.bias" in told


def proved(done, code):
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_import_compares_the_probe(exported, copied, tmp_path):
    done = interop.import_checkpoint(exported["gpt2"], tmp_path / "models" / "good")
    assert done.probe > 97
    out = copied("gpt2")
    damage(out / "model.safetensors", "transformer.h.0.ln_1.weight")
    with pytest.raises(ParityError, match=r"probe\.json records"):
        interop.import_checkpoint(out, tmp_path / "models" / "bad")
    assert not (tmp_path / "models" / "bad").exists()
    done = interop.import_checkpoint(out, tmp_path / "models" / "bad", probe="none")
    assert any("changed since: blocks.0.attn_norm.scale" in note for note in done.notes)


@pytest.mark.torch
def test_logits_can_be_part_of_the_export(exported, tmp_path):
    done = interop.export_checkpoint(
        exported["run"], tmp_path / "out", "craft-torch", verify="logits", **QUICK
    )
    assert done.manifest["verified"] == "logits"


def test_without_torch_the_bits_still_compare(exported, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torch" else real(name, *rest),
    )
    assert interop.verify(exported["run"], exported["gpt2"]).passed
    with pytest.raises(MissingDependencyError, match="needs torch and transformers"):
        interop.verify(exported["run"], exported["gpt2"], "logits")


@pytest.mark.torch
def test_other_tokenizers_are_detected(exported, copied):
    out = copied("gpt2")
    other = tokenizers.characters("ABC the quick brown fox\n", end_token=True)
    (out / "tokenizer.json").write_text(other.json)
    report = interop.verify(exported["run"], out, "generate")
    assert not report.passed and "the tokenizers differ" in report.summary


def test_a_long_context_is_compared_in_part(tmp_path, capsys):
    run = make_run(tmp_path / "models" / "long", spec(num_layers=1, max_seq_len=65_536))
    report = interop.verify(run, run, "logits")
    assert report.passed and report.figures["tokens"] == [2, 2048]
    assert cli.main(["verify", str(run), str(run), "--level", "logits", "--seq-len=65536"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("float64 logits at 65536 positions do not fit into memory; give a small")
    assert line.endswith("--seq-len")
