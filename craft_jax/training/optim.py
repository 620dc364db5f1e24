"""Optimizer and learning-rate schedule, from the `optim` section of a config.

The learning rate is a number of its own, which the train step hands to the optimizer, so that it
can be logged, and scaled while a run goes on.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from craft_jax.schema import Contradiction, setting

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters move."""

    name: Literal["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free_adamw"] = setting(
        "adamw", "the optimizer; muon takes the inner matrices, and leaves the rest to adamw"
    )
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
    lr_multipliers: tuple[str, ...] = setting(
        (), "factors on the learning rate by path, PATTERN=FACTOR; the first that is found decides"
    )
    decay_multipliers: tuple[str, ...] = setting(
        (), "factors on the weight decay by path, PATTERN=FACTOR, in place of matrices only"
    )
    # Closer to 1 they are 1 in float32, and the moments' correction divides by zero.
    beta1: float = setting(
        0.9, "decay of the first moment, the momentum of sgd", minimum=0, maximum=0.999999
    )
    beta2: float = setting(0.99, "decay of the second moment", minimum=0, maximum=0.999999)
    eps: float = setting(1e-8, "added to the root of the second moment", minimum=1e-30)
    clip_norm: float | None = setting(
        1.0, "largest norm of the whole gradient; none for no clipping", above=0
    )
    moment_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the first moment; the second needs the digits of float32"
    )
    ema_decay: float | None = setting(
        None,
        "decay of an average of the parameters that is evaluated and exported; none for none",
        minimum=0,
        below=1,
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
        if self.name == "schedule_free_adamw" and not self.beta1:
            yield Contradiction(
                ("optim.name", "optim.beta1"),
                "optim.beta1=0.0 leaves optim.name=schedule_free_adamw no average; use 0.9",
            )
        if self.name == "schedule_free_adamw" and self.ema_decay is not None:
            yield Contradiction(
                ("optim.name", "optim.ema_decay"),
                f"optim.ema_decay={self.ema_decay} with optim.name=schedule_free_adamw would be "
                "the average of an average; leave it out",
            )
        for name in ("lr_multipliers", "decay_multipliers"):
            for part in getattr(self, name):
                if wrong := _wrong_multiplier(part):
                    yield Contradiction(
                        (f"optim.{name}",),
                        f"optim.{name}={part}: {wrong}; write PATTERN=FACTOR, as in embedding$=0.1",
                    )
        if self.decay_steps is not None and (self.warmup_steps or 0) > self.decay_steps:
            yield Contradiction(
                ("optim.warmup_steps", "optim.decay_steps"),
                f"optim.warmup_steps={self.warmup_steps} is more than "
                f"optim.decay_steps={self.decay_steps}; warm up in fewer steps",
            )


def _wrong_multiplier(text: str) -> str | None:
    pattern, _, factor = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern} is no regular expression ({error})"
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not (pattern and 0 <= value <= 1e6):
        return "a factor is a number from 0 to 1e6"
    return None


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


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients and a learning rate change parameters, and which average of them is kept.

    Attributes:
      at: the optax transformation for a learning rate, a float32 scalar; its updates are added to
        the parameters.
      ema_decay: of the average; None for none.
      is_schedule_free: whether the average is that of the optimizer itself.
    """

    at: Callable[[Any], optax.GradientTransformation]
    ema_decay: float | None = None
    is_schedule_free: bool = False

    @property
    def averages(self) -> bool:
        """Returns whether an average of the parameters is kept."""
        return self.is_schedule_free or self.ema_decay is not None

    def init(self, params: Mapping[str, jax.Array]) -> Any:
        """Returns the state before the first update."""
        return self.at(0.0).init(params)

    def apply(
        self, grads: Any, opt_state: Any, params: Mapping[str, jax.Array], learning_rate: jax.Array
    ) -> tuple[dict[str, jax.Array], Any]:
        """Returns the parameters and the state after an update."""
        updates, opt_state = self.at(learning_rate).update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), opt_state

    def average(self, params: Any, opt_state: Any, average: Any, step: jax.Array) -> Any:
        """Returns the average after an update, None if there is none.

        An exponential moving average forgets the beginning sooner: its decay is at most
        `(1 + n) / (10 + n)` after n updates, as in TensorFlow.

        Args:
          params, opt_state: after the update.
          average: before the update.
          step: number of updates before this one, int32 scalar.
        """
        if self.is_schedule_free:
            return contrib.schedule_free_eval_params(_find_schedule_free(opt_state), params)
        if self.ema_decay is None:
            return None
        n = step.astype(jnp.float32)
        decay = jnp.minimum(self.ema_decay, (1 + n) / (10 + n))
        return jax.tree.map(lambda a, p: a + (1 - decay).astype(p.dtype) * (p - a), average, params)


def make_optimizer(config: OptimConfig, constants: Collection[str] = ()) -> Optimizer:
    """Returns the optimizer that a config names.

    `constants` are the paths of parameters that never train, `ModelDef.constants`; they do not
    decay.

    Weight decay is decoupled, and applies to parameters of two or more dimensions: kernels and
    embeddings, not biases, norms and constants; `decay_multipliers` change that by path.

    - `adamw`: Loshchilov & Hutter 2019.
    - `adafactor`: Shazeer & Stern 2018, with updates relative to the scale of each parameter, and
      without momentum.
    - `lion`: Chen et al. 2023. It wants a learning rate about a fifth of AdamW's.
    - `sgd`: with momentum `beta1`.
    - `muon`: Jordan et al. 2024 for the matrices between embedding and head, scaled to the size of
      AdamW's updates (Liu et al. 2025), so that one learning rate serves both; AdamW for the rest.
    - `schedule_free_adamw`: Defazio et al. 2024; evaluated at its own average.
    """

    def at(learning_rate: Any) -> optax.GradientTransformation:
        steps = []
        if config.clip_norm is not None:
            steps.append(optax.clip_by_global_norm(config.clip_norm))
        inner = [_direction(config, constants)]
        if config.weight_decay:
            inner.append(_decay(config, constants))
        if config.lr_multipliers:
            inner.append(_multiply(config.lr_multipliers))
        inner.append(optax.scale(-learning_rate))
        if config.name == "schedule_free_adamw":
            inner = [contrib.schedule_free(optax.chain(*inner), learning_rate, b1=config.beta1)]
        return optax.chain(*steps, *inner)

    return Optimizer(at, config.ema_decay, is_schedule_free=config.name == "schedule_free_adamw")


def _direction(config: OptimConfig, constants: Collection[str]) -> optax.GradientTransformation:
    dtype = config.moment_dtype
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=dtype)
    match config.name:
        case "adamw":
            return adam
        case "adafactor":
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        case "lion":
            return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=dtype)
        case "sgd":
            return optax.trace(config.beta1, accumulator_dtype=dtype)
        case "muon":
            muon = contrib.scale_by_muon(mu_dtype=dtype, weight_dimension_numbers=_matrices)
            muon = optax.chain(muon, optax.stateless(_like_adamw))
            kinds = functools.partial(_muon_or_adamw, constants)
            return optax.partition({"muon": muon, "adamw": adam}, kinds)
        case "schedule_free_adamw":
            # Momentum is what the average replaces.
            return optax.scale_by_rms(
                config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True
            )


def _muon_or_adamw(constants: Collection[str], params: Mapping[str, Any]) -> dict[str, str]:
    def is_inner(path: str, value: Any) -> bool:
        is_outer = re.search(r"embedding$|^head\.", path) or path in constants
        return value.ndim == 2 and not is_outer

    return {path: "muon" if is_inner(path, v) else "adamw" for path, v in params.items()}


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


def _like_adamw(updates: Any, params: Any) -> Any:
    """Scales orthogonal updates to the root mean square that AdamW's usually have."""
    del params
    return jax.tree.map(lambda u: u * (0.2 * max(u.shape) ** 0.5), updates)


