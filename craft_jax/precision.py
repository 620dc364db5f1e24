"""The dtype policy: parameters are kept in one dtype and cast to another inside the loss.

Layers follow the dtype of their arguments; only this boundary chooses it. Logits, softmax
statistics and losses are at least float32 by the layers' own rule.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which dtype computes.

    Attributes:
      compute_dtype: of the parameters inside the loss, hence of products and activations. Wider
        parameters are narrowed to it, except float64 ones under float32, which stay as they are.
    """

    compute_dtype: jnp.dtype

    @classmethod
    def named(cls, precision: str) -> "Policy":
        """Returns the policy called `float32` or `bfloat16`."""
        return cls(jnp.dtype(precision))

    def cast(self, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Casts the floating parameters to the compute dtype; differentiable."""
        return {path: value.astype(self._target(value)) for path, value in params.items()}

    def _target(self, value: jax.Array) -> jnp.dtype:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value.dtype
        if value.dtype == jnp.float64 and self.compute_dtype == jnp.float32:
            return value.dtype
        return self.compute_dtype
