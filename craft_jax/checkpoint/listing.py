"""The checkpoints of a run, without their arrays; needs no JAX."""

import contextlib
import json
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from craft_jax import outputs
from craft_jax.checkpoint import manifest
from craft_jax.errors import StorageError, UsageError

PARAMS, AVERAGE, OPTIMIZER = "params", "average", "optimizer"
"""The folders of a checkpoint's arrays."""

_META, _CONFIG, _TOKENIZER = "meta.json", "config.json", "tokenizer.json"

# Partial, removed and damaged checkpoints, which the project itself leaves beside the others.
_SET_ASIDE = re.compile(r"^\.\d+\.(tmp|trash)-|^\d+\.(corrupt|aside)(-\d+)?$")


class Best(NamedTuple):
    """The checkpoint with the best evaluation.

    Attributes:
      step: of the checkpoint.
      value: of the metric.
      metric: such as `val_loss`.
    """

    step: int
    value: float
    metric: str


class Checkpoints:
    """The step folders of one run, without their arrays; needs no JAX.

    A folder is a checkpoint if its name is a step and its manifest is intact; other entries are
    ignored.

    Args:
      folder: of the step folders.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return sorted(step for step, wrong in self._surveyed().items() if wrong is None)

    def damaged(self) -> dict[int, str]:
        """Returns the steps whose folder holds something, but no whole manifest, and why."""
        return {step: wrong for step, wrong in sorted(self._surveyed().items()) if wrong}

    def corrupt(self) -> list[str]:
        """Returns the names of damaged checkpoints that were set aside."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if ".corrupt" in p.name)

    def foreign(self) -> list[str]:
        """Returns the names of entries that are not the project's."""
        if not self.folder.is_dir():
            return []
        surveyed = {str(step) for step in self._surveyed()}
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.name not in surveyed and not _SET_ASIDE.search(path.name)
        )

    def _surveyed(self) -> dict[int, str | None]:
        """Returns, by step, what is wrong with the folder of that name; None for nothing."""
        found: dict[int, str | None] = {}
        if not self.folder.is_dir():
            return found
        for path in self.folder.iterdir():
            if not (path.name.isdecimal() and path.name.isascii() and path.is_dir()):
                continue
            if path.name != str(int(path.name)):
                continue
            try:
                manifest.read(path)
                found[int(path.name)] = None
            except manifest.DamagedError as error:
                with contextlib.suppress(OSError):  # Another process may be removing it.
                    if any(path.iterdir()):
                        found[int(path.name)] = str(error)
        return found

    def newest_good(
        self, level: manifest.Level = "full", below: int | None = None
    ) -> tuple[int | None, dict[int, str]]:
        """Returns the newest step that is as it was written, and what is wrong with newer ones.

        Args:
          level: how closely to look, see `manifests.check`.
          below: only steps before this one; None for all.
        """
        surveyed = self._surveyed()
        bad: dict[int, str] = {}
        for step in sorted(surveyed, reverse=True):
            if below is not None and step >= below:
                continue
            wrong = surveyed[step] or self.wrong(step, level)
            if wrong is None:
                return step, bad
            bad[step] = wrong
        return None, bad

    def wrong(self, step: int, level: manifest.Level = "full") -> str | None:
        """Returns what is wrong with a checkpoint; None for nothing."""
        try:
            manifest.check(self.folder / str(step), level)
        except manifest.DamagedError as error:
            return str(error)
        return None

    def latest(self) -> int | None:
        """Returns the newest step, or None."""
        return max(self.steps(), default=None)

    def ranked(self, metric: str, mode: str) -> list[tuple[int, float]]:
        """Returns the evaluated steps with their values of a metric, the best first.

        Args:
          metric: such as `val_loss`.
          mode: whether `min` or `max` is better.
        """
        found = [(step, self.meta(step).get("metrics", {}).get(metric)) for step in self.steps()]
        known = [(step, value) for step, value in found if value is not None and isfinite(value)]
        return sorted(known, key=lambda pair: pair[1] if mode == "min" else -pair[1])

    def best(self) -> Best | None:
        """Returns the checkpoint with the best evaluation, by the config of the newest one."""
        newest = self.latest()
        saved = {} if newest is None else self.config(newest).get("checkpoint", {})
        metric = saved.get("best_metric", "val_loss")
        ranked = self.ranked(metric, saved.get("best_mode", "min"))
        return Best(*ranked[0], metric) if ranked else None

    def named(self, checkpoint: str) -> int | None:
        """Returns the step of `best`, of `last` (None: the newest), or of a number.

        Raises:
          UsageError: it is none of these, or no checkpoint was evaluated.
        """
        if checkpoint == "last":
            return None
        if checkpoint != "best":
            if not checkpoint.isdecimal():
                raise UsageError(f"`checkpoint={checkpoint}` is not best, last or a step")
            return int(checkpoint)
        best = self.best()
        if best is None:
            raise UsageError("`checkpoint=best`: no checkpoint of this run was evaluated; use last")
        return best.step

    def meta(self, step: int) -> dict:
        """Returns what was stored beside the arrays."""
        return self._read_json(step, _META)

    def config(self, step: int) -> dict:
        """Returns the config of the run, as JSON."""
        return self._read_json(step, _CONFIG)

    def tokenizer_file(self, step: int) -> Path | None:
        """Returns the path of the tokenizer, or None if the run has none."""
        path = self.folder / str(step) / _TOKENIZER
        return path if path.is_file() else None

    def params_part(self, step: int, *, last: bool = False) -> str:
        """Returns which part of a checkpoint has the parameters that are used.

        Args:
          step: of the checkpoint.
          last: those of the last update, even where there is an average of them.
        """
        return PARAMS if last or not self.has_average(step) else AVERAGE

    def has_average(self, step: int) -> bool:
        """Returns whether the optimizer kept an average of the parameters."""
        return (self.folder / str(step) / AVERAGE).is_dir()

    def has_optimizer(self, step: int) -> bool:
        """Returns whether a checkpoint can be resumed exactly; imported ones have weights only."""
        return (self.folder / str(step) / OPTIMIZER).is_dir()

    def _read_json(self, step: int, name: str) -> dict:
        path = self.folder / str(step) / name
        try:
            return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        except (OSError, ValueError) as error:
            raise StorageError(f"checkpoint file {path} cannot be read: {error}") from error


def write_beside_arrays(
    folder: Path, step: int, meta: Mapping, config: Mapping, tokenizer: str | None
) -> None:
    """Writes the files of a checkpoint that are not arrays."""
    if tokenizer is not None:
        outputs.write_text(folder / _TOKENIZER, tokenizer)
    outputs.write_json(folder / _CONFIG, config)
    outputs.write_json(folder / _META, {"step": step, **meta})
