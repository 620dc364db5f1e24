"""A lower learning rate on a plateau of a metric, or on a spike of the loss.

The policies are pure functions over small frozen values; the callback carries those from step to
step and through checkpoints. A value that is not finite is ignored.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from craft_jax.schema import Contradiction, setting
from craft_jax.training.callbacks import (
    Callback,
    Request,
    ScaleLearningRate,
    StepRecord,
    improves,
    metric,
)

# Bounds are compared after many multiplications.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """The metric that a policy watches."""

    monitor: str = setting("val_loss", "the metric that should improve", resumable=True)
    mode: Literal["min", "max"] = setting(
        "min", "whether lower or higher is better", resumable=True
    )
    min_delta: float = setting(
        0.0, "what counts as an improvement beyond the best", minimum=0, resumable=True
    )

    def improves(self, value: float, best: float | None) -> bool:
        """Returns whether a value is better than the best one, None before the first."""
        return improves(value, best, self.mode, self.min_delta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlateauConfig(MonitorConfig):
    """When the learning rate is reduced, beside its schedule."""

    patience: int = setting(
        0,
        "evaluations without improvement that reduce the rate; 0 for never",
        minimum=0,
        resumable=True,
    )
    factor: float = setting(
        0.5, "what a reduction multiplies the rate by", above=0, below=1, resumable=True
    )
    cooldown: int = setting(
        0, "evaluations after a reduction that do not count", minimum=0, resumable=True
    )
    min_scale: float = setting(
        0.01,
        "the least part of the schedule's rate that is left",
        above=0,
        maximum=1,
        resumable=True,
    )
    spike: float | None = setting(
        None,
        "a loss above this factor times its moving average is a spike; none for never",
        above=1,
        resumable=True,
    )
    spike_patience: int = setting(
        1, "spikes in a row that reduce the rate", minimum=1, resumable=True
    )
    window: int = setting(
        50,
        "steps of the moving average, and those after a reduction without another",
        minimum=1,
        resumable=True,
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if self.spike is not None and self.spike_patience > self.window:
            yield Contradiction(
                ("plateau.spike_patience", "plateau.window"),
                f"plateau.spike_patience={self.spike_patience} is more than plateau.window="
                f"{self.window}, after which a new level is the usual one; lower it",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau:
    """The state of the policy for plateaus; a new run starts with `Plateau()`.

    Attributes:
      best: value so far; None before the first.
      waited: evaluations since the best that count.
      cooldown: evaluations that still do not count.
    """

    best: float | None = None
    waited: int = 0
    cooldown: int = 0


def after_evaluation(
    config: PlateauConfig, known: Plateau, value: float, scale: float
) -> tuple[Plateau, float]:
    """Returns what is known after an evaluation, and the factor on the learning rate.

    The rule is that of `ReduceLROnPlateau` in Keras.

    Args:
      config, known: the rule, and what was known before.
      value: of the monitored metric.
      scale: the part of the schedule's rate that is left.
    """
    if not math.isfinite(value):
        return known, 1.0
    cooldown = max(0, known.cooldown - 1)
    waited = 0 if known.cooldown else known.waited
    if config.improves(value, known.best):
        return Plateau(best=value, waited=0, cooldown=cooldown), 1.0
    waited += cooldown == 0
    if not config.patience or waited < config.patience:
        return Plateau(best=known.best, waited=waited, cooldown=cooldown), 1.0
    factor = _bounded(config, scale)
    cooldown = config.cooldown if factor < 1 else cooldown
    return Plateau(best=known.best, waited=0, cooldown=cooldown), factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spikes:
    """The state of the policy for spikes; a new run starts with `Spikes()`.

    Attributes:
      average: moving average of the losses that are no spikes; None before the first.
      seen: losses in it, up to the window.
      in_a_row: spikes up to now.
      cooldown: steps that still do not reduce the rate.
    """

    average: float | None = None
    seen: int = 0
    in_a_row: int = 0
    cooldown: int = 0


def after_step(
    config: PlateauConfig, known: Spikes, loss: float, scale: float
) -> tuple[Spikes, float]:
    """Returns what is known after a step, and the factor on the learning rate.

    The average is that of the losses so far, then an exponential one over `window` steps. Nothing
    is a spike before there are `window` of them. Spikes do not enter it, but `window` of them in a
    row are a new level: the average begins again.

    Args:
      config, known: the rule, and what was known before.
      loss: of the step.
      scale: the part of the schedule's rate that is left.
    """
    assert config.spike is not None
    if not math.isfinite(loss):
        return known, 1.0
    cooldown, seen = max(0, known.cooldown - 1), known.seen
    average = loss if known.average is None else known.average
    is_spike = seen >= config.window and loss > config.spike * average
    if not is_spike:
        seen = min(seen + 1, config.window)
        average += (loss - average) / seen
        return Spikes(average=average, seen=seen, in_a_row=0, cooldown=cooldown), 1.0
    in_a_row = known.in_a_row + 1
    if in_a_row >= config.window:
        return Spikes(average=loss, seen=1, in_a_row=0, cooldown=cooldown), 1.0
    factor = 1.0
    if in_a_row >= config.spike_patience and cooldown == 0:
        factor = _bounded(config, scale)
        cooldown = config.window
    return Spikes(average=average, seen=seen, in_a_row=in_a_row, cooldown=cooldown), factor


def _bounded(config: PlateauConfig, scale: float) -> float:
    """Returns the factor of a reduction that does not go below the minimum."""
    factor = max(config.factor, config.min_scale / scale)
    return 1.0 if factor > 1 - _ROUNDING else factor


class ReduceLROnPlateauOrInstability(Callback):
    """Lowers the learning rate when a metric no longer improves, or when the loss jumps."""

    def __init__(self, config: PlateauConfig):
        self._config = config
        self._plateau, self._spikes, self._scale = Plateau(), Spikes(), 1.0

    def on_step_end(self, record: StepRecord) -> Request | None:
        if self._config.spike is None:
            return None
        loss, average = record.metrics["loss"], self._spikes.average
        self._spikes, factor = after_step(self._config, self._spikes, loss, self._scale)
        return self._reduce(factor, f"loss {loss} is a spike, the average is {average}")

    def on_evaluate_end(self, record: StepRecord) -> Request | None:
        config = self._config
        if not config.patience:
            return None
        value = metric(record, config.monitor, "plateau.monitor")
        best = self._plateau.best
        self._plateau, factor = after_evaluation(config, self._plateau, value, self._scale)
        reason = f"{config.monitor} {value} has not improved on {best} {config.patience} times"
        return self._reduce(factor, reason)

    def _reduce(self, factor: float, reason: str) -> Request | None:
        if factor == 1:
            return None
        self._scale *= factor
        return ScaleLearningRate(factor, reason)

    def state_dict(self) -> dict[str, Any]:
        return {
            "plateau": dataclasses.asdict(self._plateau),
            "spikes": dataclasses.asdict(self._spikes),
            "scale": self._scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._plateau = Plateau(**state["plateau"])
        self._spikes = Spikes(**state["spikes"])
        self._scale = state["scale"]
