"""The trainer: the host side of training. The device side is `training/step.py`.

It dispatches a step, handles the metrics of the step before while that runs, calls the callbacks,
and carries out their requests.
"""

import dataclasses
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from craft_jax.checkpoint.manager import CheckpointManager
from craft_jax.data.base import Dataset
from craft_jax.errors import DivergedError, StoppedError
from craft_jax.runtime import fault_injection
from craft_jax.runtime.signals import StopFlag, StopSignal
from craft_jax.runtime.watchdog import Watchdog
from craft_jax.training import recovery
from craft_jax.training.callback_list import CallbackList
from craft_jax.training.callbacks import (
    Callback,
    Evaluate,
    Request,
    RollBack,
    Save,
    ScaleLearningRate,
    StepRecord,
    Stop,
)
from craft_jax.training.compiled_step import CompiledStep
from craft_jax.training.evaluation import Evaluator
from craft_jax.training.feed import BatchFeed, DeviceBatch
from craft_jax.training.recovery import Halt, Recovery, SwitchToFloat32
from craft_jax.training.settings import TrainingConfig
from craft_jax.training.state import TrainState
from craft_jax.training.step import Metrics, named_norms

logger = logging.getLogger(__name__)


class _InterruptedError(Exception):
    """A signal arrived during an evaluation, which can be repeated."""


