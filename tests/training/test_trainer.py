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
from craft_jax.training import evaluation, optim
from craft_jax.training import state as states
from craft_jax.training import step as steps
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
from craft_jax.training.language import LanguageModelTrainer, trainer_for
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import Policy
from craft_jax.training.settings import TrainingConfig
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
    """Keeps checkpoints in memory, as `Saver` keeps them on disk."""

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


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """Equal train and evaluation steps are one function, which jax.jit compiles once."""

    def once(make):
        made = {}

        def get(definition, *rest, **options):
            assert definition is DEFINITION  # The one argument that has no hash.
            key = (*rest, *sorted(options.items()))
            if key not in made:
                made[key] = make(definition, *rest, **options)
            return made[key]

        return get

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "make_train_step", once(steps.make_train_step))
        patch.setattr(evaluation, "make_eval_step", once(evaluation.make_eval_step))
        yield


def trainer(callbacks=(), num_steps=8, bad=range(0), cls=LanguageModelTrainer, **options):
    policy = Policy.named(options.pop("precision", "float32"))
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    data = Poisoned(TOKENS, seq_len=8, batch_size=4, seed=0)
    data.bad = bad
    config = options.pop("config", TrainingConfig(num_steps=num_steps, max_bad_steps=3))
    return cls(
        DEFINITION,
        state=jax.tree.map(jnp.copy, first_state(mesh, policy)),
        train_data=data,
        val_data=ValidationWindows(TOKENS[:100], seq_len=8, batch_size=4),
        optimizer=OPTIMIZER,
        schedule=SCHEDULE,
        policy=policy,
        mesh=mesh,
        config=config,
        callbacks=callbacks,
        **options,
    )


def test_hooks_in_order():
    diary, kept = Diary(sync_at=(3,)), Kept()
    result = trainer([EvaluationCallback(4), CheckpointCallback(4), diary], saver=kept).fit()
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


def test_the_first_step_is_the_one_that_was_compiled_ahead(monkeypatch):
    real, traced = steps.make_train_step, []

    def counted(*args, **options):
        train_step = real(*args, **options)

        def counting(state, batch):
            traced.append(threading.current_thread().name)
            return train_step(state, batch)

        return counting

    monkeypatch.setattr(steps, "make_train_step", counted)
    ahead, diary = trainer([ours := Diary()]), Diary()
    begin = ahead.state
    ahead.state = states.abstract_state(ahead.model_def, OPTIMIZER, begin.step.sharding.mesh)
    ahead.compile_ahead()
    ahead.state = begin
    assert ahead.fit().step == 8
    assert traced == ["compiler"]
    trainer([diary]).fit()
    assert traced == ["compiler", "MainThread"]
    assert ours.losses == diary.losses


def test_data_that_fails_while_compiling_ahead_fails_in_its_step(monkeypatch):
    diary = Diary()
    failing = trainer([diary])

    def batch(number):
        raise ValueError("no such row")

    monkeypatch.setattr(failing.train_data, "batch", batch)
    failing.compile_ahead()
    with pytest.raises(DataError, match="no such row"):
        failing.fit()
    assert diary.entries == [("begin", 0), ("end", 0)]


def test_data_is_asked_by_one_thread_at_a_time(monkeypatch):
    asked = trainer()
    real, busy, together = asked.train_data.batch, threading.Lock(), []

    def batch(number):
        together.append(not busy.acquire(blocking=False))
        time.sleep(0.05)
        busy.release()
        return real(number)

    monkeypatch.setattr(asked.train_data, "batch", batch)
    asked.compile_ahead()
    assert asked.fit().step == 8
    assert together == [False] * 9


def test_looking_does_not_change_what_is_seen():
    quiet, busy = Diary(), Diary(sync_at=range(100))
    trainer([quiet]).fit()
    trainer([EvaluationCallback(1), CheckpointCallback(1), busy], saver=Kept()).fit()
    assert busy.losses == quiet.losses


