import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.data.text import ValidationWindows
from craft_jax.errors import DataError, DivergedError
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.runtime.signals import StopSignal
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.callback_list import CallbackList
from craft_jax.training.callbacks import (
    Callback,
    CheckpointCallback,
    Evaluate,
    EvaluationCallback,
    RollBack,
    Save,
    ScaleLearningRate,
    Stop,
)
from craft_jax.training.compiled_step import CompiledStep
from craft_jax.training.evaluation import Evaluator
from craft_jax.training.feed import BatchFeed
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import Policy
from craft_jax.training.settings import TrainingConfig
from craft_jax.training.step import make_train_step
from craft_jax.training.tasks import EXAMPLES, LANGUAGE
from craft_jax.training.trainer import Trainer
from tests.data.windows import TrainingWindows

CONFIG = GPTConfig(vocab_size=16, num_layers=1, num_heads=2, d_model=16, max_seq_len=8)
TOKENS = np.tile(np.arange(16, dtype=np.uint16), 50)


class Diary(Callback):
    """Writes down which hook was called at which step, and can ask for something."""

    def __init__(self, requests=None, sync_at=()):
        self.entries, self.requests, self.sync_at = [], requests or {}, sync_at
        self.losses = {}

    def _note(self, hook, record):
        self.entries.append((hook, record.step))
        return self.requests.pop((hook, record.step), None)

    def wants_state(self, step, is_last):
        return step in self.sync_at

    def on_train_begin(self, record):
        self._note("begin", record)

    def on_step_end(self, record):
        self.losses[record.step] = record.metrics["loss"]
        return self._note("step", record)

    def on_sync(self, record):
        assert int(record.state.step) == record.step
        return self._note("sync", record)

    def on_evaluate_end(self, record):
        return self._note("evaluate", record)

    def on_save(self, record):
        self._note("save", record)

    def on_train_end(self, record):
        self._note("end", record)

    def steps(self, hook):
        return [step for name, step in self.entries if name == hook]


class Kept:
    """Keeps checkpoints in memory, as `CheckpointManager` keeps them on disk."""

    def __init__(self):
        self.all, self.finals = [], []

    def save(self, state, meta, *, is_final=False):
        self.all.append((jax.tree.map(lambda x: x.copy(), state), meta))
        self.finals.append(is_final)

    def restore(self, before=None):
        self.all = [kept for kept in self.all if before is None or kept[0].step < before]
        if not self.all:
            return None
        state, meta = self.all[-1]
        return jax.tree.map(lambda x: x.copy(), state), meta

    def poll(self):
        pass

    def close(self):
        pass

    @property
    def steps(self):
        return [int(state.step) for state, _ in self.all]

    @property
    def metas(self):
        return [meta for _, meta in self.all]


class Poisoned(TrainingWindows):
    """Batches that are not finite from a step on."""

    bad = range(0)

    def batch(self, step):
        batch = super().batch(step)
        weights = np.full(batch["tokens"].shape, np.nan if step in self.bad else 1, np.float32)
        return batch | {"weights": weights}


DEFINITION = base.define(GPT, CONFIG)
OPTIMIZER = optim.make_optimizer(OptimConfig())
SCHEDULE = optim.make_schedule(OptimConfig(warmup_steps=0), 100)


@functools.cache
def first_state(mesh, policy):
    return states.init_state(GPT, CONFIG, OPTIMIZER, seed=0, mesh=mesh, policy=policy)


MESH = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])


def make_step(policy, wrap=lambda step: step):
    """A train step that nothing else has compiled."""

    def of(policy):
        return wrap(make_train_step(DEFINITION, OPTIMIZER, SCHEDULE, policy, seed=0))

    options = {"model_def": DEFINITION, "optimizer": OPTIMIZER, "policy": policy, "mesh": MESH}
    return CompiledStep(of, **options)


@functools.cache
def shared_step(precision):
    return make_step(Policy.named(precision))


@functools.cache
def evaluator(precision):
    return Evaluator(DEFINITION, Policy.named(precision), MESH)


