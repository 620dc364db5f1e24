import re

import numpy as np
import pytest

from interop.errors import (
    MissingKeysError,
    ShapeMismatchError,
    TiedWeightsError,
    UnexpectedKeysError,
    collapsed,
)
from interop.mapping.ops import Transpose
from interop.mapping.shapes import leaves
from interop.mapping.table import Table, rule
from interop.mapping.tensors import lazy, same_bits
from interop.targets.registry import TARGETS
from tests.interop.models import DTYPES, SPECS, fitting, random_leaves, spec

CASES = [
    (target, name)
    for name, changes in SPECS.items()
    for target in TARGETS
    if TARGETS[target].answer(spec(**changes)).exact
]


def test_there_is_a_case_for_every_target():
    assert {target for target, _ in CASES} == set(TARGETS)
    assert ("nanogpt", "plain") not in CASES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("target", "name"), CASES)
def test_there_and_back_every_bit(target, name, dtype):
    known = spec(**SPECS[name])
    before = random_leaves(known, dtype)
    rules = TARGETS[target].mapping(known)
    made = rules.forward(before)
    read = {n: lazy(np.ascontiguousarray(t.read())) for n, t in made.items()}
    assert {n: (t.shape, t.dtype) for n, t in read.items()} == {
        n: (t.shape, t.dtype) for n, t in made.items()
    }
    after = rules.inverse(read, leaves(known))
    assert set(after) == set(before)
    for leaf, tensor in before.items():
        assert same_bits(tensor.read(), after[leaf].read()), leaf


@pytest.mark.parametrize("target", TARGETS)
def test_a_leaf_too_few_and_one_too_many(target):
    known = fitting(target)
    rules, found = TARGETS[target].mapping(known), random_leaves(known)
    name = next(leaf for leaf in found if leaf.endswith(".1.mlp.up.kernel"))
    lost = found.pop(name)
    with pytest.raises(MissingKeysError, match=re.escape(name)):
        rules.shapes(found)
    other = name.replace("up", "gate")
    found |= {name: lost, other: lost}
    with pytest.raises(UnexpectedKeysError, match=re.escape(other)):
        rules.shapes(found)


def tensors(target="gpt2", **changes):
    known = spec(**changes)
    rules = TARGETS[target].mapping(known)
    made = rules.forward(random_leaves(known))
    return rules, {n: lazy(t.read()) for n, t in made.items()}, leaves(known)


def test_missing_tensors_are_all_named_with_the_nearest():
    rules, found, expected = tensors()
    moved = {n.replace("c_attn.weight", "c_attm.weight"): t for n, t in found.items()}
    with pytest.raises(MissingKeysError) as caught:
        rules.inverse(moved, expected)
    text = str(caught.value)
    assert "lacks 3 of" in text and "transformer.h.{0..2}.attn.c_attn.weight" in text
    assert "nearest present: transformer.h.0.attn.c_attm.weight" in text
    assert len(caught.value.details["keys"]) == 3


def test_extra_tensors_are_listed_or_ignored_on_demand():
    rules, found, expected = tensors()
    found["transformer.h.0.attn.rotary.freqs"] = lazy(np.ones(3))
    with pytest.raises(UnexpectedKeysError, match=r"rotary\.freqs.*ignore_keys"):
        rules.inverse(found, expected)
    rules.inverse(found, expected, ignore=["transformer.h.0.attn.rotary.freqs"])


def test_wrong_shapes_come_with_a_hint():
    rules, found, expected = tensors()
    name = "transformer.h.1.mlp.c_fc.weight"
    turned = found | {name: lazy(found[name].read().T)}
    with pytest.raises(ShapeMismatchError, match=r"\[112, 48\], not \[48, 112\] \(looks transp"):
        rules.inverse(turned, expected)
    padded = lazy(np.zeros((128, 48), np.float32))
    with pytest.raises(ShapeMismatchError, match=r"padded to 128 rows"):
        rules.inverse(found | {"transformer.wte.weight": padded}, expected)


def test_masks_are_checked_by_value():
    rules, found, expected = tensors()
    mask = np.tril(np.ones((33, 33), np.uint8))[None, None]
    with_mask = found | {"transformer.h.0.attn.bias": lazy(mask)}
    rules.inverse(with_mask, expected)
    broken = mask.copy()
    broken[0, 0, 3, 7] = 1
    with pytest.raises(UnexpectedKeysError, match="not a causal mask"):
        rules.inverse(found | {"transformer.h.0.attn.bias": lazy(broken)}, expected)


