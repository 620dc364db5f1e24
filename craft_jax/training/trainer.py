"""The trainer: the host side of training. The device side is `training/step.py`.

It hands batches to the train step, reads each step's numbers while the next step runs, tells the
callbacks, and carries out what they ask for.
"""

import collections
import contextlib
import copy
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from craft_jax.checkpoint.manager import Saver
from craft_jax.data.base import Batch, Dataset
from craft_jax.data.loading import WHOLE, load_batches
from craft_jax.errors import DivergedError, StoppedError
from craft_jax.models.base import ModelDef
from craft_jax.models.losses import PLAIN, LossConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.processes import SharedStop
from craft_jax.runtime import cpu_memory, fault_injection
from craft_jax.runtime.signals import StopSignal
from craft_jax.runtime.watchdog import Watchdog
from craft_jax.training import metrics
from craft_jax.training import step as steps
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
from craft_jax.training.evaluation import Evaluator
from craft_jax.training.optim import Optimizer, Schedule
from craft_jax.training.precision import FLOAT32, Policy
from craft_jax.training.settings import TrainingConfig
from craft_jax.training.state import TrainState

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BAD_STEPS_FACTOR = 0.5
_STEPS_WITHOUT_CLEANING = 10
_MOMENT = 0.0005
"""Seconds; in 20 of 20 steps a third of it was enough."""


class _InterruptedError(Exception):
    """A signal came while the trainer did something that can be done again."""


