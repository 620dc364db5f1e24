import itertools

import pytest

from interop.errors import AmbiguousSourceError, CollidingKeysError
from interop.mapping.keys import cleaned

ANCHORS = [("transformer.h.0.c.weight", ""), ("h.0.c.weight", "transformer.")]
PLAIN = {"transformer.h.0.c.weight": 1, "transformer.wte.weight": 2, "lm_head.weight": 3}


def prefixed(prefix):
    return {f"{prefix}{name}": value for name, value in PLAIN.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", *("".join(p) for p in itertools.permutations(("_orig_mod.", "module.", "model.")))],
)
def test_wrappers_in_any_order(prefix):
    assert cleaned(prefixed(prefix), ANCHORS).tensors == PLAIN


def test_wrappers_inside_the_path():
    wrapped = {
        "transformer._orig_mod.h.0._fsdp_wrapped_module.c.weight": 1,
        "transformer._orig_mod.wte.weight": 2,
        "lm_head.weight": 3,
    }
    found = cleaned(wrapped, ANCHORS)
    assert found.tensors == PLAIN
    assert found.found == ("_fsdp_wrapped_module.", "_orig_mod.")
    assert found.original["transformer.wte.weight"] == "transformer._orig_mod.wte.weight"


def test_names_without_the_front_that_some_files_leave_out():
    short = {"h.0.c.weight": 1, "wte.weight": 2, "lm_head.weight": 3}
    assert cleaned(short, ANCHORS).tensors == PLAIN


def test_two_names_that_become_one():
    twice = prefixed("") | {"_orig_mod.transformer.wte.weight": 4}
    with pytest.raises(CollidingKeysError, match=r"both become transformer\.wte\.weight"):
        cleaned(twice, ANCHORS)


def test_averaged_weights_beside_the_model_are_not_guessed_at():
    both = prefixed("model.") | prefixed("ema_model.")
    with pytest.raises(AmbiguousSourceError, match=r"'ema_model\.', 'model\.'"):
        cleaned(both, ANCHORS)
    assert cleaned(both, ANCHORS, strip_prefix="model.").tensors == PLAIN


def test_a_prefix_on_some_names_only():
    mixed = prefixed("model.") | {"transformer.wte.weight": 9}
    with pytest.raises(CollidingKeysError, match=r"with the prefix 'model\.' and without"):
        cleaned(mixed, ANCHORS)


def test_ignored_names_are_gone_before_anything_is_compared():
    extra = prefixed("") | {"optimizer.m": 1, "_orig_mod.transformer.wte.weight": 4}
    assert cleaned(extra, ANCHORS, ignore=["optimizer.*", "_orig_mod.*"]).tensors == PLAIN


def test_gamma_and_beta():
    old = PLAIN | {"transformer.ln_f.gamma": 5, "transformer.ln_f.beta": 6}
    found = cleaned(old, ANCHORS).tensors
    assert found["transformer.ln_f.weight"] == 5 and found["transformer.ln_f.bias"] == 6
