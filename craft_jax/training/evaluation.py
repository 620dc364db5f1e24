"""One pass over a split: what the trainer does now and then, and the evaluate command once."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from craft_jax.data.base import Dataset
from craft_jax.data.loading import prefetch, read_batch
from craft_jax.models.base import ModelDef, Params
from craft_jax.models.losses import Sums
from craft_jax.parallel import sharding
from craft_jax.training.precision import Policy
from craft_jax.training.step import make_eval_step


class Evaluator:
    """Adds the losses of a split up; compiled once.

    Args:
      model_def: the model.
      policy: the dtype that computes.
      mesh: the devices.
    """

    def __init__(self, model_def: ModelDef, policy: Policy, mesh: Mesh):
        self._eval_step, self._mesh = jax.jit(make_eval_step(model_def, policy)), mesh

    def __call__(
        self, params: Params, data: Dataset, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Returns the sums over all batches, each by its name in what the loss returns.

        Batches are added in float64 and in order, so equal parameters give equal results.

        Args:
          params, data: what is evaluated on what.
          between: called before each batch; it may raise to end the evaluation.
        """
        total: dict[str, float] = {}

        def add(sums: Sums) -> None:
            for name, value in sums._asdict().items():
                if name == "penalty":  # Only training adds one.
                    continue
                total[name] = total.get(name, 0.0) + float(value)

        waiting: Sums | None = None
        for batch in prefetch(
            lambda i: sharding.put_batch(read_batch(data, i), self._mesh), 0, len(data)
        ):
            between()
            sums = self._eval_step(params, batch)
            if waiting is not None:  # The batch before, while this one runs.
                add(waiting)
            waiting = sums
        if waiting is not None:
            add(waiting)
        return total