def test_evaluation_counts_every_token():
    metrics = trainer().evaluate()
    assert metrics["tokens"] == 99
    assert metrics["loss"] == pytest.approx(np.log(16), abs=0.2)
    assert metrics == trainer().evaluate()


def test_stop_saves_first():
    kept = Kept()
    diary = Diary({("step", 3): Stop("enough")})
    result = trainer([diary], saver=kept).fit()
    assert result.stopped == "enough"
    # The numbers of step 3 arrive while step 4 runs.
    assert kept.steps == [4]
    assert result.step == 4


def test_stop_after_an_evaluation_saves_too():
    kept = Kept()
    diary = Diary({("evaluate", 4): Stop("enough")})
    result = trainer([EvaluationCallback(2), diary], saver=kept).fit()
    assert kept.steps == [result.step] == [4]


def test_requests_for_what_is_not_due():
    kept = Kept()
    diary = Diary({("step", 2): Evaluate(), ("step", 4): Save()})
    trainer([diary], saver=kept).fit()
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
    trainer([Number(1), Number(2), CheckpointCallback(0)], saver=kept).fit()
    again = [Number(0), Number(0)]
    trainer(again).load_meta(kept.metas[-1])
    assert [callback.number for callback in again] == [1, 2]


@pytest.mark.parametrize("code", [130, 75])
def test_a_signal_saves_and_ends(code):
    signal, kept = StopSignal(), Kept()

    class Press(Callback):
        def on_step_end(self, record):
            if record.step == 2:
                signal.exit_code = code

    result = trainer([Press()], stop_signal=signal, saver=kept).fit()
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
    result = trainer([CheckpointCallback(4), diary], saver=Kept()).fit()
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
    with pytest.raises(DivergedError, match=r"3 steps, up to step 5.*--replay_step=5"):
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
    made = trainer(callbacks, config=config, bad=range(5, 9), saver=kept)
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
        trainer([CheckpointCallback(2)], config=config, bad=range(5, 30), saver=Kept()).fit()


def test_the_ladder_without_a_checkpoint(caplog):
    config = TrainingConfig(num_steps=12, **LADDER)
    assert trainer(config=config, bad=range(2, 6), saver=Kept()).fit().step == 12
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
        saver=kept,
    )  # fmt: skip
    result = made.fit()
    assert result.step == 12
    assert [notes.seen[s] for s in (3, 4, 5, 6, 7)] == [
        (2.0**16, 0), (2.0**16, 1), (2.0**15, 1), (2.0**14, 1), (2.0**13, 1),
    ]  # fmt: skip
    assert all(notes.seen[s] == (None, 0) for s in range(8, 13))
    assert "the run goes on in float32 after step 7" in caplog.text
    again = trainer([Scales()], config=config, precision="float16")
    again.load_meta(kept.metas[-1])
    assert again._wide_after == 7


def test_a_wrong_answer_is_named():
    with pytest.raises(TypeError, match="'stop', which is no Request"):
        trainer([Diary({("step", 1): "stop"})]).fit()


def test_the_base_trainer_knows_nothing_of_tokens():
    assert trainer_for(GPT) is LanguageModelTrainer
    made = trainer(cls=Trainer)
    assert set(made.evaluate()) == {"loss", "examples"}
    diary = []

    class Keys(Callback):
        def on_step_end(self, record):
            diary.append(set(record.metrics))

    trainer([Keys()], num_steps=2, cls=Trainer).fit()
    assert "examples_per_second" in diary[0]


def test_callback_state_travels_in_the_checkpoint():
    kept = Kept()
    trainer(
        [EvaluationCallback(2), CheckpointCallback(2)],
        num_steps=4,
        saver=kept,
    ).fit()
    best = min(meta["metrics"]["val_loss"] for meta in kept.metas)
    again = CheckpointCallback(2)
    trainer([again]).load_meta(kept.metas[-1])
    assert again.best == best
