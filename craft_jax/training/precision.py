"""The dtype policy: parameters are kept in one dtype and cast to another inside the loss.

Layers follow the dtype of their arguments; only this boundary chooses it. Logits, softmax
statistics and losses are at least float32 by the layers' own rule. float16 has a short range, so
its gradients are scaled up on the way (Micikevicius et al. 2018).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_GOOD_STEPS = 2000
_LARGEST_SCALE = 2.0**24


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
        """Returns the policy called `float32`, `bfloat16` or `float16`."""
        return cls(jnp.dtype(precision))

    @property
    def scales(self) -> bool:
        """Returns whether the loss is scaled, so that small gradients do not vanish."""
        return self.compute_dtype == jnp.float16

    def cast(self, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Casts the floating parameters to the compute dtype; differentiable."""
        return {path: value.astype(self._target(value)) for path, value in params.items()}

    def _target(self, value: jax.Array) -> jnp.dtype:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value.dtype
        if value.dtype == jnp.float64 and self.compute_dtype == jnp.float32:
            return value.dtype
        return self.compute_dtype


FLOAT32 = Policy(jnp.dtype("float32"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """By what the mean loss is multiplied before it is differentiated.

    Attributes:
      value: the factor, a power of two, float32 scalar.
      good_steps: updates made since it changed, int32 scalar.
    """

    value: jax.Array
    good_steps: jax.Array

    @classmethod
    def first(cls) -> "LossScale":
        """Returns the scale of a new run, 2^16."""
        return cls(jnp.asarray(2.0**16, jnp.float32), jnp.zeros((), jnp.int32))

    def adjusted(self, finite: jax.Array) -> "LossScale":
        """Returns the scale after a step: half of it after an overflow, twice after 2000 updates.

        Args:
          finite: whether all gradients were, bool scalar.
        """
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grows = good_steps >= _GOOD_STEPS
        grown = jnp.where(grows, jnp.minimum(self.value * 2, _LARGEST_SCALE), self.value)
        value = jnp.where(finite, grown, jnp.maximum(self.value / 2, 1.0))
        return LossScale(value, jnp.where(grows, 0, good_steps))