def test_a_second_name_of_a_tied_tensor_must_have_its_bits():
    rules, found, expected = tensors()
    head = found["transformer.wte.weight"].read().copy()
    rules.inverse(found | {"lm_head.weight": lazy(head)}, expected)
    head[5, 5] += 0.5
    with pytest.raises(TiedWeightsError, match=r"lm_head\.weight and .*wte\.weight.*up to 0\.5"):
        rules.inverse(found | {"lm_head.weight": lazy(head)}, expected)


def test_synthetic_biases_must_be_zero():
    rules, found, expected = tensors(bias=False)
    assert len(rules.synthetic) == 3 * 6 + 1
    found["transformer.h.2.ln_1.bias"] = lazy(np.full(48, 0.1, np.float32))
    with pytest.raises(ShapeMismatchError, match=r"h\.2\.ln_1\.bias: 48 values are not zero"):
        rules.inverse(found, expected)


def test_a_table_that_uses_a_leaf_twice_is_a_mistake_of_its_author():
    table = Table(rules=(rule("a", "x"), rule("a", "y", Transpose())))
    with pytest.raises(ValueError, match="uses a more than once"):
        table.bind(1).shapes({"a": lazy(np.ones((2, 2)))})


def test_one_of_two_names_of_a_tied_tensor_is_enough():
    rules, found, expected = tensors("craft-e", name="transformer", embedding_scale=True)
    for name in ("token_embedding.weight", "output_head.weight"):
        fewer = {n: t for n, t in found.items() if n != name}
        back = rules.inverse(fewer, expected)
        table = found["token_embedding.weight"].read()
        assert same_bits(back["token_embedding.embedding"].read(), table)
    neither = {n: t for n, t in found.items() if n[:5] not in ("token", "outpu")}
    with pytest.raises(MissingKeysError, match="lacks 2 of"):
        rules.inverse(neither, expected)


def test_a_table_of_positions_must_be_one_of_sines():
    changes = {"tie_embeddings": False, "head_bias": True, "positions": "sinusoidal"}
    rules, found, expected = tensors("craft-b", name="transformer", embedding_scale=True, **changes)
    name = "positional_encoding.pe"
    assert found[name].shape == (1, 33, 48)
    rules.inverse(found, expected)["position_embedding.constant"].read()
    broken = found[name].read().copy()
    broken[0, 7, 3] += 1e-3
    leaf = rules.inverse(found | {name: lazy(broken)}, expected)["position_embedding.constant"]
    with pytest.raises(UnexpectedKeysError, match=r"pe: the value at position 7, column 3"):
        leaf.read()


def test_masks_and_numbers_of_craft_are_checked_by_value():
    rules, found, expected = tensors("craft-d", tie_embeddings=False, head_bias=True)
    mask = np.triu(np.full((20, 20), -np.inf, np.float32), 1)
    name = "layers.1.self_attn.causal_mask"
    rules.inverse(found | {name: lazy(mask)}, expected)
    for at, value in (((3, 7), 0.0), ((7, 3), -np.inf), ((3, 7), -1e9), ((2, 2), np.nan)):
        broken = mask.copy()
        broken[at] = value
        with pytest.raises(UnexpectedKeysError, match="not a causal mask"):
            rules.inverse(found | {name: lazy(broken)}, expected)
    changes = {"name": "transformer", "embedding_scale": True, "tie_embeddings": False}
    rules, found, expected = tensors("craft-b", head_bias=True, **changes)
    name = "positional_encoding.position_ids"
    rules.inverse(found | {name: lazy(np.arange(33)[None])}, expected)
    with pytest.raises(UnexpectedKeysError, match=r"is not 0, 1, 2"):
        rules.inverse(found | {name: lazy(np.arange(33)[None, ::-1])}, expected)


def test_rows_before_the_first_position_mean_nothing():
    rules, found, expected = tensors("opt")
    name = "model.decoder.embed_positions.weight"
    table = found[name].read().copy()
    assert table.shape == (35, 48) and not table[:2].any()
    table[:2] = 7
    back = rules.inverse(found | {name: lazy(table)}, expected)
    assert same_bits(back["position_embedding.embedding"].read(), table[2:])


def test_layers_are_numbers_and_not_words():
    rules = TARGETS["gpt2"].mapping(spec(num_layers=12))
    order = [n for n in rules.target_names if n.endswith("ln_1.weight")]
    assert order == [f"transformer.h.{i}.ln_1.weight" for i in range(12)]


def test_names_of_many_layers_are_shown_as_one():
    names = [f"h.{i}.ln.bias" for i in range(12)] + ["wte.weight", "h.0.x.w", "h.2.x.w"]
    assert collapsed(names) == ["h.{0..11}.ln.bias", "wte.weight", "h.{0,2}.x.w"]