class Setup:
    """A trainer, and the state that it begins with."""

    def __init__(self, callbacks=(), num_steps=8, bad=range(0), task=LANGUAGE, **options):
        precision = options.pop("precision", "float32")
        self.step = options.pop("train_step", None) or shared_step(precision)
        self.data = Poisoned(TOKENS, seq_len=8, batch_size=4, seed=0)
        self.data.bad = bad
        self.val_data = ValidationWindows(TOKENS[:100], seq_len=8, batch_size=4)
        config = options.pop("config", TrainingConfig(num_steps=num_steps, max_bad_steps=3))
        self.trainer = Trainer(
            self.step,
            BatchFeed(self.data, task, MESH),
            config,
            evaluator=evaluator(precision),
            val_data=self.val_data,
            callbacks=callbacks,
            **options,
        )
        self.begin = jax.tree.map(jnp.copy, first_state(MESH, Policy.named(precision)))

    def fit(self, meta=None):
        self.state, result = self.trainer.fit(self.begin, meta)
        return result

    def evaluate(self):
        return self.trainer.evaluate(self.begin, self.val_data)


trainer = Setup


def test_hooks_in_order():
    diary, kept = Diary(sync_at=(3,)), Kept()
    result = trainer([EvaluationCallback(4), CheckpointCallback(4), diary], manager=kept).fit()
    assert result.step == 8
    assert result.stopped is None
    assert diary.steps("step") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert diary.steps("evaluate") == [4, 8]
    assert diary.steps("save") == [4, 8]
    assert diary.steps("sync") == [3]
    assert kept.steps == [4, 8]
    assert kept.finals == [False, True]
    assert diary.entries[0] == ("begin", 0)
    assert diary.entries[-1] == ("end", 8)
    assert result.metrics["val_loss"] == kept.metas[-1]["metrics"]["val_loss"]


def test_the_first_step_is_the_one_that_was_compiled_ahead():
    traced = []

    def counted(train_step):
        def counting(state, batch):
            traced.append(threading.current_thread().name)
            return train_step(state, batch)

        return counting

    policy = Policy.named("float32")
    ahead = trainer([ours := Diary()], train_step=make_step(policy, counted))
    ahead.step.compile_ahead(lambda: ahead.data.batch(0))
    assert ahead.fit().step == 8
    assert traced == ["compiler"]
    trainer([diary := Diary()], train_step=make_step(policy, counted)).fit()
    assert traced == ["compiler", "MainThread"]
    assert ours.losses == diary.losses


def test_data_that_fails_while_compiling_ahead_fails_in_its_step(monkeypatch):
    diary = Diary()
    failing = trainer([diary], train_step=make_step(Policy.named("float32")))

    def batch(number):
        raise ValueError("no such row")

    monkeypatch.setattr(failing.data, "batch", batch)
    failing.step.compile_ahead(lambda: failing.data.batch(0))
    with pytest.raises(DataError, match="no such row"):
        failing.fit()
    assert diary.entries == [("begin", 0), ("end", 0)]


def test_data_is_asked_by_one_thread_at_a_time(monkeypatch):
    asked = trainer(train_step=make_step(Policy.named("float32")))
    real, busy, together = asked.data.batch, threading.Lock(), []

    def batch(number):
        together.append(not busy.acquire(blocking=False))
        time.sleep(0.05)
        busy.release()
        return real(number)

    monkeypatch.setattr(asked.data, "batch", batch)
    asked.step.compile_ahead(lambda: asked.data.batch(0))
    assert asked.fit().step == 8
    assert together == [False] * 9


def test_looking_does_not_change_what_is_seen():
    quiet, busy = Diary(), Diary(sync_at=range(100))
    trainer([quiet]).fit()
    trainer([EvaluationCallback(1), CheckpointCallback(1), busy], manager=Kept()).fit()
    assert busy.losses == quiet.losses


def test_evaluation_counts_every_token():
    metrics = trainer().evaluate()
    assert metrics["tokens"] == 99
    assert metrics["loss"] == pytest.approx(np.log(16), abs=0.2)
    assert metrics == trainer().evaluate()


def test_stop_saves_first():
    kept = Kept()
    diary = Diary({("step", 3): Stop("enough")})
    result = trainer([diary], manager=kept).fit()
    assert result.stopped == "enough"
    # The numbers of step 3 arrive while step 4 runs.
    assert kept.steps == [4]
    assert result.step == 4


def test_stop_after_an_evaluation_saves_too():
    kept = Kept()
    diary = Diary({("evaluate", 4): Stop("enough")})
    result = trainer([EvaluationCallback(2), diary], manager=kept).fit()
    assert kept.steps == [result.step] == [4]


