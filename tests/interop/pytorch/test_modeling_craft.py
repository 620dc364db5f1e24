"""The exported file by itself; its logits and gradients are in tests/interop/test_parity.py."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import interop
from craft_jax import generation
from craft_jax.generation import SamplingConfig
from tests.interop.models import flip, make_run, random_leaves, spec

torch = pytest.importorskip("torch")
from interop.pytorch import modeling_craft as modeling  # noqa: E402
from interop.pytorch.modeling_craft import CraftConfig, CraftForCausalLM  # noqa: E402
from interop.pytorch.tensors import to_torch  # noqa: E402

pytestmark = pytest.mark.torch
SMALL = spec(num_layers=2)


def model_of(known=SMALL, dtype="float32"):
    model = CraftForCausalLM(CraftConfig(**known.model_config()))
    weights = {name: to_torch(leaf.read()) for name, leaf in random_leaves(known, dtype).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("craft")
    run = make_run(place / "models" / "run", SMALL)
    return interop.export_checkpoint(run, place / "out", "craft-torch", probe="none").out


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "out")


def tokens(count, seed=0):
    return torch.tensor(np.random.default_rng(seed).integers(0, 97, (2, count)))


@pytest.mark.parametrize("cuts", [[1] * 33, [20, 1, 1, 11], [32, 1]])
def test_the_cache_gives_what_the_whole_gives(cuts):
    model, ids = model_of().double(), tokens(33)
    whole, _ = model(ids)
    cache, parts = None, []
    for part in ids.split(cuts, dim=1):
        logits, cache = model(part, cache)
        parts.append(logits)
    assert torch.max(torch.abs(torch.cat(parts, dim=1) - whole)) < 1e-12
    with pytest.raises(ValueError, match="34 tokens exceed max_seq_len=33"):
        model(ids[:, :1], cache)


def test_likeliest_tokens_are_those_of_craft_jax(tmp_path):
    """Past the end of the context too, where both go on from the last half."""
    ours = interop.from_pretrained(make_run(tmp_path / "models" / "run", SMALL))
    prompts = [[1, 2, 3], [90, 5, 7, 11, 13, 17], list(range(33))]
    options = {"max_new_tokens": 60}
    greedy = SamplingConfig(temperature=0.0)
    made = [generation.generate(ours, [p], config=greedy, **options)[0] for p in prompts]
    assert model_of().generate(prompts, temperature=0, **options) == made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
)
def test_what_may_be_chosen_is_what_craft_jax_may_choose(options, rng, monkeypatch):
    logits = (2 * rng.standard_normal(97)).astype(np.float32)
    seen = rng.integers(0, 97, 12)
    everything = {
        "temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    theirs = modeling.filtered(
        torch.tensor(logits), torch.tensor(seen), **(everything | options)
    ).numpy()
    drawn = {}

    def draw(key, filtered):
        drawn["logits"] = filtered
        return jax.numpy.argmax(filtered)

    monkeypatch.setattr(generation.jax, "vmap", lambda f: lambda keys, x: draw(keys[0], x[0])[None])
    mask = np.zeros((1, 97), bool)
    mask[0, seen] = True
    generation.choose(logits[None], mask, jax.random.split(jax.random.key(0), 1),
                      SamplingConfig(**options))  # fmt: skip
    ours = np.asarray(drawn["logits"])
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_samples_follow_the_seed_and_stop_at_the_end():
    model = model_of()
    first = model.generate([[1, 2]], max_new_tokens=30, seed=1)
    assert model.generate([[1, 2]], max_new_tokens=30, seed=1) == first
    assert model.generate([[1, 2]], max_new_tokens=30, seed=2) != first
    end = first[0][10]
    model.config = dataclasses.replace(model.config, eos_token_id=end)
    stopped = model.generate(torch.tensor([[1, 2]]), max_new_tokens=30, seed=1)
    assert stopped == [first[0][: first[0].index(end)]]
    assert model.generate([[1, 2]], max_new_tokens=30, seed=1, stop_at_eos=False) == first
    model.config = dataclasses.replace(model.config, tokenizer_vocab_size=10)
    assert max(model.generate([[1, 2]], max_new_tokens=50, seed=3, stop_at_eos=False)[0]) < 10


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 98},
        {"prompts": [1, 2]},
        {"prompts": [[-1]]},
        {"prompts": [[97]]},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"prompts": [[]]},
        {"prompts": [list(range(34))]},
    ],
)
def test_impossible_options(options):
    given = {"prompts": [[1]], "max_new_tokens": 2} | options
    with pytest.raises(ValueError):
        model_of().generate(given.pop("prompts"), **given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
def test_half_and_mixed_weights(dtype):
    """Logits are float32, and near those of the same weights in float64."""
    code = f"""