def _decay(config: OptimConfig, constants: Collection[str]) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        is_matrix = {path: value.ndim >= 2 for path, value in params.items()}
        factors = by_path(config.decay_multipliers, params, is_matrix)
        factors |= dict.fromkeys(constants, 0)
        return {
            path: u + config.weight_decay * factors[path] * params[path] if factors[path] > 0 else u
            for path, u in updates.items()
        }

    return optax.stateless(add)


def _multiply(multipliers: Sequence[str]) -> optax.GradientTransformation:
    def multiply(updates: Any, params: Any) -> Any:
        del params
        factors = by_path(multipliers, updates, {})
        return {path: u * factors[path] for path, u in updates.items()}

    return optax.stateless(multiply)


def by_path(
    multipliers: Sequence[str], params: Mapping[str, Any], default: Mapping[str, float]
) -> dict[str, float]:
    """Returns a factor for each parameter path.

    Args:
      multipliers: `PATTERN=FACTOR`; the first whose regular expression is found in a path decides.
      params: by path.
      default: of paths that no pattern is found in; 1 where it says nothing.
    """
    rules = [(re.compile(p), float(f)) for p, _, f in (m.rpartition("=") for m in multipliers)]

    def factor(path: str) -> float:
        found = (value for pattern, value in rules if pattern.search(path))
        return next(found, float(default.get(path, 1.0)))

    return {path: factor(path) for path in params}


def _find_schedule_free(opt_state: Any) -> contrib.ScheduleFreeState:
    def is_it(node: Any) -> bool:
        return isinstance(node, contrib.ScheduleFreeState)

    return next(filter(is_it, jax.tree.leaves(opt_state, is_leaf=is_it)))
