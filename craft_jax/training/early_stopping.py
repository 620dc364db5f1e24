"""Early stopping: ends a run whose metric no longer improves."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from craft_jax.schema import setting
from craft_jax.training.callbacks import (
    Callback,
    Request,
    StepRecord,
    Stop,
    metric,
)
from craft_jax.training.plateau import MonitorConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(MonitorConfig):
    """When a run ends before its last step."""

    patience: int = setting(
        0,
        "evaluations without improvement that end the run; 0 for never",
        minimum=0,
        resumable=True,
    )
    restore_best: bool = setting(
        True, "end with the parameters of the best evaluation", resumable=True
    )


class EarlyStopping(Callback):
    """Ends a run whose metric no longer improves."""

    def __init__(self, config: EarlyStoppingConfig):
        self._config = config
        self._best: float | None = None
        self._best_step, self._waited = 0, 0

    def on_evaluate_end(self, record: StepRecord) -> Request | None:
        config = self._config
        value = metric(record, config.monitor, "early_stopping.monitor")
        if not math.isfinite(value):
            return None
        if config.improves(value, self._best):
            self._best, self._best_step, self._waited = value, record.step, 0
            return None
        self._waited += 1
        if self._waited < config.patience:
            return None
        reason = (
            f"early stopping: {config.monitor} has not improved on {self._best:.4g} of step "
            f"{self._best_step}"
        )
        return Stop(reason, is_final=True, restore_best=config.restore_best)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._best_step = state["best"], state["best_step"]
        self._waited = state["waited"]