class _Pending(NamedTuple):
    """A step that the device may still compute."""

    step: int
    metrics: Metrics
    items: int
    batch_index: int
    batch_md5: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended.

    Attributes:
      step: updates made in the whole run.
      metrics: of the last step, with those of the last evaluation.
      stopped: why it ended early; None if it ran to the end.
    """

    step: int
    metrics: Mapping[str, float]
    stopped: str | None = None


class Trainer:
    """Trains any `Model` on batches.

    Args:
      train_step: see `CompiledStep`.
      feed: the training batches.
      config: how long to train, and how to recover from bad steps.
      evaluator, val_data: no evaluation where `val_data` is None.
      callbacks: called in this order.
      manager: writes and restores checkpoints; None keeps nothing.
      stop_signal: polled after every step, during an evaluation and while waiting for data.
      watchdog: is notified of progress.
    """

    def __init__(
        self,
        train_step: CompiledStep,
        feed: BatchFeed,
        config: TrainingConfig,
        *,
        evaluator: Evaluator,
        val_data: Dataset | None,
        callbacks: Iterable[Callback] = (),
        manager: CheckpointManager | None = None,
        stop_signal: StopFlag | None = None,
        watchdog: Watchdog | None = None,
    ):
        self._train_step, self._feed, self._config = train_step, feed, config
        self._evaluator, self._val_data = evaluator, val_data
        self._callbacks = CallbackList(callbacks)
        self._manager = manager
        self._signal = stop_signal or StopSignal()
        self._watchdog = watchdog or Watchdog(0)
        self._stop: Stop | None = None
        self._roll_back: RollBack | None = None
        self._save_requested = self._evaluation_requested = False
        self._recovery = Recovery()
        self._scalings: list[tuple[int, float]] = []
        self._last_validation: dict[str, float] = {}
        self._data_start = 0
        self._may_interrupt, self._has_compiled = True, False

    def fit(
        self, state: TrainState, meta: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, FitResult]:
        """Trains until `num_steps`, a `Stop`, or a signal. A run that ends early is saved first.

        Args:
          state: the state to start from; its buffers are donated.
          meta: of the checkpoint that the state was read from; None for a new run.

        Returns:
          The last state, and how training ended.

        Raises:
          DivergedError: too many updates in a row were skipped, see `recovery`.
          StorageError: the last checkpoint, or several in a row, could not be written.
          StoppedError: a signal arrived before there was anything to save.
        """
        record = self._begin(state, meta or {})
        try:
            self._callbacks.on_train_begin(record)
            if record.is_open:
                record = self._sync(record, self._wanting_state(record.step))
            while not record.is_last and not self._stop:
                pending: _Pending | None = None
                self._start_window()
                for step, batch in enumerate(self._batches(record.step), start=record.step + 1):
                    arrays = self._signal.attach(batch.arrays, self._train_step.mesh, self._elapsed)
                    in_float32 = self._recovery.is_in_float32(step)
                    self._state, metrics = self._train_step(
                        self._state, arrays, in_float32=in_float32
                    )
                    self._signal.defer()
                    if pending:  # The metrics of the step before, while this one runs.
                        record = self._handle_metrics(pending)
                    index = step - 1 - self._data_start
                    pending = _Pending(step, metrics, batch.items, index, batch.md5)
                    self._scale_learning_rate(step)
                    wanting = self._wanting_state(step)
                    if wanting or step == self._config.num_steps or self._must_sync():
                        record = self._sync(self._handle_metrics(pending), wanting)
                        pending = None
                    if self._stop or self._roll_back:
                        break
                else:
                    if self._must_sync():  # A signal arrived while it waited for data.
                        record = self._sync(self._handle_metrics(pending) if pending else record)
                if self._roll_back:
                    record = self._carry_out_roll_back(record)
        finally:
            self._callbacks.on_train_end(record)
            if self._manager:
                self._manager.close()
        metrics = {**self._last_validation, **record.metrics}
        stopped = self._stop.reason if self._stop else None
        return self._state, FitResult(step=record.step, metrics=metrics, stopped=stopped)

    def _begin(self, state: TrainState, meta: Mapping[str, Any]) -> StepRecord:
        self._state, self._start_time = state, time.monotonic()
        self._load_meta(meta)
        is_open = bool(meta.get("is_open"))
        metrics = dict(meta["metrics"]) if is_open else {}
        return self._record(int(state.step), metrics, is_open=is_open)

    def _batches(self, first: int) -> Iterator[DeviceBatch]:
        """Yields the batches of the steps after `first`; ends early when a signal arrives.

        Raises:
          StoppedError: a signal arrived before the first batch, so there is nothing to save.
        """
        # A dataset is used by one thread at a time.
        self._train_step.wait_for_batch()
        start, num_steps = self._data_start, self._config.num_steps
        batches: Generator[DeviceBatch] = self._feed.batches(first - start, num_steps - start)
        is_first = True
        try:
            while not self._signal.is_set:
                try:
                    with self._signal.waiting():
                        batch = next(batches, None)
                except StoppedError:
                    if is_first:
                        raise
                    return
                if batch is None:
                    return
                fault_injection.point("compile" if is_first else "step")
                yield batch
                is_first = False
        finally:
            batches.close()

    def _handle_metrics(self, pending: _Pending) -> StepRecord:
        """Waits for the metrics of a step, calls the callbacks, and recovers from a bad step."""
        numbers = dict(pending.metrics)
        elapsed = self._signal.agree(numbers)
        norms = numbers.pop("norms", {})
        is_due = norms and pending.step % self._train_step.norms_every == 0
        values = {name: float(value) for name, value in numbers.items()}
        self._watchdog.step()
        if self._manager:
            self._manager.poll()
        values["skipped"] = int(values["skipped"])
        self._window_items += pending.items
        seconds = time.monotonic() - self._window_start
        values[f"{self._feed.task.unit}_per_second"] = self._window_items / max(seconds, 1e-9)
        if pending.step % self._config.log_every == 0 or not self._has_compiled:
            self._start_window()  # Throughput leaves out compiling, evaluations and saves.
            self._has_compiled = True
        record = self._record(
            pending.step,
            values,
            elapsed=elapsed,
            norms=named_norms(norms) if is_due else {},
            batch_index=pending.batch_index,
            batch_md5=pending.batch_md5,
        )
        # The next step may already run: in any case it keeps its learning rate, so that evaluating
        # and saving do not change a run.
        for request in self._callbacks.on_step_end(record):
            self._accept(request, record.step + 1)
        self._recovery, requests = recovery.after_step(self._config, self._recovery, record)
        for request in requests:
            self._accept(request, record.step + 1)
        return record

    def _wanting_state(self, step: int) -> list[Callback]:
        return self._callbacks.wanting_state(step, is_last=step == self._config.num_steps)

    def _must_sync(self) -> bool:
        """Returns whether a signal or a callback's request needs the state now."""
        if self._signal.is_set and not self._stop:
            self._stop = Stop(self._signal.name or "a signal")
        return bool(
            self._stop or self._roll_back or self._save_requested or self._evaluation_requested
        )

    # Requests.

    def _accept(self, request: Request | recovery.Request | None, step: int) -> None:
        """Notes a request until it can be carried out.

        Args:
          request: the answer of a callback or of the recovery.
          step: the step after which a new learning rate holds.

        Raises:
          DivergedError: the recovery ended the run.
          TypeError: it is not a request.
        """
        match request:
            case None:
                pass
            case Evaluate():
                self._evaluation_requested = True
            case Save():
                self._save_requested = True
            case Stop():
                self._stop = request
            case RollBack():
                self._roll_back = request
            case ScaleLearningRate(factor, reason):
                logger.info("learning rate scaled by %g: %s", factor, reason or "a callback")
                self._scalings.append((step, factor))
            case SwitchToFloat32(after, reason):
                logger.warning("%s: the run goes on in float32 after step %d", reason, after)
            case Halt(message):
                raise DivergedError(message)
            case _:
                raise TypeError(f"a callback answered {request!r}, which is no Request")

    def _scale_learning_rate(self, step: int) -> None:
        """Carries out the scalings that hold for the steps after this one."""
        due = [factor for first, factor in self._scalings if first <= step]
        self._scalings = [(first, factor) for first, factor in self._scalings if first > step]
        for factor in due:
            self._state = self._state.replace(lr_scale=self._state.lr_scale * factor)

    def _carry_out_roll_back(self, record: StepRecord) -> StepRecord:
        """Restores an earlier checkpoint; returns the record to continue from."""
        request, self._roll_back = self._roll_back, None
        assert request is not None
        restored = self._manager.restore(before=request.before) if self._manager else None
        if restored is None:
            if request.before is None:
                raise DivergedError(
                    f"asked to roll back ({request.reason}), but there is no checkpoint yet"
                )
            logger.warning("%s: no checkpoint to go back to; going on", request.reason)
            return record
        start, scale = self._data_start, self._state.lr_scale
        self._state, meta = restored
        self._load_meta(meta)
        back = self._record(int(self._state.step), {})
        skipped = ""
        if request.skips_through is not None:
            following = request.skips_through - start
            first = back.step - self._data_start
            self._state = self._state.replace(lr_scale=jnp.minimum(scale, self._state.lr_scale))
            self._skip_data(back.step, following, meta)
            skipped = f"; batches {first} to {following - 1} are skipped"
        logger.warning(
            "rolled back from step %d to step %d: %s%s",
            record.step,
            back.step,
            request.reason,
            skipped,
        )
        self._callbacks.on_roll_back(back)
        return back

    def _skip_data(self, step: int, following: int, meta: Mapping[str, Any]) -> None:
        """Continues with the batch `following` at a step, also if the run is killed now."""
        roll_backs = self._recovery.roll_backs + 1
        self._recovery = dataclasses.replace(self._recovery, roll_backs=roll_backs)
        self._data_start = step - following
        more = {"data_start": self._data_start, "roll_backs": roll_backs}
        assert self._manager is not None
        self._manager.save(self._state, {**meta, **more})

    # What needs the state of a step: `on_sync`, evaluation, saving.

    def _sync(self, record: StepRecord, wanting: Iterable[Callback] = ()) -> StepRecord:
        """Calls `on_sync`, evaluates and saves, as requested.

        A signal during an evaluation saves the state as it was before; the evaluation and the rest
        follow when the run is resumed. Those of the last step are done now.
        """
        before = self._meta(record) | {"is_open": True}
        if record.is_last and self._signal.is_set:
            self._save(record, before, is_announced=False)
        try:
            done = self._call_on_sync(record, wanting)
        except _InterruptedError:
            if not record.is_last:
                self._must_sync()
                self._save(record, before)
                return record
            self._save(record, before, is_announced=False)
            self._load_meta(before)
            done = self._call_on_sync(record, wanting)
        self._scale_learning_rate(done.step)
        if self._stop and self._stop.restore_best:
            done = self._restore_best_params(done)
        if self._save_requested or self._stop:
            self._save(done, self._meta(done))
        self._save_requested = False
        self._start_window()
        self._watchdog.restart()
        return done

    def _call_on_sync(self, record: StepRecord, wanting: Iterable[Callback]) -> StepRecord:
        self._may_interrupt = not (record.is_last and self._signal.is_set)
        with self._watchdog.slow_work():
            record = self._evaluate_if_requested(record)
            for callback in wanting:
                with_state = dataclasses.replace(record, state=self._state)
                self._accept(callback.on_sync(with_state), record.step)
                record = self._evaluate_if_requested(record)
        return record

    def _evaluate_if_requested(self, record: StepRecord) -> StepRecord:
        requested, self._evaluation_requested = self._evaluation_requested, False
        if not requested or self._val_data is None:
            return record
        validation = self.evaluate(self._state, self._val_data)
        self._last_validation = {f"val_{name}": value for name, value in validation.items()}
        record = dataclasses.replace(record, metrics={**record.metrics, **self._last_validation})
        for request in self._callbacks.on_evaluate_end(record):
            self._accept(request, record.step)
        return record

    def evaluate(self, state: TrainState, data: Dataset) -> dict[str, Any]:
        """Returns the metrics of one pass over a split."""

        def between_batches() -> None:
            fault_injection.point("eval")
            self._watchdog.restart()
            if self._signal.is_set and self._may_interrupt:
                raise _InterruptedError

        with self._watchdog.slow_work():
            sums = self._evaluator(state.eval_params, data, between_batches)
        return self._feed.task.metrics(sums, data)

    def _restore_best_params(self, record: StepRecord) -> StepRecord:
        """Continues with the parameters of the best checkpoint; the optimizer keeps its state."""
        restored = self._manager.restore_best(record.metrics) if self._manager else None
        if restored is None:
            return record
        best, meta = restored
        self._state = self._state.replace(params=best.params, average=best.average)
        logger.info("the parameters of step %d are restored", int(best.step))
        known = {k: v for k, v in meta["metrics"].items() if k.startswith("val_")}
        return dataclasses.replace(record, metrics={**record.metrics, **known})

    def _save(self, record: StepRecord, meta: dict, *, is_announced: bool = True) -> None:
        if self._manager is None:
            return
        if is_announced:  # Else the step is not complete, and loggers do not write it yet.
            self._callbacks.on_save(record)
        with self._watchdog.slow_work():
            is_final = record.is_last or bool(self._stop)
            self._manager.save(self._state, meta, is_final=is_final)

    # Checkpoints keep this beside the state.

    def _meta(self, record: StepRecord) -> dict:
        return {
            "metrics": dict(record.metrics),
            "callbacks": self._callbacks.state_dict(),
            **self._recovery.to_meta(),
            "scalings": list(self._scalings),
            "data_start": self._data_start,
            "ended": self._stop.reason if self._stop and self._stop.is_final else None,
        }

    def _load_meta(self, meta: Mapping[str, Any]) -> None:
        self._recovery = Recovery.from_meta(meta, self._recovery.roll_backs)
        self._scalings = [(step, factor) for step, factor in meta.get("scalings", ())]
        self._data_start = meta.get("data_start", 0)
        self._callbacks.load_state_dict(meta.get("callbacks", {}))

    def _record(
        self, step: int, metrics: Mapping[str, float], *, elapsed: float | None = None, **more: Any
    ) -> StepRecord:
        elapsed = self._elapsed if elapsed is None else elapsed
        num_steps = self._config.num_steps
        return StepRecord(step=step, num_steps=num_steps, metrics=metrics, elapsed=elapsed, **more)

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._start_time

    def _start_window(self) -> None:
        self._window_start, self._window_items = time.monotonic(), 0
