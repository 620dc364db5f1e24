"""The section `checkpoint` of a config."""

import dataclasses
from typing import Literal

from craft_jax.schema import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written, chosen and kept; how often and how many is in `training`."""

    resume: Literal["auto", "must", "none"] = setting(
        "auto",
        "auto: continue from the newest good checkpoint; must: an error where there is none; none: "
        "set those that are there aside and begin again",
        resumable=True,
    )
    verify: Literal["full", "fast", "none"] = setting(
        "full",
        "before a checkpoint is used: full reads every byte, fast the sizes of large files",
        resumable=True,
    )
    every_minutes: float = setting(
        0.0,
        "minutes between checkpoints, beside training.checkpoint_every; 0 for none",
        minimum=0,
        resumable=True,
    )
    best_metric: str = setting("val_loss", "the metric whose best evaluations stay", resumable=True)
    best_mode: Literal["min", "max"] = setting(
        "min", "whether lower or higher is better", resumable=True
    )
    keep_best: int = setting(1, "how many of the best stay", minimum=1, resumable=True)
    keep_multiples: int = setting(
        0,
        "checkpoints whose step is a multiple of this stay forever; 0 for none",
        minimum=0,
        resumable=True,
    )
    background: bool = setting(True, "write while training goes on", resumable=True)
    on_error: Literal["warn", "halt"] = setting(
        "warn",
        "when a checkpoint on the way cannot be written: warn goes on, and halts at the third "
        "failure in a row; the last checkpoint of a run always halts",
        resumable=True,
    )


DEFAULTS = CheckpointConfig()
