import json
import math

import pytest

from craft_jax import schema
from craft_jax.errors import ConfigError
from craft_jax.training.callbacks import ScaleLearningRate, StepRecord
from craft_jax.training.plateau import (
    Plateau,
    PlateauConfig,
    ReduceLROnPlateauOrInstability,
    Spikes,
    after_evaluation,
    after_step,
)

NAN, INF = math.nan, math.inf

# Each row: the value, and what is left of the learning rate after it.
PLATEAUS = {
    "an improvement begins the count again": (
        PlateauConfig(patience=2),
        [(5, 1), (5, 1), (4, 1), (4, 1), (4, 0.5), (4, 0.5), (4, 0.25)],
    ),
    "a small one is none": (
        PlateauConfig(patience=2, min_delta=0.5),
        [(5, 1), (4.9, 1), (4.6, 0.5), (4.4, 0.5), (4.3, 0.5), (4.3, 0.25)],
    ),
    "what is not finite does not count": (
        PlateauConfig(patience=2),
        [(5, 1), (NAN, 1), (5, 1), (NAN, 1), (INF, 1), (-INF, 1), (5, 0.5), (NAN, 0.5), (5, 0.5)],
    ),
    "nor the evaluations of the cooldown": (
        PlateauConfig(patience=1, cooldown=3),
        [(5, 1), (5, 0.5), (5, 0.5), (5, 0.5), (NAN, 0.5), (5, 0.25), (5, 0.25)],
    ),
    "an improvement in the cooldown is one": (
        PlateauConfig(patience=1, cooldown=2),
        [(5, 1), (5, 0.5), (3, 0.5), (4, 0.25), (2, 0.25), (2, 0.125)],
    ),
    "never below the floor": (
        PlateauConfig(patience=1, factor=0.1, min_scale=0.05),
        [(5, 1), (5, 0.1), (5, 0.05), (5, 0.05), (4, 0.05), (5, 0.05)],
    ),
    "higher may be better": (
        PlateauConfig(patience=1, mode="max"),
        [(0.1, 1), (0.2, 1), (0.2, 0.5), (0.3, 0.5), (0.1, 0.25)],
    ),
}

SPIKES = {
    "nothing is a spike before the window is full": (
        PlateauConfig(spike=2.0, window=3),
        [(1, 1), (9, 1), (1, 1), (1, 1), (9, 0.5)],
    ),
    "one spike, and no second reduction within the window": (
        PlateauConfig(spike=2.0, window=3),
        [(1, 1), (1, 1), (1, 1), (50, 0.5), (50, 0.5), (1, 0.5), (50, 0.25)],
    ),
    "patience": (
        PlateauConfig(spike=2.0, spike_patience=2, window=3),
        [(1, 1), (1, 1), (1, 1), (9, 1), (1, 1), (9, 1), (9, 0.5)],
    ),
    "a new level is accepted after a window of it": (
        PlateauConfig(spike=2.0, window=3),
        [(1, 1), (1, 1), (1, 1), (9, 0.5), (9, 0.5), (9, 0.5)] + [(9, 0.5)] * 5 + [(20, 0.25)],
    ),
    "what is not finite does not count": (
        PlateauConfig(spike=2.0, spike_patience=2, window=3),
        [(1, 1), (NAN, 1), (1, 1), (1, 1), (INF, 1), (9, 1), (NAN, 1), (9, 0.5), (1, 0.5)],
    ),
    "the floor": (
        PlateauConfig(spike=2.0, window=2, min_scale=0.6),
        [(1, 1), (1, 1), (9, 0.6), (1, 0.6), (1, 0.6), (9, 0.6)],
    ),
}


def record(step, **metrics):
    return StepRecord(step=step, num_steps=1000, metrics=metrics)


def follow(callback, rows, scale=1.0, first=0):
    """Sends values to a callback; returns what is left of the rate after each."""
    left = []
    for step, (value, _) in enumerate(rows, start=first):
        if callback._config.spike is None:
            request = callback.on_evaluate_end(record(step, val_loss=value))
        else:
            request = callback.on_step_end(record(step, loss=value))
        if request is not None:
            assert isinstance(request, ScaleLearningRate)
            scale *= request.factor
        left.append(scale)
    return left


@pytest.mark.parametrize("name", [*PLATEAUS, *SPIKES])
def test_the_table(name):
    config, rows = (PLATEAUS if name in PLATEAUS else SPIKES)[name]
    callback = ReduceLROnPlateauOrInstability(config)
    assert follow(callback, rows) == pytest.approx([left for _, left in rows])


@pytest.mark.parametrize("name", [*PLATEAUS, *SPIKES])
def test_the_table_after_a_resume_at_every_place(name):
    config, rows = (PLATEAUS if name in PLATEAUS else SPIKES)[name]
    expected = [left for _, left in rows]
    for place in range(1, len(rows)):
        first, second = (ReduceLROnPlateauOrInstability(config) for _ in range(2))
        before = follow(first, rows[:place])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = follow(second, rows[place:], scale=before[-1], first=place)
        assert before + after == pytest.approx(expected), place


def test_the_policies_are_pure():
    config = PlateauConfig(patience=1, spike=2.0, window=1)
    known, spikes = Plateau(best=1.0), Spikes(average=1.0, seen=1)
    for _ in range(2):
        assert after_evaluation(config, known, 2.0, 1.0)[1] == 0.5
        assert after_step(config, spikes, 1.5, 1.0)[0].average == 1.5


def test_impossible_and_unknown():
    assert schema.problems(PlateauConfig(), "plateau") == []
    wrong = PlateauConfig(spike=2.0, spike_patience=9, window=3)
    assert "lower it" in schema.problems(wrong, "plateau")[0]
    callback = ReduceLROnPlateauOrInstability(PlateauConfig(patience=1, monitor="val_acuracy"))
    with pytest.raises(ConfigError, match=r"plateau.monitor=val_acuracy .* there are val_loss"):
        callback.on_evaluate_end(record(1, val_loss=1.0))
