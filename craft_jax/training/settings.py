"""The `training` section of a config: how long, what to do on the way, and in which numbers."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from craft_jax.schema import Contradiction, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, what to do on the way, and in which numbers."""

    num_steps: int = setting(1000, "optimizer steps", minimum=1, resumable=True)
    eval_every: int = setting(
        250, "steps between evaluations; 0 for only the last", minimum=0, resumable=True
    )
    checkpoint_every: int = setting(
        250,
        "steps between checkpoints; 0 for only the last and the best",
        minimum=0,
        resumable=True,
    )
    keep_checkpoints: int = setting(
        2,
        "newest checkpoints that stay, beside the best; a single one could be damaged",
        minimum=2,
        resumable=True,
    )
    log_every: int = setting(10, "steps between logged lines", minimum=1, resumable=True)
    sample_every: int = setting(250, "steps between samples; 0 for none", minimum=0, resumable=True)
    sample_tokens: int = setting(
        100, "tokens in a sample of text; the last one is longer", minimum=1, maximum=100_000
    )
    accumulate: int = setting(1, "micro-batches that a batch is computed in", minimum=1)
    precision: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "the dtype of products and activations; parameters stay float32"
    )
    max_overflows: int = setting(
        20, "overflows of float16 in a row after which a run goes on in float32", minimum=1
    )
    remat: bool = setting(False, "recompute activations in the backward pass to save memory")
    seed: int = setting(0, "of parameters, dropout and data order", minimum=0, maximum=2**32 - 1)
    reduce_after: int = setting(
        5,
        "skipped updates in a row after which the learning rate is halved; 0: never",
        minimum=0,
        resumable=True,
    )
    roll_back_after: int = setting(
        10,
        "skipped updates in a row after which the run goes back to the checkpoint before them and "
        "skips their batches; 0: never",
        minimum=0,
        resumable=True,
    )
    max_roll_backs: int = setting(3, "how often a run may go back so", minimum=0, resumable=True)
    max_bad_steps: int = setting(
        20, "skipped updates in a row that end the run", minimum=1, resumable=True
    )
    stall_seconds: float | None = setting(
        None,
        "seconds without progress that end the run with its stacks shown (exit 76); none for 20 "
        "usual steps, at least 60 s; 0 for never. What compiles may take half an hour",
        minimum=0,
        resumable=True,
    )
    callbacks: tuple[str, ...] = setting((), "callback classes of your own, path/file.py:Class")

    def contradictions(self) -> Iterator[Contradiction]:
        if 0 < (self.stall_seconds or 0) < 1:
            yield Contradiction(
                ("training.stall_seconds",),
                f"training.stall_seconds={self.stall_seconds} is shorter than a step may be; use 1 "
                "or more, or 0 for never",
            )