import torch
from tests.interop.pytorch.test_modeling_craft import model_of, tokens
model = model_of(dtype={dtype!r})
dtypes = {{p.dtype for p in model.parameters()}}
with torch.no_grad():
    logits = model(tokens(33))[0]
    exact = model.double()(tokens(33))[0]
assert logits.dtype == torch.float32 and exact.dtype == torch.float64, logits.dtype
scale = exact.abs().max()
assert float((logits - exact).abs().max() / scale) < 0.1, (logits - exact).abs().max() / scale
print(len(dtypes))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": ".", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (2 if dtype == "mixed" else 1)


def test_dropout_only_while_training():
    known = spec(num_layers=1, dropout=0.5)
    model, ids = model_of(known), tokens(33)
    assert torch.equal(model(ids)[0], model(ids)[0])
    greedy = model.generate([[1, 2]], max_new_tokens=20, temperature=0)
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])
    assert model.generate([[1, 2]], max_new_tokens=20, temperature=0) == greedy
    assert model.training


def test_it_needs_torch_alone(copied):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("craft_jax", "interop", "jax", "safetensors", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(copied)!r})
from modeling_craft import CraftForCausalLM
print(CraftForCausalLM.from_pretrained({str(copied)!r}).generate([[1]], max_new_tokens=3))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_dtype_shards_and_the_meta_device(copied, tmp_path):
    whole = CraftForCausalLM.from_pretrained(copied).state_dict()
    half = CraftForCausalLM.from_pretrained(copied, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert not half.training and not list(half.buffers())
    sharded = interop.export_checkpoint(
        copied, tmp_path / "s", "craft-torch", max_shard_size="20KB", probe="none"
    ).out
    again = CraftForCausalLM.from_pretrained(sharded).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with torch.device("meta"):
        model = CraftForCausalLM(CraftConfig.from_json(copied / "config.json"))
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in whole.items()
    }


def test_loading_is_strict(copied):
    described = json.loads((copied / "config.json").read_text())

    def load(**model):
        changed = described | {"model": described["model"] | model}
        (copied / "config.json").write_text(json.dumps(changed))
        return CraftForCausalLM.from_pretrained(copied)

    for change, words in [
        ({"num_layers": 3}, r"missing: blocks\.2"),
        ({"num_layers": 1}, r"unexpected: blocks\.1"),
        ({"d_ff": 100}, r"is \[48, 112\], not \[48, 100\]"),
        ({"tie_embeddings": False}, r"missing: head\.embedding"),
        ({"window": 7}, "unknown settings .'window'."),
        ({"name": "other"}, "'other'"),
        ({"num_heads": 7}, "num_heads=7 does not divide d_model=48"),
        ({"activation": "swish"}, "activation='swish'"),
    ]:
        with pytest.raises(ValueError, match=words):
            load(**change)
    (copied / "config.json").write_text(json.dumps(described | {"craft_format": 2}))
    with pytest.raises(ValueError, match="craft_format=2"):
        CraftForCausalLM.from_pretrained(copied)


def test_damaged_files(copied):
    file = copied / "model.safetensors"
    flip(file, "final_norm.scale")
    CraftForCausalLM.from_pretrained(copied)
    whole = file.read_bytes()
    for content, words in [(whole[:-5], "its header says"), (whole[:100], "truncated")]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            CraftForCausalLM.from_pretrained(copied)
    file.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        CraftForCausalLM.from_pretrained(copied)
