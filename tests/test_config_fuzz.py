"""Random changes of single fields: each is refused in one line, or trains."""

import contextlib
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from craft_jax import config as configs
from craft_jax import main as cli
from craft_jax.config import SECTIONS, ExperimentConfig
from craft_jax.models.gpt import GPTConfig
from tests.conftest import micro, words

# These make a run long, or leave files elsewhere; their values are checked, and not trained with.
ONLY_CHECKED = {"training.num_steps", "training.sample_tokens", "data.num_pairs", "data.workers"}
TEXTS = [
    "", " ", "abc", "-1", "0", "1", "2", "3", "7", "16", "2.5", "-0.5", "0.3", "1e-320", "1e-9",
    "0.999999999999", "1e300", "1e400", "-1e400", "nan", "inf", "9" * 40, "2147483648",
    "1073741824", "1_0", "true", "maybe", "none", "None", "[]", "(1,2)", "a,b", "\u6f22\u5b57",
    "\U0001f642", "a\nb", "../..", "/", "x.py:Class", "~nobody/x", "~nobody/x.py:Class", "x:y", ":",
    "os:path", "--flag", "'", '"', "$(x)", "\udcff", "float64", "GPT", "char", "byte", "wsd",
    "constant",
]  # fmt: skip
VALUES = [
    None, True, 0, -1, 3, 10**30, 10**400, 10**5000, 2**31, 2.5, 1e-320, 1e300, float("nan"),
    float("inf"), "", "abc", "a\0b", "a\nb", "\udcff", "x" * 5000, "~nobody/x.py:Class", [], [1],
    ["a"], {}, {"a": 1}, (), b"x", object,
]  # fmt: skip


def fields() -> list[str]:
    found = ["init_from", *SECTIONS]
    for field in dataclasses.fields(ExperimentConfig):
        if field.name in SECTIONS:
            cls = GPTConfig if field.name == "model" else field.type
            found += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(cls)]
    return found


def changes(kind: list[Any], seed: int, count: int) -> list[tuple[str, Any]]:
    rng = random.Random(seed)
    return [(rng.choice(fields()), rng.choice(kind)) for _ in range(count)]


def problems(values: dict) -> list[str]:
    try:
        configs.from_values(values, (), "mine.py")
    except configs.ConfigError as error:
        return error.problems
    return []


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "words.txt"
    path.write_text(words(2500), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("part", "count"),
    [(part, 6) for part in range(10)]
    + [pytest.param(part, 50, marks=pytest.mark.soak) for part in range(100, 110)],
)
def test_on_the_command_line(text, workdir, part, count, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number, (field, value) in enumerate(changes(TEXTS, part, count)):
        if field in ONLY_CHECKED:
            with contextlib.suppress(configs.ConfigError):
                configs.load(None, [configs.Override(field, value)])
            continue
        # The program is one that other tests compile, too.
        line = micro(text, model__vocab_size=300, training__sample_every=0)
        # The last one counts.
        line += [f"--config.{field}={value}", f"--workdir={workdir / str(number)}"]
        code = cli.main(line)
        said = capfd.readouterr()
        what = f"{field}={value!r}: {said.err}"
        assert code in (0, 2, 65, 78), what
        assert "Traceback" not in said.err + said.out, what
        if code == 78:
            lines = said.err.splitlines()
            assert lines and all(line.startswith("config error: ") for line in lines), what
        assert (code == 0) == (workdir / str(number) / "models").exists(), what


@pytest.mark.parametrize("part", range(10))
def test_in_the_config_file(part):
    for field, value in changes(VALUES, 100 + part, 100):
        section, _, name = field.rpartition(".")
        values: dict[str, Any] = {section: {name: value}} if section else {name: value}
        lines = problems(values)
        assert all(line and "\n" not in line for line in lines), lines
