"""Callbacks: what happens beside the steps, and when.

A hook receives a `StepRecord`, a small value, and answers nothing or a `Request`; the trainer alone
acts. A callback of your own derives from `Callback` and is named in `training.callbacks`.

The device works ahead of the host. `on_step_end` therefore sees the numbers of a step while the
next one already runs. A callback that needs the state itself says so in `wants_state`; then the
trainer waits for the device and calls `on_sync` with it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from craft_jax.errors import ConfigError
from craft_jax.runtime.logging import side_task
from craft_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A moment of a run.

    Attributes:
      step: updates made so far, this one included.
      num_steps: the length of the run.
      metrics: of this step: `loss`, `learning_rate`, `grad_norm`, `skipped`, a throughput such as
        `tokens_per_second`; after an evaluation also `val_loss` and its companions.
      elapsed: seconds of this process since training began; after a step of several processes,
        those of the slowest, so that all decide the same.
      state: the state after this step; only in `on_sync`, and only valid during the call.
      batch_index: number of the step's batch; None where no step was made.
      batch_md5: of the step's batch, where `log.exact` is set.
      norms: after a step that `log.norms_every` names: `gradient_norms/PATH` (before clipping),
        `parameter_norms/PATH` and `update_norms/PATH` of each parameter.
      is_open: only in `on_train_begin`: the evaluation and samples of this step are still to come.
    """

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    elapsed: float = 0.0
    state: TrainState | None = None
    batch_index: int | None = None
    batch_md5: str | None = None
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    is_open: bool = False

    @property
    def numbers(self) -> dict[str, float]:
        """Metrics and norms, for loggers."""
        return {**self.metrics, **self.norms}

    @property
    def is_last(self) -> bool:
        """Returns whether no step follows."""
        return self.step >= self.num_steps


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Request: evaluate now; the result reaches every callback's `on_evaluate_end`."""


@dataclasses.dataclass(frozen=True)
class Save:
    """Request: write a checkpoint of this state. Ignored where nothing can be saved."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Request: save and end the run after this step.

    Attributes:
      reason: for the log.
      is_final: the run is finished by it: the same command does not go on.
      restore_best: end with the parameters of the best checkpoint, where there is one.
    """

    reason: str
    is_final: bool = False
    restore_best: bool = False


@dataclasses.dataclass(frozen=True)
class ScaleLearningRate:
    """Request: multiply the learning rate by `factor` from the next step on.

    Answered to `on_step_end`, from the step after the next on, since that one may run already.
    """

    factor: float
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class RollBack:
    """Request: go back to the newest checkpoint and continue from there.

    Attributes:
      reason: for the log.
      before: go back to a checkpoint of an earlier step than this one; None for any.
      skips_through: go on with the batches after that of this step, instead of those since the
        checkpoint; None for not skipping any.
    """

    reason: str
    before: int | None = None
    skips_through: int | None = None


Request = Evaluate | Save | Stop | ScaleLearningRate | RollBack


class Callback:
    """Does nothing; derive from it and write the hooks you need."""

    def wants_state(self, step: int, is_last: bool) -> bool:
        """Whether `on_sync` is to be called after this step."""
        return False

    def on_train_begin(self, record: StepRecord) -> None:
        """Before the first step of this process."""

    def on_step_end(self, record: StepRecord) -> Request | None:
        """After every step, with its numbers."""

    def on_sync(self, record: StepRecord) -> Request | None:
        """After a step for which `wants_state` answered yes, with the state."""

    def on_evaluate_end(self, record: StepRecord) -> Request | None:
        """After an evaluation, whose results are in the metrics."""

    def on_roll_back(self, record: StepRecord) -> None:
        """After the run has gone back to an earlier step; what followed it is done again."""

    def on_save(self, record: StepRecord) -> None:
        """Just before a checkpoint of this step is written."""

    def on_train_end(self, record: StepRecord) -> None:
        """After the last step, also when the run was stopped."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint must keep of this callback, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned when the checkpoint was written."""


class Every(Callback):
    """Base of callbacks that act every `every` steps and after the last; 0 only after the last."""

    def __init__(self, every: int):
        self.every = every

    def wants_state(self, step: int, is_last: bool) -> bool:
        return is_last or (self.every > 0 and step % self.every == 0)


class EvaluationCallback(Every):
    """Asks for an evaluation every `every` steps and after the last."""

    def on_sync(self, record: StepRecord) -> Request:
        return Evaluate()


class CheckpointCallback(Every):
    """Asks for a checkpoint every `every` steps, after the last, and at each new best evaluation.

    Args:
      every: steps between checkpoints; 0 for only the last and the best.
      minutes: also this many minutes after the last one; 0 for never.
      metric, mode: what makes an evaluation the best: the `min` or `max` of a metric.
    """

    def __init__(
        self, every: int, *, minutes: float = 0.0, metric: str = "val_loss", mode: str = "min"
    ):
        super().__init__(every)
        self._seconds, self._metric, self._mode = 60 * minutes, metric, mode
        self._now = self._last = 0.0
        self.best: float | None = None

    def wants_state(self, step: int, is_last: bool) -> bool:
        is_late = 0 < self._seconds <= self._now - self._last
        return is_late or super().wants_state(step, is_last)

    def on_step_end(self, record: StepRecord) -> None:
        self._now = record.elapsed

    def on_sync(self, record: StepRecord) -> Request:
        return Save()

    def on_save(self, record: StepRecord) -> None:
        self._last = record.elapsed

    def on_evaluate_end(self, record: StepRecord) -> Request | None:
        value = metric(record, self._metric, "checkpoint.best_metric")
        if not (math.isfinite(value) and improves(value, self.best, self._mode)):
            return None
        self.best = value
        # Where a periodic checkpoint is due anyway, `on_sync` asks for it.
        return None if super().wants_state(record.step, record.is_last) else Save()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state.get("best", state.get("best_loss"))


def improves(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Returns whether a value is better than the best one by more than `min_delta`.

    Args:
      value, best: the latter is None before the first.
      mode: `min` or `max`, which is better.
      min_delta: what does not count.
    """
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def metric(record: StepRecord, name: str, field: str) -> float:
    """Returns a metric of an evaluation.

    Raises:
      ConfigError: there is none of this name; the message begins with `field`.
    """
    value = record.metrics.get(name)
    if value is None:
        known = ", ".join(sorted(k for k, v in record.metrics.items() if v is not None))
        raise ConfigError(f"{field}={name} is no metric of this run; there are {known}")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Something that a model made.

    Attributes:
      words: text, or what there is to see.
      picture: uint8 (H, W, C), for a PNG file; None for text alone.
    """

    words: str
    picture: np.ndarray | None = None


class SampleCallback(Every):
    """Shows what the model produces, every `every` steps; a failure is a warning.

    Args:
      every: steps between samples; 0 for none.
      sample: makes a sample from a state.
      show: receives the step and the sample.
    """

    def __init__(
        self,
        every: int,
        sample: Callable[[TrainState], Sample],
        show: Callable[[int, Sample], None],
    ):
        super().__init__(every)
        self._sample, self._show = sample, show

    def wants_state(self, step: int, is_last: bool) -> bool:
        # The command shows a longer sample after the last step.
        return not is_last and super().wants_state(step, is_last)

    def on_sync(self, record: StepRecord) -> None:
        assert record.state is not None
        with side_task(f"the sample of step {record.step}"):
            self._show(record.step, self._sample(record.state))