def test_requests_for_what_is_not_due():
    kept = Kept()
    diary = Diary({("step", 2): Evaluate(), ("step", 4): Save()})
    trainer([diary], manager=kept).fit()
    # Asked for with the numbers of a step, done after the one that ran meanwhile.
    assert diary.steps("evaluate") == [3]
    assert kept.steps == [5]


def test_two_callbacks_of_one_class_keep_their_own_state():
    class Number(Callback):
        def __init__(self, number):
            self.number = number

        def state_dict(self):
            return {"number": self.number}

        def load_state_dict(self, state):
            self.number = state["number"]

    kept = Kept()
    trainer([Number(1), Number(2), CheckpointCallback(0)], manager=kept).fit()
    again = [Number(0), Number(0)]
    CallbackList(again).load_state_dict(kept.metas[-1]["callbacks"])
    assert [callback.number for callback in again] == [1, 2]


@pytest.mark.parametrize("code", [130, 75])
def test_a_signal_saves_and_ends(code):
    signal, kept = StopSignal(), Kept()

    class Press(Callback):
        def on_step_end(self, record):
            if record.step == 2:
                signal.exit_code = code

    result = trainer([Press()], stop_signal=signal, manager=kept).fit()
    assert kept.steps == [result.step] == [3]
    assert result.stopped == "a signal"


@pytest.mark.parametrize("hook", ["step", "sync", "evaluate"])
@pytest.mark.parametrize("sync_at", [(), (2,), range(100)])
def test_scaling_the_learning_rate(hook, sync_at):
    """From a known step on, whether or not somebody looks at the state meanwhile."""
    sync_at = (*sync_at, 2) if hook == "sync" else sync_at
    diary = Diary({(hook, 2): ScaleLearningRate(0.5, "a test")}, sync_at)
    rates = []

    class Rates(Callback):
        def on_step_end(self, record):
            rates.append(record.metrics["learning_rate"])

    made = trainer([EvaluationCallback(2 if hook == "evaluate" else 0), diary, Rates()])
    made.fit()
    seen = rates.copy()
    rates.clear()
    trainer([Rates()]).fit()
    first = 4 if hook == "step" else 3
    expected = [rate * (0.5 if step >= first else 1) for step, rate in enumerate(rates, start=1)]
    assert seen == pytest.approx(expected, rel=1e-6)
    assert made.state.lr_scale == 0.5


def test_rolling_back():
    diary = Diary({("step", 6): RollBack("a test")})
    result = trainer([CheckpointCallback(4), diary], manager=Kept()).fit()
    assert result.step == 8
    assert diary.steps("step") == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8][: len(diary.steps("step"))]
    assert diary.steps("step")[-4:] == [5, 6, 7, 8]


def test_rolling_back_without_a_checkpoint():
    with pytest.raises(DivergedError, match="no checkpoint"):
        trainer([Diary({("step", 2): RollBack("a test")})]).fit()


def test_bad_steps_are_skipped_and_too_many_end_the_run():
    diary = Diary()
    result = trainer([diary], bad=range(3, 5)).fit()
    assert result.step == 8
    assert [np.isfinite(loss) for loss in diary.losses.values()] == [
        step not in (4, 5) for step in range(1, 9)
    ]
    with pytest.raises(DivergedError, match=r"3 steps, up to step 5.*`replay_step=5`"):
        trainer(bad=range(2, 8)).fit()


