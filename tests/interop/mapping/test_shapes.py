import pytest

from craft_jax.models import base, model_class
from interop.mapping.shapes import leaves
from tests.interop.models import SPECS, spec


@pytest.mark.parametrize("name", SPECS)
def test_they_are_those_of_the_model(name):
    known = spec(**SPECS[name])
    cls = model_class(known.name)
    shapes = base.define(cls, cls.Config(**known.model_config())).shapes
    found = leaves(known)
    assert {n: (leaf.shape, leaf.dtype) for n, leaf in found.items()} == {
        n: (leaf.shape, leaf.dtype) for n, leaf in shapes.items()
    }
