"""Optimizer and learning-rate schedule, from the `optim` section of a config.

The optimizer answers with directions; the train step multiplies them by the learning rate, which
is a number of its own so that it can be logged, and scaled while a run goes on.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from craft_jax.schema import Contradiction, setting

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters move."""

    name: Literal["adamw"] = setting("adamw", "the optimizer: adamw")
    learning_rate: float = setting(1e-3, "the peak learning rate", above=0, maximum=1e6)
    min_learning_rate: float = setting(
        1e-4, "where cosine, linear and wsd end, and the floor of inverse_sqrt", minimum=0
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = setting(
        "cosine", "the shape after the warm-up"
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up; none for a tenth of the schedule, at most 2000", minimum=0
    )
    decay_steps: int | None = setting(
        None, "the step at which the schedule ends; none for training.num_steps", minimum=1
    )
    wsd_fraction: float = setting(
        0.2, "the last part of the schedule in which wsd decays", above=0, maximum=1
    )
    weight_decay: float = setting(
        0.1, "decoupled weight decay, on matrices only", minimum=0, maximum=1e6
    )
    # Closer to 1 they are 1 in float32, and the moments' correction divides by zero.
    beta1: float = setting(0.9, "decay of the first moment", minimum=0, maximum=0.999999)
    beta2: float = setting(0.99, "decay of the second moment", minimum=0, maximum=0.999999)
    eps: float = setting(1e-8, "added to the root of the second moment", minimum=1e-30)
    clip_norm: float | None = setting(
        1.0, "largest norm of the whole gradient; none for no clipping", above=0
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if self.min_learning_rate > self.learning_rate:
            yield Contradiction(
                ("optim.min_learning_rate", "optim.learning_rate"),
                f"optim.min_learning_rate={self.min_learning_rate} is above "
                f"optim.learning_rate={self.learning_rate}; try {self.learning_rate / 10:g}",
            )
        if self.learning_rate * self.weight_decay > 1:
            yield Contradiction(
                ("optim.learning_rate", "optim.weight_decay"),
                f"optim.learning_rate={self.learning_rate} times optim.weight_decay="
                f"{self.weight_decay} is above 1: each step would take away more than the weights; "
                "lower one of them",
            )
        if self.decay_steps is not None and (self.warmup_steps or 0) > self.decay_steps:
            yield Contradiction(
                ("optim.warmup_steps", "optim.decay_steps"),
                f"optim.warmup_steps={self.warmup_steps} is more than "
                f"optim.decay_steps={self.decay_steps}; warm up in fewer steps",
            )


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates made before this one.

    The warm-up of w steps gives update i the rate `peak * (i + 1) / (w + 1)`. After it: `constant`;
    `linear` and `cosine` down to the minimum at `decay_steps`; `wsd` (warm-up, stable, decay; Hu et
    al. 2024) constant, then linear over the last `wsd_fraction`; `inverse_sqrt` (Vaswani et al.
    2017) falling with the root of the step, not below the minimum.

    Args:
      config: rates and shape.
      num_steps: the length of the run, where `decay_steps` is None.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    end = config.decay_steps or num_steps
    warmup = min(2000, end // 10) if config.warmup_steps is None else config.warmup_steps
    decay_start = max(warmup, int(end * (1 - config.wsd_fraction)))

    def schedule(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, end - warmup), 0, 1)
        match config.schedule:
            case "constant":
                rate = jnp.full_like(step, peak)
            case "linear":
                rate = peak + (low - peak) * progress
            case "cosine":
                rate = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case "wsd":
                late = jnp.clip((step - decay_start) / max(1, end - decay_start), 0, 1)
                rate = peak + (low - peak) * late
            case "inverse_sqrt":
                rate = jnp.maximum(low, peak * jnp.sqrt((warmup + 1) / jnp.maximum(step + 1, 1)))
        return jnp.where(step < warmup, peak * (step + 1) / (warmup + 1), rate)

    return schedule


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov & Hutter 2019) without its learning rate.

    Its updates are to be multiplied by minus the learning rate. Weight decay applies to parameters
    of two or more dimensions: kernels and embeddings, not biases, norms and constants.
    """
    steps = []
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    steps.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps))
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    return optax.chain(*steps)


def decays(params: Mapping[str, Any]) -> dict[str, bool]:
    """Returns, for each parameter path, whether it decays: matrices do, but for constants."""
    return {
        path: value.ndim >= 2 and not path.endswith(".constant") for path, value in params.items()
    }
