"""A window of steps under JAX's profiler, for TensorBoard's profile page or Perfetto."""

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from craft_jax.schema import Contradiction, setting
from craft_jax.training.callbacks import Callback, StepRecord

logger = logging.getLogger(__name__)

_STEPS = re.compile(r"(\d+)(?::(\d+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are profiled; a run may continue with others."""

    steps: str | None = setting(
        None,
        "FIRST:LAST, the steps that JAX's profiler records; none for no profile",
        resumable=True,
    )

    @property
    def window(self) -> tuple[int, int] | None:
        """The first and the last step, or None."""
        found = _STEPS.fullmatch(self.steps or "")
        if not found:
            return None
        return int(found.group(1)), int(found.group(2) or found.group(1))

    def contradictions(self) -> Iterator[Contradiction]:
        window = self.window
        if self.steps is not None and (window is None or not 1 <= window[0] <= window[1]):
            yield Contradiction(
                ("profile.steps",),
                f"profile.steps={self.steps} is not FIRST:LAST, such as 10:15; steps count from 1",
            )


class Profile(Callback):
    """Records a window of steps; the device is waited for at both ends.

    Args:
      first, last: the steps.
      folder: where TensorBoard looks for profiles.
    """

    def __init__(self, first: int, last: int, folder: Path):
        self._first, self._last, self._folder = first, last, folder
        self._is_on = False

    def wants_state(self, step: int, is_last: bool) -> bool:
        return step in (self._first - 1, self._last)

    def on_train_begin(self, record: StepRecord) -> None:
        if record.step == self._first - 1 and not record.is_open:
            self._begin()

    def on_sync(self, record: StepRecord) -> None:
        # What comes before is computed, and what follows has not begun.
        jax.block_until_ready(record.state)
        if record.step == self._first - 1:
            self._begin()
        else:
            self._end()

    def on_roll_back(self, record: StepRecord) -> None:
        self._end()

    def on_train_end(self, record: StepRecord) -> None:
        self._end()

    def _begin(self) -> None:
        if not self._is_on:
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def _end(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            logger.info(
                "profile of steps %d to %d: tensorboard --logdir=%s (with the package xprof), or "
                "its plugins/profile/*/*.trace.json.gz at ui.perfetto.dev",
                self._first,
                self._last,
                self._folder,
            )
