"""Recovery from bad steps, whose loss or gradient was not finite and whose update was skipped.

The ladder, in steps in a row: skip, lower the learning rate, roll back and skip the data, halt.
Overflows of float16 are not bad steps: the loss scale falls with each, and after too many in a row
the run continues in float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from craft_jax.training.callbacks import RollBack, ScaleLearningRate, StepRecord
from craft_jax.training.settings import TrainingConfig

_LEARNING_RATE_FACTOR = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """State of the policy; that of a new run is `Recovery()`.

    Attributes:
      bad_steps: skipped updates in a row, overflows not counted.
      overflows: overflows of float16 in a row.
      roll_backs: how often the run was rolled back because of bad steps.
      float32_after: the step after which the run continues in float32; None for never.
    """

    bad_steps: int = 0
    overflows: int = 0
    roll_backs: int = 0
    float32_after: int | None = None

    def is_in_float32(self, step: int) -> bool:
        """Returns whether a step of a float16 run computes in float32."""
        return self.float32_after is not None and step > self.float32_after

    def to_meta(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {
            "bad_steps": self.bad_steps,
            "overflows": self.overflows,
            "roll_backs": self.roll_backs,
            "wide_after": self.float32_after,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], roll_backs: int) -> "Recovery":
        """Returns the state that a checkpoint kept; `roll_backs` is the least number of them."""
        return cls(
            bad_steps=meta.get("bad_steps", 0),
            overflows=meta.get("overflows", 0),
            roll_backs=max(roll_backs, meta.get("roll_backs", 0)),
            float32_after=meta.get("wide_after"),
        )


@dataclasses.dataclass(frozen=True)
class SwitchToFloat32:
    """Request: compute all steps after `after` in float32."""

    after: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Halt:
    """Request: end the run with DivergedError."""

    message: str


Request = ScaleLearningRate | RollBack | SwitchToFloat32 | Halt


def after_step(
    config: TrainingConfig, known: Recovery, record: StepRecord
) -> tuple[Recovery, list[Request]]:
    """Returns the state after a step, and the requests in the order in which they are carried out.

    The step after this one may already run, so requests hold from the one after that.
    """
    is_skipped = bool(record.metrics["skipped"])
    is_overflow = is_skipped and "loss_scale" in record.metrics
    overflows = known.overflows + 1 if is_overflow else 0
    count = known.bad_steps + 1 if is_skipped and not is_overflow else 0
    after = record.step + 1
    requests: list[Request] = []
    float32_after = known.float32_after
    if overflows >= config.max_overflows and float32_after is None:
        float32_after = after
        reason = f"float16 overflowed {overflows} times in a row (training.max_overflows)"
        requests.append(SwitchToFloat32(after, reason))
    known = dataclasses.replace(
        known, bad_steps=count, overflows=overflows, float32_after=float32_after
    )
    if not count:
        return known, requests
    reason = f"{count} updates in a row were skipped up to step {record.step}"
    if count == config.reduce_after:
        requests.append(ScaleLearningRate(_LEARNING_RATE_FACTOR, reason))
    if count == config.roll_back_after and known.roll_backs < config.max_roll_backs:
        requests.append(RollBack(reason, before=record.step - count + 1, skips_through=after))
    elif count >= config.max_bad_steps or count == config.roll_back_after > 0:
        requests.append(
            Halt(
                f"training diverged: the loss or gradient of the last {count} steps, up to step "
                f"{record.step}, was not finite and their updates were skipped; lower "
                "optim.learning_rate or optim.clip_norm, or warm up longer; to look at the last of "
                f"them add `replay_step={record.step}` to `run=NAME`"
            )
        )
    return known, requests