class _Pending(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    numbers: steps.Metrics
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
      model_def: the model.
      state: where to begin; the trainer owns it from here on. Until `fit` it may be without
        arrays, so that these are made while the train step compiles: see `compile_ahead`.
      train_data, val_data: batches by number; no evaluation where `val_data` is None.
      optimizer, schedule, policy: what the train step is made of.
      mesh: the devices.
      config: how long, and in which parts.
      callbacks: called in this order.
      saver: writes and restores checkpoints; None keeps nothing.
      stop_signal: polled after every step, and while an evaluation or the data takes time; of
        several processes a `SharedStop`.
      watchdog: is told of progress.
      is_exact: whether the records have a digest of each batch.
      workers, prefetch: see `loading.load_batches`.
      loss_config: what is added to the loss.
      mode: `jit` or `pmap`.
      norms_every: steps between norms of all parameters; 0 for none.
    """

    unit = "examples"
    counts_alone = True
    """Whether `count` of some rows of a batch tells that of all, by their number."""

    def __init__(
        self,
        model_def: ModelDef,
        *,
        state: TrainState,
        train_data: Dataset,
        val_data: Dataset | None,
        optimizer: Optimizer,
        schedule: Schedule,
        policy: Policy,
        mesh: Mesh,
        config: TrainingConfig,
        callbacks: Iterable[Callback] = (),
        saver: Saver | None = None,
        stop_signal: StopSignal | None = None,
        watchdog: Watchdog | None = None,
        is_exact: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        loss_config: LossConfig = PLAIN,
        mode: str = "jit",
        norms_every: int = 0,
    ):
        self.state = state
        self.config = config
        self.model_def, self.train_data = model_def, train_data
        self._val_data, self._mesh = val_data, mesh
        self._callbacks = list(callbacks)
        self._saver = saver
        self._signal = stop_signal or StopSignal()
        self._shared_stop = self._signal if isinstance(self._signal, SharedStop) else None
        self._watchdog = watchdog or Watchdog(0)
        self._is_exact = is_exact
        self._workers, self._prefetch, self._mode = workers, prefetch, mode
        self._batch_size = getattr(train_data, "batch_size", None)
        self._rows = WHOLE
        # Of several processes each makes its part of a batch; but a digest is that of the whole.
        if jax.process_count() > 1 and self._batch_size and self.counts_alone and not is_exact:
            self._rows = sharding.own_rows(self._batch_size, mesh)
        self._norms_every = norms_every

        def compiled(policy: Policy) -> Callable:
            train_step = steps.make_train_step(
                model_def,
                optimizer,
                schedule,
                policy,
                seed=config.seed,
                accumulate=config.accumulate,
                remat=config.remat,
                loss_config=loss_config,
                axis_name=sharding.AXIS_NAME if mode == "pmap" else None,
                norms_every=norms_every,
            )
            if self._shared_stop:
                train_step = self._shared_stop.agreeing(train_step)
            return sharding.compile_step(train_step, mesh, mode)

        self._train_step = compiled(policy)
        self._wide_train_step = compiled(FLOAT32) if policy.scales else self._train_step
        self._evaluator = Evaluator(model_def, policy, mesh)
        self._stop: Stop | None = None
        self._roll_back: RollBack | None = None
        self._save_asked = self._evaluation_asked = False
        self._scalings: list[tuple[int, float]] = []
        self._bad_steps = self._overflows = self._roll_backs = 0
        self._wide_after: int | None = None
        self._last_validation: dict[str, float] = {}
        self._open_metrics: dict[str, float] | None = None
        self._data_start = 0
        self._may_interrupt = True
        self._compiling: threading.Thread | None = None
        self._is_data_free = threading.Event()

    # What subclasses for other kinds of data add to.

    def count(self, batch: Mapping[str, np.ndarray]) -> int:
        """Returns how many `unit`s a batch holds, for the throughput."""
        return len(next(iter(batch.values())))

    @staticmethod
    def evaluation_metrics(sums: Mapping[str, float], data: Dataset) -> dict[str, Any]:
        """Returns the metrics that follow from the sums over a split."""
        return metrics.from_mean(loss=sums["loss"], weight=sums["weight"])

    # Public methods.

    def compile_ahead(self) -> None:
        """Begins to compile the train step in a thread, for a `state` of shapes and shardings.

        The first step waits for it. What goes wrong here does so again in that step, which says it.
        """
        if self._mode != "jit" or self._shared_stop:
            return
        abstract, train_step = self.state, self._train_step

        def compile_step() -> None:
            with contextlib.suppress(Exception):
                try:
                    batch = sharding.put_batch(self.train_data.batch(0), self._mesh)
                finally:
                    self._is_data_free.set()
                train_step.lower(abstract, batch).compile()

        self._compiling = threading.Thread(target=compile_step, name="compiler")
        self._compiling.start()

    def fit(self) -> FitResult:
        """Trains until `num_steps`, a `Stop`, or a signal, and calls the callbacks.

        A run that ends early saves its state first.

        Raises:
          DivergedError: too many updates in a row were skipped, see `_judge`.
          StorageError: the last checkpoint, or several in a row, could not be written.
          StoppedError: a signal came before there was anything to save.
        """
        self._began = time.monotonic()
        first = int(self.state.step)
        is_open = self._open_metrics is not None
        record = self._record(first, self._open_metrics or {}, is_open=is_open)
        try:
            for callback in self._callbacks:
                callback.on_train_begin(record)
            if is_open:
                record = self._sync(record, self._wanting(first))
            while not record.is_last and not self._stop:
                record = self._run_from(record.step)
                if self._roll_back:
                    record = self._go_back(record)
        finally:
            for callback in self._callbacks:
                callback.on_train_end(record)
            if self._saver:
                self._saver.close()
        return FitResult(
            step=record.step,
            metrics={**self._last_validation, **record.metrics},
            stopped=self._stop.reason if self._stop else None,
        )

    def evaluate(self, data: Dataset | None = None) -> dict[str, Any]:
        """Returns the metrics of one pass over `data`, or over the validation split."""
        data = data or self._val_data
        assert data is not None, "nothing to evaluate: there is no validation split"
        with self._watchdog.slow_work():
            sums = self._evaluator(self.state.best_params, data, self._between_batches)
        return self.evaluation_metrics(sums, data)

    def _between_batches(self) -> None:
        fault_injection.point("eval")
        self._watchdog.restart()
        if self._signal.is_set and self._may_interrupt:
            raise _InterruptedError

    def load_meta(self, meta: Mapping) -> None:
        """Takes over what a checkpoint kept beside the state."""
        self._bad_steps = meta.get("bad_steps", 0)
        self._overflows = meta.get("overflows", 0)
        self._roll_backs = max(self._roll_backs, meta.get("roll_backs", 0))
        self._wide_after = meta.get("wide_after")
        self._scalings = [(step, factor) for step, factor in meta.get("scalings", ())]
        self._data_start = meta.get("data_start", 0)
        self._open_metrics = dict(meta["metrics"]) if meta.get("is_open") else None
        for name, callback in self._named_callbacks():
            if state := meta.get("callbacks", {}).get(name):
                callback.load_state_dict(state)

    def _named_callbacks(self) -> Iterator[tuple[str, Callback]]:
        """Yields each callback with its class name, numbered where there are several of a class."""
        seen: collections.Counter[str] = collections.Counter()
        for callback in self._callbacks:
            name = type(callback).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name}_{seen[name]}", callback

    def _meta(self, record: StepRecord) -> dict:
        states = {name: callback.state_dict() for name, callback in self._named_callbacks()}
        return {
            "metrics": dict(record.metrics),
            "callbacks": {name: copy.deepcopy(state) for name, state in states.items() if state},
            "bad_steps": self._bad_steps,
            "overflows": self._overflows,
            "roll_backs": self._roll_backs,
            "wide_after": self._wide_after,
            "scalings": list(self._scalings),
            "data_start": self._data_start,
            "ended": self._stop.reason if self._stop and self._stop.is_final else None,
        }

    # The loop.

    def _run_from(self, first: int) -> StepRecord:
        """Trains from a step to the end, a stop or a roll-back; returns the last record."""
        num_steps = self.config.num_steps
        is_cpu = jax.default_backend() == "cpu"
        pending: _Pending | None = None
        record = self._record(first, {})
        handed_over = time.monotonic()
        self._start_window()
        if self._compiling:  # Data need not be made for two threads at once.
            self._is_data_free.wait()
        batches = self._until_stopped(
            load_batches(
                self.train_data,
                first - self._data_start,
                num_steps - self._data_start,
                workers=self._workers,
                ahead=self._prefetch,
                then=self._put,
                rows=self._rows,
            )
        )
        for step, (batch, items, md5) in enumerate(batches, start=first + 1):
            fault_injection.point("compile" if step == first + 1 else "step")
            is_wide = self._wide_after is not None and step > self._wide_after
            train_step = self._wide_train_step if is_wide else self._train_step
            if self._compiling:
                self._compiling.join()
                self._compiling = None
                if is_cpu:  # What compiling took is of no use to a step.
                    cpu_memory.return_freed_memory()
            if pending and is_cpu:
                # Handed over before, it would take its scratch memory now: twice as much.
                jax.block_until_ready(pending.numbers)
                # A step counts as done a moment before XLA frees that memory.
                time.sleep(min(_MOMENT, (time.monotonic() - handed_over) / 100))
            handed_over = time.monotonic()
            self.state, numbers = train_step(self.state, self._with_wishes(batch))
            self._signal.defer()
            if is_cpu and step % _STEPS_WITHOUT_CLEANING == 0:
                cpu_memory.return_freed_memory()
            if pending:  # The numbers of the step before, while this one runs.
                record = self._announce(pending)
            self._scale_learning_rate(step)
            pending = _Pending(step, numbers, items, step - 1 - self._data_start, md5)
            wanting = self._wanting(step)
            if wanting or step == num_steps or self._interrupted():
                record = self._sync(self._announce(pending), wanting)
                pending = None
            if self._stop or self._roll_back:
                return record
        if self._interrupted():  # While it waited for data.
            record = self._sync(self._announce(pending) if pending else record, [])
        return record

    def _until_stopped(self, batches: Generator[T, None, None]) -> Iterator[T]:
        """Yields batches; ends when a signal comes while it waits for one, and there are steps.

        Raises:
          StoppedError: no step was made in this process, so nothing has to be saved.
        """
        has_steps = False
        try:
            while not self._signal.is_set:
                try:
                    with self._signal.waiting():
                        batch = next(batches, None)
                except StoppedError:
                    if not has_steps:
                        raise
                    return
                if batch is None:
                    return
                yield batch
                has_steps = True
        finally:
            batches.close()

    def _with_wishes(self, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """Returns a batch, with what this one of several processes wishes."""
        if not self._shared_stop:
            return batch
        return self._shared_stop.with_wishes(batch, self._mesh, time.monotonic() - self._began)

    def _wanting(self, step: int) -> list[Callback]:
        """Returns the callbacks that want the state after this step."""
        is_last = step == self.config.num_steps
        return [c for c in self._callbacks if c.wants_state(step, is_last)]

    def _interrupted(self) -> bool:
        """Whether someone asks for the state now: a signal, or a callback's request."""
        if self._signal.is_set and not self._stop:
            self._stop = Stop(self._signal.name or "a signal")
        return bool(self._stop or self._roll_back or self._save_asked or self._evaluation_asked)

    def _announce(self, pending: _Pending) -> StepRecord:
        """Waits for a step's numbers and tells the callbacks."""
        numbers = dict(pending.numbers)
        more = {}
        if self._shared_stop:
            more["elapsed"] = self._shared_stop.agree(numbers)
        norms = numbers.pop("norms", {})
        if norms and pending.step % self._norms_every == 0:
            more["norms"] = _named_norms(norms)
        values = {name: float(value) for name, value in numbers.items()}
        self._watchdog.step()
        if self._saver:
            self._saver.poll()
        values["skipped"] = int(values["skipped"])
        self._window_items += pending.items
        seconds = time.monotonic() - self._window_start
        values[f"{self.unit}_per_second"] = self._window_items / max(seconds, 1e-9)
        if pending.step % self.config.log_every == 0 or self._window_items == pending.items:
            self._start_window()
        record = self._record(
            pending.step,
            values,
            batch_index=pending.batch_index,
            batch_md5=pending.batch_md5,
            **more,
        )
        for callback in self._callbacks:
            # The next step may run already, or not: either way it keeps its learning rate, so that
            # evaluating and saving do not change a run.
            self._take(callback.on_step_end(record), record.step + 1)
        self._judge(record)
        return record

    def _judge(self, record: StepRecord) -> None:
        """Answers a step whose numbers were not finite: its update was not made.

        In float16 that is an overflow, whose cure is the loss scale; too many in a row, and the run
        goes on in float32. Otherwise, step by step: skip, reduce the learning rate, go back and
        skip the data, halt.

        Raises:
          DivergedError: nothing has helped.
        """
        config, is_bad = self.config, bool(record.metrics["skipped"])
        is_overflow = is_bad and "loss_scale" in record.metrics
        self._overflows = self._overflows + 1 if is_overflow else 0
        self._bad_steps = self._bad_steps + 1 if is_bad and not is_overflow else 0
        # As with a learning rate: the next step may run already.
        after, count = record.step + 1, self._bad_steps
        if self._overflows >= config.max_overflows and self._wide_after is None:
            self._wide_after = after
            logger.warning(
                "float16 overflowed %d times in a row (training.max_overflows): the run goes on in "
                "float32 after step %d",
                self._overflows,
                after,
            )
        if not count:
            return
        what = f"{count} updates in a row were skipped up to step {record.step}"
        if count == config.reduce_after:
            self._take(ScaleLearningRate(_BAD_STEPS_FACTOR, what), after)
        if count == config.roll_back_after and self._roll_backs < config.max_roll_backs:
            self._roll_back = RollBack(what, before=record.step - count + 1, skips_through=after)
        elif count >= config.max_bad_steps or count == config.roll_back_after > 0:
            raise DivergedError(
                f"training diverged: the loss or gradient of the last {count} steps, up to step "
                f"{record.step}, was not finite and their updates were skipped; lower "
                "optim.learning_rate or optim.clip_norm, or warm up longer; to look at the last of "
                f"them add --replay_step={record.step} to --run=NAME"
            )

    def _sync(self, record: StepRecord, wanting: Iterable[Callback]) -> StepRecord:
        """Does what needs the state of this step: `on_sync`, evaluation, saving.

        A signal that comes during an evaluation saves the state as it was before; what belongs to
        this step is then done when the run continues. Of the last step it is done now.
        """
        before = self._meta(record) | {"is_open": True}
        if record.is_last and self._signal.is_set:
            self._write(record, before, is_announced=False)
        try:
            done = self._look(record, wanting)
        except _InterruptedError:
            if not record.is_last:
                self._interrupted()
                self._write(record, before)
                return record
            self._write(record, before, is_announced=False)
            self.load_meta(before)
            done = self._look(record, wanting)
        self._scale_learning_rate(done.step)
        if self._stop and self._stop.restore_best:
            done = self._take_best(done)
        if self._save_asked or self._stop:
            self._write(done, self._meta(done))
        self._save_asked = False
        self._start_window()
        self._watchdog.restart()
        return done

    def _take_best(self, record: StepRecord) -> StepRecord:
        """Goes on with the parameters of the best checkpoint; the optimizer stays as it is."""
        restored = self._saver.restore_best(record.metrics) if self._saver else None
        if restored is None:
            return record
        best, meta = restored
        self.state = self.state.replace(params=best.params, average=best.average)
        logger.info("the parameters of step %d are restored", int(best.step))
        known = {k: v for k, v in meta["metrics"].items() if k.startswith("val_")}
        return dataclasses.replace(record, metrics={**record.metrics, **known})

    def _look(self, record: StepRecord, wanting: Iterable[Callback]) -> StepRecord:
        """Lets callbacks see the state, and evaluates."""
        self._may_interrupt = not (record.is_last and self._signal.is_set)
        with self._watchdog.slow_work():
            record = self._evaluate_if_asked(record)
            for callback in wanting:
                with_state = dataclasses.replace(record, state=self.state)
                self._take(callback.on_sync(with_state), record.step)
                record = self._evaluate_if_asked(record)
        return record

    def _write(self, record: StepRecord, meta: dict, *, is_announced: bool = True) -> None:
        if self._saver is None:
            return
        if is_announced:  # Else the step is not yet done, and loggers do not write it yet.
            for callback in self._callbacks:
                callback.on_save(record)
        with self._watchdog.slow_work():
            self._saver.save(self.state, meta, is_final=record.is_last or bool(self._stop))

    def _evaluate_if_asked(self, record: StepRecord) -> StepRecord:
        asked, self._evaluation_asked = self._evaluation_asked, False
        if not asked or self._val_data is None:
            return record
        self._last_validation = {f"val_{name}": value for name, value in self.evaluate().items()}
        record = dataclasses.replace(record, metrics={**record.metrics, **self._last_validation})
        for callback in self._callbacks:
            self._take(callback.on_evaluate_end(record), record.step)
        return record

    def _scale_learning_rate(self, step: int) -> None:
        """Carries out the scalings that hold for the steps after this one."""
        due = [factor for first, factor in self._scalings if first <= step]
        self._scalings = [(first, factor) for first, factor in self._scalings if first > step]
        for factor in due:
            self.state = self.state.replace(lr_scale=self.state.lr_scale * factor)

    def _take(self, request: Request | None, step: int) -> None:
        """Notes a request for the next moment at which it can be carried out.

        Args:
          request: what a callback answered.
          step: the step after which a new learning rate holds.
        """
        match request:
            case None:
                pass
            case Evaluate():
                self._evaluation_asked = True
            case Save():
                self._save_asked = True
            case Stop():
                self._stop = request
            case RollBack():
                self._roll_back = request
            case ScaleLearningRate(factor, reason):
                logger.info("learning rate scaled by %g: %s", factor, reason or "a callback")
                self._scalings.append((step, factor))
            case _:
                raise TypeError(f"a callback answered {request!r}, which is no Request")

    def _go_back(self, record: StepRecord) -> StepRecord:
        """Restores an earlier checkpoint, as a callback or the numbers demand."""
        request, self._roll_back = self._roll_back, None
        assert request is not None
        restored = self._saver.restore(before=request.before) if self._saver else None
        if restored is None and request.before is not None:
            logger.warning("%s: no checkpoint to go back to; going on", request.reason)
            return record
        if restored is None:
            raise DivergedError(
                f"asked to roll back ({request.reason}), but there is no checkpoint yet"
            )
        start, scale = self._data_start, self.state.lr_scale
        self.state, meta = restored
        self.load_meta(meta)
        back = self._record(int(self.state.step), {})
        skipped = ""
        if request.skips_through is not None:
            self._roll_backs += 1
            self.state = self.state.replace(lr_scale=jnp.minimum(scale, self.state.lr_scale))
            first, following = back.step - self._data_start, request.skips_through - start
            self._data_start = back.step - following
            more = {"data_start": self._data_start, "roll_backs": self._roll_backs}
            # A run that is killed now goes on from here.
            self._saver.save(self.state, meta | more)
            skipped = f"; batches {first} to {following - 1} are skipped"
        logger.warning(
            "rolled back from step %d to step %d: %s%s",
            record.step,
            back.step,
            request.reason,
            skipped,
        )
        for callback in self._callbacks:
            callback.on_roll_back(back)
        return back

    def _put(self, batch: Batch) -> tuple[dict[str, jax.Array], int, str | None]:
        """Puts a batch on the devices; returns it with what is known of it only here."""
        fault_injection.point("data")
        md5 = batch_md5(batch) if self._is_exact else None
        if self._rows == WHOLE:
            return sharding.put_batch(batch, self._mesh, self._mode), self.count(batch), md5
        assert self._batch_size is not None
        items = self.count(batch) * self._batch_size // (self._rows.stop - self._rows.start)
        whole = {"rows": self._rows, "batch_size": self._batch_size}
        return sharding.put_batch(batch, self._mesh, self._mode, **whole), items, md5

    def _record(self, step: int, metrics: Mapping[str, float], **more: Any) -> StepRecord:
        more.setdefault("elapsed", time.monotonic() - self._began)
        return StepRecord(step=step, num_steps=self.config.num_steps, metrics=metrics, **more)

    def _start_window(self) -> None:
        self._window_start, self._window_items = time.monotonic(), 0


def _named_norms(norms: Mapping[str, jax.Array]) -> dict[str, float]:
    kinds = ("gradient_norms", "parameter_norms", "update_norms")
    host = {path: np.asarray(values).tolist() for path, values in norms.items()}
    return {f"{kind}/{path}": host[path][n] for n, kind in enumerate(kinds) for path in host}


def batch_md5(batch: Mapping[str, np.ndarray]) -> str:
    """Returns the MD5 over the names, dtypes, shapes and bytes of a batch, hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
