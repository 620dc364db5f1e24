import json
import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from craft_jax.training.callbacks import StepRecord
from craft_jax.training.loggers import (
    ConsoleLogger,
    JsonLinesLogger,
    TensorBoardLogger,
    read_json_lines,
)

LOSS = 2.2999999523162842


def record(step, num_steps=6, **metrics):
    metrics = {"loss": LOSS - step, "learning_rate": 1e-3, "skipped": 0} | metrics
    return StepRecord(step=step, num_steps=num_steps, metrics=metrics, elapsed=2.0 * step)


def drive(logger, first=0, last=6, evaluate_at=(3,)):
    logger.on_train_begin(record(first))
    for step in range(first + 1, last + 1):
        logger.on_step_end(record(step))
        if step in evaluate_at:
            logger.on_evaluate_end(record(step, val_loss=1.5, val_bits_per_byte=None))
    logger.on_train_end(record(last))


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    drive(JsonLinesLogger(path, every=2))
    lines = read_json_lines(path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert lines[0]["loss"] == LOSS - 2
    assert "val_loss" not in lines[0]
    assert lines[1]["val_loss"] == 1.5
    assert all(not isinstance(v, (dict, list)) for line in lines for v in line.values())


def test_json_lines_of_a_resumed_run_have_each_step_once(tmp_path):
    path = tmp_path / "a.jsonl"
    drive(JsonLinesLogger(path, every=1), last=5)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # Cut off by a crash.
    drive(JsonLinesLogger(path, every=1), first=3)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_line_is_on_disk_before_a_checkpoint_of_its_step(tmp_path):
    logger = JsonLinesLogger(tmp_path / "a.jsonl", every=1)
    logger.on_train_begin(record(0))
    logger.on_step_end(record(1))
    assert read_json_lines(tmp_path / "a.jsonl") == []
    logger.on_save(record(1))
    assert [line["step"] for line in read_json_lines(tmp_path / "a.jsonl")] == [1]
    logger.on_train_end(record(1))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_its_events(tmp_path):
    drive(TensorBoardLogger(tmp_path / "events", every=1), last=5)
    again = TensorBoardLogger(tmp_path / "events", every=1)
    drive(again, first=3, last=4)
    again.on_roll_back(record(3))
    drive(again, first=3)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[1].value == pytest.approx(LOSS - 2)
    assert [event.step for event in events.Scalars("val/loss")] == [3]


def test_console(caplog):
    logging.getLogger("craft_jax").propagate = True
    with caplog.at_level(logging.INFO):
        drive(ConsoleLogger(every=3, unit="tokens"))
    text = caplog.text
    assert "step 3/6  loss -0.7000  lr 1.00e-03" in text
    assert "0:06 elapsed, 0:06 left" in text
    assert "step 3: validation loss 1.5000" in text
    assert "bits per byte" not in text
    assert "step 4/6" not in text


def test_console_says_what_the_accuracy_of_pairs_counts(caplog):
    logging.getLogger("craft_jax").propagate = True
    with caplog.at_level(logging.INFO):
        shown = {"val_loss": 1.5, "val_accuracy": 0.5, "val_exact_match": 0.25}
        ConsoleLogger(every=3, unit="tokens").on_evaluate_end(record(3, **shown))
    assert "validation loss 1.5000, exact match 0.2500, token accuracy 0.5000" in caplog.text


def test_console_names_skipped_updates(caplog):
    logging.getLogger("craft_jax").propagate = True
    logger = ConsoleLogger(every=10, unit="tokens")
    with caplog.at_level(logging.INFO):
        logger.on_step_end(record(4, loss=float("nan"), grad_norm=1.0, skipped=1))
    assert "step 4: loss nan, gradient norm 1.0: update skipped" in caplog.text
