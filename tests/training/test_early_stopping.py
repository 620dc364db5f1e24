import json
import math

from craft_jax.training.callbacks import StepRecord, Stop
from craft_jax.training.early_stopping import EarlyStopping, EarlyStoppingConfig


def record(step, **metrics):
    return StepRecord(step=step, num_steps=1000, metrics=metrics)


def test_early_stopping():
    callback = EarlyStopping(EarlyStoppingConfig(patience=2, min_delta=0.1))
    answers = [
        callback.on_evaluate_end(record(step, val_loss=loss))
        for step, loss in enumerate([5, 4, math.nan, 3.95, math.nan])
    ]
    assert answers == [None] * 5
    again = EarlyStopping(EarlyStoppingConfig(patience=2, min_delta=0.1))
    again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    reason = "early stopping: val_loss has not improved on 4 of step 1"
    assert again.on_evaluate_end(record(5, val_loss=4.0)) == Stop(
        reason, is_final=True, restore_best=True
    )
