"""The ladder for bad steps, on lists of numbers."""

import pytest

from craft_jax.training import recovery
from craft_jax.training.callbacks import RollBack, ScaleLearningRate, StepRecord
from craft_jax.training.recovery import Halt, Recovery, SwitchToFloat32
from craft_jax.training.settings import TrainingConfig


def requests(skipped, *, overflow=(), **settings):
    """The names of the requests by step, for a list of which steps were skipped, from 1."""
    config, known, found = TrainingConfig(num_steps=100, **settings), Recovery(), {}
    for step, is_skipped in enumerate(skipped, start=1):
        metrics = {"skipped": is_skipped} | ({"loss_scale": 1.0} if step in overflow else {})
        record = StepRecord(step=step, num_steps=100, metrics=metrics)
        known, answers = recovery.after_step(config, known, record)
        if answers:
            found[step] = answers
    return known, found


def kinds(found):
    return {step: [type(answer) for answer in answers] for step, answers in found.items()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"reduce_after": 2, "roll_back_after": 3, "max_bad_steps": 9},
            {2: [ScaleLearningRate], 3: [RollBack], 9: [Halt]},
        ),
        ({"reduce_after": 3, "roll_back_after": 3}, {3: [ScaleLearningRate, RollBack]}),
        ({"reduce_after": 0, "roll_back_after": 0, "max_bad_steps": 4}, {4: [Halt]}),
        # It halts where it would roll back for the last time.
        ({"reduce_after": 0, "roll_back_after": 3, "max_roll_backs": 0}, {3: [Halt]}),
        ({"reduce_after": 0, "roll_back_after": 5, "max_bad_steps": 4}, {4: [Halt], 5: [RollBack]}),
    ],
)
def test_bad_steps_in_a_row(settings, expected):
    _, found = requests([1] * 9, **settings)
    got = kinds(found)
    assert {step: got.get(step) for step in expected} == expected
    assert min(got) == min(expected)


def test_a_good_step_in_between_starts_again():
    known, found = requests([1, 0, 1, 0, 1], reduce_after=2, roll_back_after=2)
    assert found == {}
    assert known == Recovery(bad_steps=1)


def test_a_roll_back_skips_the_bad_batches_and_the_one_under_way():
    _, found = requests([0, 0, 1, 1, 1], reduce_after=0, roll_back_after=3)
    [request] = found[5]
    assert (request.before, request.skips_through) == (3, 6)


def test_overflows_are_no_bad_steps():
    known, found = requests(
        [1] * 4, overflow=range(9), max_overflows=3, reduce_after=1, max_bad_steps=1
    )
    assert kinds(found) == {3: [SwitchToFloat32]}
    assert found[3][0].after == known.float32_after == 4
    assert (known.bad_steps, known.overflows) == (0, 4)


def test_checkpoints_keep_it_and_never_fewer_roll_backs():
    known = Recovery(bad_steps=1, overflows=2, roll_backs=3, float32_after=4)
    assert Recovery.from_meta(known.to_meta(), 0) == known
    assert Recovery.from_meta(known.to_meta(), 5).roll_backs == 5
    assert Recovery.from_meta({}, 0) == Recovery()
