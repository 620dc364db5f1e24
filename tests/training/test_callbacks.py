import math

import pytest

from craft_jax.training.callbacks import (
    CheckpointCallback,
    Evaluate,
    EvaluationCallback,
    SampleCallback,
    Save,
    StepRecord,
)


def record(step, num_steps=10, **metrics):
    return StepRecord(step=step, num_steps=num_steps, metrics=metrics)


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 9, 10]), (0, [10]), (10, [10])])
def test_every(every, expected):
    callback = EvaluationCallback(every)
    assert [s for s in range(1, 11) if callback.wants_state(s, s == 10)] == expected
    assert callback.on_sync(record(3)) == Evaluate()


def test_a_new_best_is_saved_once():
    callback = CheckpointCallback(5)
    assert callback.on_evaluate_end(record(3, val_loss=2.0)) == Save()
    assert callback.on_evaluate_end(record(4, val_loss=2.5)) is None
    assert callback.on_evaluate_end(record(5, val_loss=1.0)) is None  # Due anyway.
    assert callback.best == 1.0
    assert callback.on_evaluate_end(record(6, val_loss=math.nan)) is None
    assert callback.best == 1.0


def test_its_state_survives():
    first, second = CheckpointCallback(5), CheckpointCallback(5)
    second.load_state_dict(first.state_dict())
    assert second.best is None
    first.on_evaluate_end(record(3, val_loss=2.0))
    second.load_state_dict(first.state_dict())
    assert second.on_evaluate_end(record(4, val_loss=2.1)) is None


def test_samples_are_shown_but_not_after_the_last_step():
    shown = []
    callback = SampleCallback(2, lambda state: f"text of {state}", lambda *a: shown.append(a))
    assert [s for s in range(1, 7) if callback.wants_state(s, s == 6)] == [2, 4]
    callback.on_sync(StepRecord(step=2, num_steps=6, metrics={}, state="a state"))
    assert shown == [(2, "text of a state")]
