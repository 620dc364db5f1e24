"""The exported file by itself; its logits and gradients are in tests/interop/test_parity.py."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import interop
from craft_jax.generation import generator as generation
from craft_jax.generation import sampling
from craft_jax.generation.generator import Generator
from craft_jax.generation.sampling import SamplingConfig
from craft_jax.models import base
from interop.mapping.shapes import leaves
from interop.mapping.tensors import lazy
from interop.sources.live import definition
from tests.interop.models import flip, make_run, random_leaves, spec

torch = pytest.importorskip("torch")
from interop.pytorch.modeling_craft import (  # noqa: E402
    CraftConfig,
    CraftForCausalLM,
    CraftForSeq2Seq,
    Options,
)
from tests.interop.pytorch import reference  # noqa: E402
from tests.interop.pytorch.reference import LMS, PAIRS, gap, ids, mask, saved  # noqa: E402

pytestmark = pytest.mark.torch
SMALL = spec(num_layers=2)
EXACT = 1e-10
PAD, ALL = mask(33, 20), mask(33, 33)


def model_of(known=SMALL, dtype="float32"):
    cls = CraftForSeq2Seq if known.name == "seq2seq" else CraftForCausalLM
    model = cls(CraftConfig(**known.model_config()))
    weights = reference.weights(random_leaves(known, dtype))
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
def test_cached_and_whole_forwards_agree(cuts):
    model, ids = model_of().double(), tokens(33)
    whole, _ = model(ids)
    cache, parts = None, []
    for part in ids.split(cuts, dim=1):
        logits, cache = model(part, cache)
        parts.append(logits)
    assert torch.max(torch.abs(torch.cat(parts, dim=1) - whole)) < 1e-12
    with pytest.raises(ValueError, match="34 tokens exceed max_seq_len=33"):
        model(ids[:, :1], cache)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LMS)
def test_logits(name, masked):
    known = LMS[name]
    inputs = {"mask_BT": PAD} if masked and known.name != "gpt" else {}
    # Without a mask, or all of it true: the same in craft_jax, and compiled once.
    whole = {} if known.name == "gpt" else {"mask_BT": ALL}
    ours = reference.logits(known, random_leaves(known), ids(), **whole | inputs)
    theirs = {key: torch.tensor(array) for key, array in inputs.items()}
    with torch.no_grad():
        logits, cache = model_of(known).double()(torch.tensor(ids()), **theirs)
    assert gap(ours, logits) <= EXACT
    assert (cache is None) == bool(inputs)


@pytest.mark.parametrize("masks", ["", "source", "source and target"])
@pytest.mark.parametrize("name", PAIRS)
def test_logits_of_pairs(name, masks):
    known, source = PAIRS[name], ids(31, seed=1)
    inputs = {"source_BS": source}
    if "source" in masks:
        inputs["source_mask_BS"] = mask(17, 31, width=31)
    if "target" in masks:
        inputs["mask_BT"] = PAD
    whole = {"source_mask_BS": mask(31, 31, width=31), "mask_BT": ALL}
    ours = reference.logits(known, random_leaves(known), ids(), **whole | inputs)
    theirs = {key: torch.tensor(array) for key, array in inputs.items()}
    with torch.no_grad():
        logits, _ = model_of(known).double()(torch.tensor(ids()), **theirs)
    assert gap(ours, logits) <= EXACT


@pytest.mark.parametrize("name", LMS)
def test_the_cache_of_every_kind(name):
    model, tokens_BT = model_of(LMS[name]).double(), tokens(33)
    whole, _ = model(tokens_BT)
    first, cache = model(tokens_BT[:, :20])
    second, cache = model(tokens_BT[:, 20:21], cache)
    third, _ = model(tokens_BT[:, 21:], cache)
    assert torch.max(torch.abs(torch.cat((first, second, third), dim=1) - whole)) < 1e-11


@pytest.mark.parametrize("name", PAIRS)
def test_a_source_is_read_once(name):
    model, tokens_BT, source_BS = model_of(PAIRS[name]).double(), tokens(33), tokens(31, 1)
    source_mask_BS = torch.tensor(mask(31, 9, width=31))
    whole, _ = model(tokens_BT, source_BS, source_mask_BS)
    calls = []
    model.encoder_norm.register_forward_hook(lambda *_: calls.append(1))
    _, cache = model(tokens_BT[:, :1], source_BS, source_mask_BS)
    parts = [model(tokens_BT[:, :1], cache=model.encode(source_BS, source_mask_BS)).logits]
    for part in tokens_BT[:, 1:].split([1, 15, 16], dim=1):
        logits, cache = model(part, cache=cache)
        parts.append(logits)
    assert len(calls) == 2
    assert torch.max(torch.abs(torch.cat(parts, dim=1) - whole)) < 1e-11


def test_a_source_is_given_once():
    model, one = model_of(PAIRS["seq2seq"]), tokens(3)
    _, cache = model(one, one)
    everything = torch.ones(2, 3, dtype=bool)
    for given, words in [
        ({}, "given once"),
        ({"source_BS": one, "cache": cache}, "given once"),
        ({"cache": cache, "mask_BT": everything}, "no padding"),
        ({"source_BS": tokens(34)}, "34 tokens exceed"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(one, **given)
    lm = model_of(LMS["transformer"])
    with pytest.raises(ValueError, match="no padding"):
        lm(one, lm(one).cache, everything)


def test_a_cache_without_tokens_takes_a_mask():
    model, mask_BT = model_of(PAIRS["seq2seq"]), torch.tensor([[True, False, False], [True] * 3])
    one = tokens(3)
    whole = model(one, one, mask_BT=mask_BT)
    assert torch.equal(model(one, cache=model.encode(one), mask_BT=mask_BT).logits, whole.logits)
    assert whole.cache is None


def test_greedy_tokens_of_other_families():
    """A language model goes on past the context; a target ends there."""
    greedy, options = SamplingConfig(temperature=0.0), {"max_new_tokens": 45}
    prompts = [[1, 2, 3], list(range(33))]
    known = LMS["zeros"]
    ours = generation.generate(craft_model(known), prompts, config=greedy, **options)
    assert model_of(known).generate(prompts, temperature=0, **options) == ours
    for known in (PAIRS["apart"], PAIRS["post-norm"]):
        theirs = model_of(known).generate(prompts, temperature=0, **options)
        starts = [[0]] * len(prompts)
        ours = generation.generate(
            craft_model(known), starts, sources=prompts, config=greedy, **options
        )
        assert theirs == ours
        assert [len(row) for row in theirs] == [33, 33]


def test_targets_begin_and_end_with_the_end():
    model = model_of(PAIRS["apart"])
    first = model.generate([[1, 2, 3]], max_new_tokens=9, seed=1)
    assert len(first[0]) == 9
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=9, seed=1) == first
    assert model.generate([[1, 2, 3]], max_new_tokens=9, seed=2) != first
    model.config = dataclasses.replace(model.config, eos_token_id=7, tokenizer_vocab_size=20)
    made = model.generate([[1, 2, 3]] * 20, max_new_tokens=33)
    assert all(7 not in row and max(row, default=0) < 20 for row in made)
    assert min(map(len, made)) < 33
    greedy, _ = model(torch.tensor([[7]]), torch.tensor([[1, 2, 3]]))
    likeliest = model.generate([[1, 2, 3]], max_new_tokens=1, temperature=0, stop_at_eos=False)
    assert likeliest == [[int(greedy[0, 0, :20].argmax())]]


def craft_model(known, found=None):
    found = found or random_leaves(known)
    params = {name: jax.numpy.asarray(leaf.read()) for name, leaf in found.items()}
    return definition(known).merge(params)


@pytest.mark.parametrize(("beams", "count"), [pytest.param(2, 12, marks=pytest.mark.soak), (4, 20)])
def test_beam_search_agrees_with_craft_jax(beams, count):
    """Few tokens of near probabilities, so that beams cross, end, and end otherwise than greedy."""
    known = reference.pair(num_layers=1, share_embeddings=True, tie_embeddings=False)
    flat = {
        name: lazy(0.2 * leaf.read()) if name == "head.embedding" else leaf
        for name, leaf in random_leaves(known).items()
    }
    ours, theirs = craft_model(known, flat), model_of(known)
    theirs.load_state_dict(reference.weights(flat))
    sources = np.random.default_rng(3).integers(0, 97, (10, 4)).tolist()
    sources.append(list(range(33)))
    for end, size in ((None, 80), (3, 6)):
        generator = Generator(
            base.define(type(ours), ours.config), max_len=33, vocab_size=size, end_id=end
        )
        theirs.config = dataclasses.replace(
            theirs.config, eos_token_id=end, tokenizer_vocab_size=size
        )
        greedy = theirs.generate(sources, max_new_tokens=count, temperature=0)
        for penalty in (0.0, 0.6, 1.0):
            options = {"num_beams": beams, "max_new_tokens": count, "length_penalty": penalty}
            starts = [[end or 0]] * len(sources)
            found = generator.beam_search(base.split(ours), starts, sources=sources, **options)
            made = theirs.generate(sources, **options)
            assert made == [tokens for tokens, _ in found]
            assert made != greedy


def test_beam_search_finds_the_most_likely_text():
    """As many beams as there are tokens lose nothing among targets of two tokens."""
    model, source = model_of(PAIRS["post-norm"]).double(), torch.tensor([[4, 5, 6]])
    model.config = dataclasses.replace(model.config, eos_token_id=9)

    def logprobs(text):
        logits, _ = model(torch.tensor([[9, *text]]), source)
        return torch.log_softmax(logits[0, -1], dim=-1).tolist()

    with torch.no_grad():
        one = logprobs([])
        scores = {(i, j): one[i] + s for i in range(97) for j, s in enumerate(logprobs([i]))}
    scores = {pair: s for pair, s in scores.items() if pair[0] != 9} | {(9,): one[9]}
    for penalty in (0.0, 2.0):
        best = max(scores, key=lambda pair: scores[pair] / len(pair) ** penalty)
        wanted = [token for token in best if token != 9]
        options = {"max_new_tokens": 2, "length_penalty": penalty}
        assert model.generate(source, num_beams=97, **options) == [wanted]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_are_never_below_greedy(penalty):
    model = model_of(PAIRS["no bias"]).double()
    model.config = dataclasses.replace(model.config, eos_token_id=11)
    rng = np.random.default_rng(0)
    sources, better = rng.integers(0, 97, (12, 5)).tolist(), 0

    def score(source, made):
        text = [*made, 11][:20]
        logits, _ = model(torch.tensor([[11, *text[:-1]]]), torch.tensor([source]))
        logprobs = torch.log_softmax(logits[0], dim=-1)
        return float(logprobs[range(len(text)), text].sum()) / len(text) ** penalty

    with torch.no_grad():
        greedy = model.generate(sources, max_new_tokens=20, temperature=0)
        for beams in (2, 3, 5):
            found = model.generate(
                sources, max_new_tokens=20, num_beams=beams, length_penalty=penalty
            )
            for source, ours, theirs in zip(sources, found, greedy, strict=True):
                assert score(source, ours) >= score(source, theirs) - 1e-12
                better += ours != theirs
    assert better


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 2, "temperature": 0.5},
        {"num_beams": 2, "length_penalty": -1},
        {"sources": [[]]},
        {"sources": [[97]]},
        {"sources": [[1] * 34]},
    ],
)
def test_impossible_options_of_pairs(options):
    given = {"sources": [[1]], "max_new_tokens": 2} | options
    with pytest.raises(ValueError):
        model_of(PAIRS["seq2seq"]).generate(**given)
    assert model_of(PAIRS["seq2seq"]).generate([[1]], max_new_tokens=0, num_beams=2) == [[]]


def test_greedy_tokens_are_those_of_craft_jax(tmp_path):
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
def test_sampling_candidates_are_those_of_craft_jax(options, rng, monkeypatch):
    logits = (2 * rng.standard_normal(97)).astype(np.float32)
    seen = rng.integers(0, 97, 12)
    theirs = Options(**options).filtered(torch.tensor(logits), torch.tensor(seen)).numpy()
    drawn = {}

    def draw(key, filtered):
        drawn["logits"] = filtered
        return jax.numpy.argmax(filtered)

    monkeypatch.setattr(generation.jax, "vmap", lambda f: lambda keys, x: draw(keys[0], x[0])[None])
    mask = np.zeros((1, 97), bool)
    mask[0, seen] = True
    sampling.choose(logits[None], mask, jax.random.split(jax.random.key(0), 1),
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
    for known in (SMALL, LMS["sinusoidal"], LMS["zeros, post-norm"], PAIRS["sinusoidal"]):
        model = model_of(known, dtype=dtype)
        assert len({p.dtype for p in model.parameters()}) == (2 if dtype == "mixed" else 1)
        inputs = [tokens(33)] * (2 if known.name == "seq2seq" else 1)
        with torch.no_grad():
            logits = model(*inputs)[0]
            exact = model.double()(*inputs)[0]
        assert logits.dtype == torch.float32 and exact.dtype == torch.float64
        assert float((logits - exact).abs().max() / exact.abs().max()) < 0.1


def test_dropout_only_while_training():
    known = spec(num_layers=1, dropout=0.5)
    model, ids = model_of(known), tokens(33)
    assert torch.equal(model(ids)[0], model(ids)[0])
    greedy = model.generate([[1, 2]], max_new_tokens=20, temperature=0)
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])
    assert model.generate([[1, 2]], max_new_tokens=20, temperature=0) == greedy
    assert model.training


def test_dropout_applies_where_craft_jax_applies_it():
    """In layers of torch.nn on hidden units too."""
    for known, has in [(spec(dropout=0.5), False), (reference.lm(dropout=0.5), True)]:
        mlp = model_of(known).train().blocks[0].mlp
        x_BTD = torch.ones(2, 3, 48)
        assert torch.equal(mlp(x_BTD), mlp(x_BTD)) != has
    model, one = model_of(reference.pair(dropout=0.5)), tokens(9)
    assert torch.equal(model(one, one)[0], model(one, one)[0])
    model.train()
    assert not torch.equal(model(one, one)[0], model(one, one)[0])
    assert model.generate([[1]], max_new_tokens=3, num_beams=2) and model.training


def test_constants_never_train():
    model = model_of(PAIRS["sinusoidal"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"source_positions.constant", "target_positions.constant"}
    model(tokens(3), tokens(3)).logits.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("known", [*LMS.values(), *PAIRS.values()], ids=[*LMS, *PAIRS])
def test_every_kind_loads(known, tmp_path):
    folder = saved(tmp_path / "out", known)
    cls, other = CraftForCausalLM, CraftForSeq2Seq
    if known.name == "seq2seq":
        cls, other = other, cls
    loaded = cls.from_pretrained(folder)
    for name, tensor in model_of(known).state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert set(loaded.state_dict()) == set(leaves(known))
    assert (loaded.config.eos_token_id, loaded.config.tokenizer_vocab_size) == (5, 90)
    with pytest.raises(ValueError, match=f"a {known.name} is a {cls.__name__}"):
        other.from_pretrained(folder)


def test_settings_of_each_family(tmp_path):
    def described(known, drop=(), **more):
        model = {k: v for k, v in known.model_config().items() if k not in drop} | more
        config = {"model_type": "craft", "craft_format": 1, "model": model}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return CraftConfig.from_json(tmp_path / "config.json")

    earlier = described(reference.gpt(bias=False), ("norm_bias", "head_bias"))
    assert (earlier.norm_bias, earlier.final_norm_bias, earlier.head_bias) == (False, False, False)
    for known in (reference.gpt(), reference.lm(), reference.pair()):
        described(known)
        for field in set(known.model_config()) - {"name"}:
            if known.name == "gpt" and field in ("norm_bias", "head_bias"):
                continue
            with pytest.raises(ValueError, match=rf"missing settings .'{field}'"):
                described(known, (field,))
        with pytest.raises(ValueError, match=r"unknown settings .'rope'"):
            described(known, rope=True)
    for known, field, value in [
        (reference.gpt(), "norm_first", True),
        (reference.gpt(), "final_norm_bias", True),
        (reference.lm(), "share_embeddings", False),
        (reference.pair(), "cross_attention", "source"),
        (reference.pair(), "norm_bias", True),
    ]:
        with pytest.raises(ValueError, match=rf"unknown settings .'{field}'"):
            described(known, **{field: value})
    for field in ("positions", "cross_attention", "activation"):
        with pytest.raises(ValueError, match=f"{field}='other' is not one of"):
            described(reference.lm(), **{field: "other"})


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