class Indices(Callback):
    """Notes the batch and the learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, record):
        rate = round(record.metrics["learning_rate"], 9)
        self.seen.append((record.step, record.batch_index, rate, record.metrics["skipped"]))


LADDER = {"reduce_after": 2, "roll_back_after": 3, "max_bad_steps": 9, "max_roll_backs": 1}


@pytest.mark.parametrize("sync_at", [(), range(100)])
def test_the_ladder(sync_at, caplog):
    """Skip, reduce, go back before the first bad step, and skip the batches that were bad."""
    caplog.set_level("INFO", "craft_jax")
    notes, kept = Indices(), Kept()
    config = TrainingConfig(num_steps=12, **LADDER)
    callbacks = [CheckpointCallback(2), notes, Diary(sync_at=sync_at)]
    made = trainer(callbacks, config=config, bad=range(5, 9), manager=kept)
    assert made.fit().step == 12
    # Batches 5, 6, 7 are bad: steps 6, 7, 8. Step 9 ran meanwhile, or would have.
    final = {step: index for step, index, _, _ in notes.seen}
    assert final == {s: s - 1 if s <= 4 else s + 4 for s in range(1, 13)}
    rates = {step: rate for step, _, rate, _ in notes.seen}
    free = Indices()
    trainer([free], config=config).fit()
    for step, _, rate, _ in free.seen:
        assert rates[step] == pytest.approx(rate * (0.5 if step > 4 else 1), rel=1e-5)
    text = caplog.text
    assert "learning rate scaled by 0.5: 2 updates in a row were skipped up to step 7" in text
    assert "to step 4: 3 updates in a row were skipped up to step 8; batches 4 to 8 are" in text
    for state, _ in kept.all:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_the_ladder_ends():
    config = TrainingConfig(num_steps=30, **LADDER)
    with pytest.raises(DivergedError, match="the last 3 steps"):
        trainer([CheckpointCallback(2)], config=config, bad=range(5, 30), manager=Kept()).fit()


def test_the_ladder_without_a_checkpoint(caplog):
    config = TrainingConfig(num_steps=12, **LADDER)
    assert trainer(config=config, bad=range(2, 6), manager=Kept()).fit().step == 12
    assert "no checkpoint to go back to; going on" in caplog.text


def test_float16_goes_on_in_float32_after_many_overflows(caplog):
    config = TrainingConfig(num_steps=12, max_overflows=3, max_bad_steps=2)

    class Scales(Callback):
        def __init__(self):
            self.seen = {}

        def on_step_end(self, record):
            self.seen[record.step] = record.metrics.get("loss_scale"), record.metrics["skipped"]

    notes, kept = Scales(), Kept()
    made = trainer(
        [notes, CheckpointCallback(4)], config=config, bad=range(3, 7), precision="float16",
        manager=kept,
    )  # fmt: skip
    result = made.fit()
    assert result.step == 12
    assert [notes.seen[s] for s in (3, 4, 5, 6, 7)] == [
        (2.0**16, 0), (2.0**16, 1), (2.0**15, 1), (2.0**14, 1), (2.0**13, 1),
    ]  # fmt: skip
    assert all(notes.seen[s] == (None, 0) for s in range(8, 13))
    assert "the run goes on in float32 after step 7" in caplog.text
    again = trainer([resumed := Scales()], config=config, precision="float16")
    again.fit(kept.metas[-1])
    assert all(resumed.seen[s] == (None, 0) for s in range(8, 13))


def test_a_wrong_answer_is_named():
    with pytest.raises(TypeError, match="'stop', which is no Request"):
        trainer([Diary({("step", 1): "stop"})]).fit()


def test_examples_have_no_tokens():
    made = trainer(task=EXAMPLES)
    assert set(made.evaluate()) == {"loss", "examples"}
    diary = []

    class Keys(Callback):
        def on_step_end(self, record):
            diary.append(set(record.metrics))

    trainer([Keys()], num_steps=2, task=EXAMPLES).fit()
    assert "examples_per_second" in diary[0]


def test_callback_state_travels_in_the_checkpoint():
    kept = Kept()
    trainer(
        [EvaluationCallback(2), CheckpointCallback(2)],
        num_steps=4,
        manager=kept,
    ).fit()
    best = min(meta["metrics"]["val_loss"] for meta in kept.metas)
    again = CheckpointCallback(2)
    CallbackList([again]).load_state_dict(kept.metas[-1]["callbacks"])
    assert again.best == best


class Throughput(Callback):
    """Notes the throughput of each step and the time of it; an evaluation takes long."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, record):
        self.seen[record.step] = record.metrics["tokens_per_second"], record.elapsed

    def wants_state(self, step, is_last):
        return step == 12

    def on_sync(self, record):
        time.sleep(0.5)


def test_throughput_is_the_mean_since_the_last_line():
    watch = Throughput()
    trainer([watch], config=TrainingConfig(num_steps=20, log_every=5)).fit()
    (rate, until), (_, since) = watch.seen[10], watch.seen[5]
    assert rate == pytest.approx(5 * 32 / (until - since), rel=0.1)
    # The work of step 12 is left out, with the steps before it.
    (rate, until), (_, since) = watch.seen[15], watch.seen[12]
    assert rate > 2 * 3 * 32 / (until - since)
    (rate, until), (_, since) = watch.seen[20], watch.seen[15]
    assert rate == pytest.approx(5 * 32 / (until - since), rel=0.1)
