"""What the process that computes with PyTorch answers, kind by kind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from interop.pytorch import modeling_craft, worker  # noqa: E402
from interop.pytorch.nanogpt import NanoGPT  # noqa: E402
from tests.interop.models import random_leaves, spec  # noqa: E402
from tests.interop.pytorch import reference  # noqa: E402
from tests.interop.pytorch.reference import LMS, PAIRS, gap, ids, mask, saved  # noqa: E402
from tests.interop.pytorch.test_stacks import built  # noqa: E402

pytestmark = pytest.mark.torch
EXACT = 1e-10
INPUTS = {"tokens": ids().astype(np.int32)}
PAIR_INPUTS = INPUTS | {
    "source": ids(31, seed=1).astype(np.int32),
    "source_mask": mask(17, 31, width=31),
}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Asks a worker in this process, or in one of its own."""

    def asked(known, inputs=INPUTS, *, alone=False, **request):
        place = tmp_path / "request"
        place.mkdir(exist_ok=True)
        request = {"what": "logits", "dtype": "float64", "model": dataclasses.asdict(known)} | {
            key: str(value) if isinstance(value, Path) else value for key, value in request.items()
        }
        (place / "request.json").write_text(json.dumps(request))
        np.savez(place / "inputs.npz", **inputs)
        if alone:
            done = subprocess.run(
                [sys.executable, worker.__file__, str(place)],
                env=os.environ | {"PYTHONPATH": "."},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        else:
            with monkeypatch.context() as here:
                # What the worker changes for a folder's own file.
                here.setattr(sys, "path", list(sys.path))
                here.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
                sys.modules.pop("modeling_craft", None)
                worker.main(place)
        with np.load(place / "arrays.npz") as arrays:
            return json.loads((place / "answer.json").read_text()), dict(arrays)

    return asked


def ours(known, inputs):
    source = {f"{name}_BS": inputs[name] for name in inputs if name != "tokens"}
    return reference.logits(known, random_leaves(known), inputs["tokens"], **source)


def continued(known, inputs, prompt, count):
    source = {f"{name}_BS": array[:1] for name, array in inputs.items() if name != "tokens"}
    return reference.greedy(known, random_leaves(known), prompt, count, **source)


def wrapped(state, around):
    return {
        "bare": state,
        "trainer": {"epoch": 3, "model_state_dict": state, "config": {"d_model": 48}},
        "nanogpt": {"model": state, "iter_num": 5},
    }[around]


@pytest.mark.parametrize("around", ["bare", "trainer", "nanogpt"])
def test_a_lineage_of_craft(ask, tmp_path, around):
    known = LMS["empty"]
    model, _ = built("craft-f", known)
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(wrapped(state, around), tmp_path / "model.pt")
    names = {name: f"_orig_mod.{name}" for name in model.state_dict()}
    layer = "transformer_decoder.layers.1."
    taps = [f"{layer}self_attn", f"{layer}multihead_attn", f"{layer}linear2", "output_layer"]
    answer, arrays = ask(
        known,
        container="craft",
        target="craft-f",
        path=tmp_path / "model.pt",
        names=names,
        taps=taps,
        prompt=[1, 2],
        new=3,
    )
    assert gap(ours(known, INPUTS), arrays["logits"]) <= EXACT
    assert {name: array.shape for name, array in arrays.items() if name != "logits"} == {
        **{f"tap {path}": (2, 33, 48) for path in taps[:3]},
        "tap output_layer": (2, 33, 97),
    }
    assert np.array_equal(arrays["tap output_layer"], arrays["logits"])
    assert answer == {"loading": {}, "greedy": continued(known, INPUTS, [1, 2], 3)}


def test_exactly_the_named_tensors_are_loaded(ask, tmp_path):
    known = reference.gpt(head_bias=True, tie_embeddings=False)
    model, _ = built("craft-d", known)
    names = {name: name for name in model.state_dict()}
    model(torch.tensor(ids()))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    request = {"container": "craft", "target": "craft-d", "path": tmp_path / "model.pt"}
    _, arrays = ask(known, names=names, **request)
    assert gap(ours(known, INPUTS), arrays["logits"]) <= EXACT
    del names["ln_f.weight"]
    with pytest.raises(RuntimeError, match=r"ln_f\.weight"):
        ask(known, names=names, **request)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_optional_tensors_of_a_file(ask, tmp_path, positions):
    """Numbers of positions, but no table of sines."""
    scaled = {"embedding_scale": True, "tie_embeddings": False, "head_bias": True}
    known = reference.lm(positions=positions, **scaled)
    model, values = built("craft-b", known)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("position_ids")}
    torch.save(state, tmp_path / "model.pt")
    request = {"container": "craft", "target": "craft-b", "path": tmp_path / "model.pt"}
    _, arrays = ask(known, names={name: name for name in state}, **request)
    wanted = reference.logits(known, reference.lazies(values), ids())
    assert gap(wanted, arrays["logits"]) <= EXACT
    if positions == "sinusoidal":
        names = {name: name for name in state if not name.endswith("pe")}
        with pytest.raises(RuntimeError, match=r"positional_encoding\.pe"):
            ask(known, names=names, **request)


