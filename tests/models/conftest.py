"""Model tests run without implicit dtype promotion, so that no layer widens a dtype unnoticed."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
