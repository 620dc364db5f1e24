"""The train step of a run: compiled for its mesh, in its precision, with its abstract state."""

import contextlib
import threading
from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh

from craft_jax.models.base import ModelDef
from craft_jax.parallel import sharding
from craft_jax.runtime.cpu_memory import StepMemory
from craft_jax.training import state as states
from craft_jax.training.optim import Optimizer
from craft_jax.training.precision import FLOAT32, Policy
from craft_jax.training.state import TrainState
from craft_jax.training.step import Batch, Metrics, StepFunction

StepWrapper = Callable[[StepFunction], StepFunction]


class CompiledStep:
    """A train step and the states that it maps: `step(state, batch) -> (state, metrics)`.

    The state that it is given is donated: its buffers are reused for the new one.

    Args:
      make_step: returns the step function of a policy.
      model_def, optimizer, policy: the parts of the state.
      mesh: the devices.
      mode: `jit` or `pmap`.
      norms_every: steps between norms of all parameters in the metrics; 0 for none.
      can_compile_ahead: whether `compile_ahead` may be used: the batches have no other arrays than
        those of the dataset.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the state.
    """

    def __init__(
        self,
        make_step: Callable[[Policy], StepFunction],
        *,
        model_def: ModelDef,
        optimizer: Optimizer,
        policy: Policy,
        mesh: Mesh,
        mode: str = "jit",
        norms_every: int = 0,
        can_compile_ahead: bool = True,
    ):
        self.model_def, self.optimizer, self.policy = model_def, optimizer, policy
        self.mesh, self.mode, self.norms_every = mesh, mode, norms_every
        self.abstract_state = states.abstract_state(model_def, optimizer, mesh, policy)
        self._memory = StepMemory(is_cpu=mesh.devices.flat[0].platform == "cpu")
        self._step = sharding.compile_step(make_step(policy), mesh, mode)
        self._float32_step = (
            sharding.compile_step(make_step(FLOAT32), mesh, mode) if policy.scales else self._step
        )
        self._can_compile_ahead = can_compile_ahead and mode == "jit"
        self._compiler: threading.Thread | None = None
        self._has_batch = threading.Event()
        self._last_metrics: Metrics | None = None

    def __call__(
        self, state: TrainState, batch: Batch, *, in_float32: bool = False
    ) -> tuple[TrainState, Metrics]:
        """Dispatches a step; waits first for `compile_ahead`."""
        if self._compiler is not None:
            self._compiler.join()
            self._compiler = None
            self._memory.after_compiling()
        self._memory.before_step(self._last_metrics)
        step = self._float32_step if in_float32 else self._step
        state, self._last_metrics = step(state, batch)
        self._memory.after_step()
        return state, self._last_metrics

    def compile_ahead(self, make_batch: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Starts to compile the step in a thread, while the state is read or initialized.

        Errors are ignored here; the first step hits and reports them.

        Args:
          make_batch: returns a batch of the dataset; `wait_for_batch` returns after its call.
        """
        if not self._can_compile_ahead:
            return

        def compile_step() -> None:
            with contextlib.suppress(Exception):
                try:
                    batch = sharding.put_batch(make_batch(), self.mesh)
                finally:
                    self._has_batch.set()
                self._step.lower(self.abstract_state, batch).compile()

        self._compiler = threading.Thread(target=compile_step, name="compiler")
        self._compiler.start()

    def wait_for_batch(self) -> None:
        """Waits until `compile_ahead` no longer uses the dataset, which one thread may use."""
        if self._compiler is not None:
            self._has_batch.wait()

    def init_state(self, model_class: type, seed: int) -> TrainState:
        """Returns the state of a new run, with the parameters that a seed gives."""
        return states.init_state(
            model_class,
            self.model_def.config,
            self.optimizer,
            seed=seed,
            mesh=self.mesh,
            policy=self.policy,
        )

    def state_from_params(self, params: Mapping[str, np.ndarray] | None) -> TrainState:
        """Returns the state of a run that starts with given parameters.

        Args:
          params: by path, of process 0; None in the others.
        """
        on_devices = sharding.spread(params, self.abstract_state.params)
        return states.begin(on_devices, self.optimizer, self.mesh, self.policy)