def test_a_stack_with_a_source(ask, tmp_path):
    known = PAIRS["seq2seq"]
    model, _ = built("torch-transformer", known)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    layers = ("transformer.encoder.layers.0", "transformer.decoder.layers.1")
    taps = [f"{layer}.{part}" for layer in layers for part in ("self_attn", "linear2")]
    answer, arrays = ask(
        known,
        PAIR_INPUTS,
        container="torch",
        target="torch-transformer",
        path=tmp_path / "model.pt",
        names={name: name for name in model.state_dict()},
        taps=[*taps, f"{layers[1]}.multihead_attn"],
        prompt=[5],
        new=4,
    )
    assert gap(ours(known, PAIR_INPUTS), arrays["logits"]) <= EXACT
    widths = {name: array.shape[1] for name, array in arrays.items()}
    assert widths == {"logits": 33, f"tap {layers[1]}.multihead_attn": 33} | {
        f"tap {path}": 31 if "encoder" in path else 33 for path in taps
    }
    assert answer["greedy"] == continued(known, PAIR_INPUTS, [5], 4)


def test_a_file_of_float64_keeps_its_bits(ask, tmp_path):
    known = LMS["no bias"]
    model, _ = built("craft-e", known)
    state = {name: tensor + 1e-12 for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    names = {name: name for name in state}
    request = {"container": "craft", "target": "craft-e", "path": tmp_path / "model.pt"}
    _, arrays = ask(known, names=names, taps=["token_embedding"], **request)
    rows = state["token_embedding.weight"][torch.tensor(ids())]
    assert np.array_equal(arrays["tap token_embedding"], rows.numpy())


@pytest.mark.parametrize(
    ("known", "alone"), [(LMS["zeros, post-norm"], True), (PAIRS["sinusoidal"], False)]
)
def test_a_folder_of_craft_torch(ask, tmp_path, known, alone):
    folder = saved(tmp_path / "out", known)
    shutil.copy(modeling_craft.__file__, folder / "modeling_craft.py")
    inputs = PAIR_INPUTS if known.name == "seq2seq" else INPUTS
    blocks = ("encoder.0", "decoder.1") if known.name == "seq2seq" else ("blocks.2",)
    taps = [f"{block}.{part}" for block in blocks for part in ("attn", "attn_norm", "mlp")]
    taps += ["head", f"{blocks[-1]}.cross"]
    answer, arrays = ask(
        known,
        inputs,
        alone=alone,
        container="craft-torch",
        target="craft-torch",
        path=folder,
        taps=taps,
        prompt=[5, 6],
        new=3,
    )
    assert gap(ours(known, inputs), arrays["logits"]) <= EXACT
    assert set(arrays) == {"logits", *(f"tap {path}" for path in taps)}
    assert answer["greedy"] == continued(known, inputs, [5, 6], 3)
    assert not list(folder.rglob("__pycache__"))
    answer, _ = ask(known, {}, what="structure", container="craft-torch", target="", path=folder)
    assert set(answer["tensors"]) == set(random_leaves(known))


def test_structure_needs_no_file(ask, tmp_path):
    for kind, known in [
        ("torch-encoder", LMS["sinusoidal"]),
        ("torch-transformer", PAIRS["apart"]),
    ]:
        request = {"container": "torch", "target": kind, "path": tmp_path / "none.pt", "names": {}}
        answer, arrays = ask(known, {}, what="structure", **request)
        model, _ = built(kind, known)
        assert answer["tensors"] == {n: list(t.shape) for n, t in model.state_dict().items()}
        assert not arrays


def test_a_file_of_nanogpt(ask, tmp_path):
    known = spec(d_ff=192)
    sizes = {"n_layer": 3, "n_head": 6, "n_embd": 48, "block_size": 33, "bias": True}
    model = NanoGPT(sizes | {"vocab_size": 97, "dropout": 0.0}).double()
    torch.save({"model": model.state_dict(), "model_args": {}}, tmp_path / "ckpt.pt")
    request = {"container": "nanogpt", "target": "nanogpt", "path": tmp_path / "ckpt.pt"}
    answer, arrays = ask(known, taps=["transformer.h.1.attn"], names={}, **request)
    with torch.no_grad():
        assert np.array_equal(arrays["logits"], model(torch.tensor(ids())).numpy())
    assert "tap transformer.h.1.attn" in arrays and answer["loading"] == {}
