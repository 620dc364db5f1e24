import numpy as np
import pytest

from interop.errors import NotRepresentableError
from interop.mapping import folds
from interop.mapping.shapes import leaves
from tests.interop.models import SPECS, random_leaves, spec


@pytest.mark.parametrize("name", ["craft c", "craft f", "craft f, no bias"])
def test_constant_cross_attention_is_folded_into_a_bias(name):
    known = spec(**SPECS[name])
    folded = folds.without_cross_attention(known)
    before = random_leaves(known)
    after = folds.towards(known, before, folded)
    assert set(after) == set(leaves(folded)) and list(after) == list(leaves(folded))
    for leaf, tensor in after.items():
        changed = known.bias and leaf.endswith("attn.out.bias")
        assert tensor.dtype == np.float32
        assert np.array_equal(tensor.read(), before[leaf].read()) != changed
    if known.bias:
        wide = {n: t.read().astype(np.float64) for n, t in before.items()}
        constant = wide["blocks.1.cross.out.bias"]
        if known.cross_attention == "zeros":
            kernel = wide["blocks.1.cross.out.kernel"]
            constant = constant + wide["blocks.1.cross.value.bias"] @ kernel
        expected = (wide["blocks.1.attn.out.bias"] + constant).astype(np.float32)
        assert np.array_equal(after["blocks.1.attn.out.bias"].read(), expected)


def test_a_norm_after_it_forbids_that():
    with pytest.raises(NotRepresentableError, match="layer norms follow"):
        folds.without_cross_attention(spec(**SPECS["craft f, post-norm"]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_factor_on_embeddings_goes_into_their_table(tied):
    known = spec(**SPECS["craft e"] | {"tie_embeddings": tied})
    folded = spec(name="transformer", tie_embeddings=False)
    before = random_leaves(known)
    after = folds.towards(known, before, folded)
    table = before["token_embedding.embedding"].read()
    scaled = (table.astype(np.float64) * np.sqrt(48)).astype(np.float32)
    assert np.array_equal(after["token_embedding.embedding"].read(), scaled)
    head = table if tied else before["head.embedding"].read()
    assert np.array_equal(after["head.embedding"].read(), head)
