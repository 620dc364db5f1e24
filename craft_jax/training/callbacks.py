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

from craft_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A moment of a run.

    Attributes:
      step: updates made so far, this one included.
      num_steps: the length of the run.
      metrics: of this step: `loss`, `learning_rate`, `grad_norm`, `skipped`, a throughput such as
        `tokens_per_second`; after an evaluation also `val_loss` and its companions.
      elapsed: seconds of this process since training began.
      state: the state after this step; only in `on_sync`, and only valid during the call.
      batch_md5: of the step's batch, where `log.exact` is set.
      is_open: only in `on_train_begin`: the evaluation and samples of this step are still to come.
    """

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    elapsed: float = 0.0
    state: TrainState | None = None
    batch_md5: str | None = None
    is_open: bool = False

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step >= self.num_steps


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Request: evaluate now; the result reaches every callback's `on_evaluate_end`."""


@dataclasses.dataclass(frozen=True)
class Save:
    """Request: write a checkpoint of this state. Ignored where nothing can be saved."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Request: save and end the run after this step."""

    reason: str


@dataclasses.dataclass(frozen=True)
class ScaleLearningRate:
    """Request: multiply the learning rate by `factor` from the next step on.

    Answered to `on_step_end`, from the step after the next on, since that one may run already.
    """

    factor: float
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class RollBack:
    """Request: go back to the newest checkpoint and continue from there."""

    reason: str


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
    """Asks for a checkpoint every `every` steps, after the last, and at each new best loss."""

    def __init__(self, every: int):
        super().__init__(every)
        self.best_loss = math.inf

    def on_sync(self, record: StepRecord) -> Request:
        return Save()

    def on_evaluate_end(self, record: StepRecord) -> Request | None:
        loss = record.metrics["val_loss"]
        if not loss < self.best_loss:
            return None
        self.best_loss = loss
        # Where a periodic checkpoint is due anyway, `on_sync` asks for it.
        return None if self.wants_state(record.step, record.is_last) else Save()

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state.get("best_loss")
        self.best_loss = math.inf if best is None else best


class SampleCallback(Every):
    """Shows what the model produces, every `every` steps.

    Args:
      every: steps between samples; 0 for none.
      sample: makes a sample from a state and the number of its step.
      show: receives the step and the sample.
    """

    def __init__(
        self,
        every: int,
        sample: Callable[[TrainState], str],
        show: Callable[[int, str], None],
    ):
        super().__init__(every)
        self._sample, self._show = sample, show

    def wants_state(self, step: int, is_last: bool) -> bool:
        # The command shows a longer sample after the last step.
        return not is_last and super().wants_state(step, is_last)

    def on_sync(self, record: StepRecord) -> None:
        assert record.state is not None
        self._show(record.step, self._sample(record.state))
