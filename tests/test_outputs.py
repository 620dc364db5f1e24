import re

import pytest

from craft_jax import outputs
from craft_jax.errors import DataError, OutputError, UsageError

STAMP = r"\d{8}_\d{6}"


def create(workdir, name=None):
    return outputs.create_run(workdir, name=name, model="gpt", size="1m", precision="float32")


def test_names(workdir):
    paths = create(workdir)
    relative = {p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_file()}
    patterns = [
        rf"models/gpt_1m_float32_{STAMP}/run\.json",
        rf"logs/train_gpt_{STAMP}\.log",
        rf"logs/train_gpt_{STAMP}\.jsonl",
        rf"samples/sample_{STAMP}\.txt",
    ]
    assert len(relative) == len(patterns)
    assert all(any(re.fullmatch(p, name) for name in relative) for p in patterns)
    assert paths.events == paths.log.with_suffix("")
    assert outputs.open_run(paths.folder) == paths
    for path, pattern in (
        (outputs.eval_log(workdir, "gpt"), rf"logs/eval_gpt_{STAMP}\.log"),
        (outputs.sample_file(workdir), rf"samples/sample_{STAMP}\.txt"),
        (outputs.evaluation_file(workdir, "gpt", "x"), rf"evaluation/eval_gpt_x_{STAMP}\.json"),
        (outputs.benchmark_file(workdir, "a", "cpu"), rf"benchmarks/benchmark_a_cpu_{STAMP}\.json"),
        (outputs.picture_file(workdir, "loss", "gpt"), rf"visualizations/loss_gpt_{STAMP}\.png"),
    ):
        assert re.fullmatch(pattern, path.relative_to(workdir).as_posix())


def test_runs_of_the_same_second_share_nothing(workdir):
    made = [create(workdir, name) for name in (None, None, "a", "b", None)]
    for kind in ("folder", "log", "metrics", "samples", "events"):
        assert len({getattr(paths, kind) for paths in made}) == 5


def test_a_run_with_a_name(workdir):
    assert create(workdir, "my-run_1").folder == workdir / "models/my-run_1"
    for bad in ("", "a/b", "..", "-x", "a b", "x" * 300):
        with pytest.raises(UsageError, match="no name for a run"):
            create(workdir, bad)


def test_runs_are_listed_oldest_first(workdir):
    names = [create(workdir, name).name for name in ("b", "a", "c")]
    assert [folder.name for folder in outputs.all_runs(workdir)] == names
    assert outputs.all_runs(workdir / "nowhere") == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for workdir in (tmp_path / "file", tmp_path / "file/deeper"):
        with pytest.raises(OutputError, match="cannot write outputs below"):
            create(workdir)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/models").write_text("", encoding="utf-8")
    with pytest.raises(OutputError):
        create(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.log"))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match="is no run"):
        outputs.open_run(tmp_path)


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    outputs.write_text(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"
    monkeypatch.setattr(outputs.os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs.write_text(path, "new")
    assert path.read_bytes() == b"old\r\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
