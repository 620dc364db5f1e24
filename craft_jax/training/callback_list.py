"""The callbacks of a run, called in order."""

import collections
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from craft_jax.training.callbacks import Callback, Request, StepRecord


class CallbackList:
    """Calls each hook of all callbacks, in their order.

    Args:
      callbacks: they keep their order.
    """

    def __init__(self, callbacks: Iterable[Callback]):
        self._callbacks = list(callbacks)

    def wanting_state(self, step: int, is_last: bool) -> list[Callback]:
        """Returns the callbacks whose `on_sync` is due after this step."""
        return [c for c in self._callbacks if c.wants_state(step, is_last)]

    def on_train_begin(self, record: StepRecord) -> None:
        for callback in self._callbacks:
            callback.on_train_begin(record)

    def on_step_end(self, record: StepRecord) -> Iterator[Request | None]:
        """Yields what each callback answers; the next is called when that is carried out."""
        return (callback.on_step_end(record) for callback in self._callbacks)

    def on_evaluate_end(self, record: StepRecord) -> Iterator[Request | None]:
        """Yields what each callback answers, as `on_step_end` does."""
        return (callback.on_evaluate_end(record) for callback in self._callbacks)

    def on_roll_back(self, record: StepRecord) -> None:
        for callback in self._callbacks:
            callback.on_roll_back(record)

    def on_save(self, record: StepRecord) -> None:
        for callback in self._callbacks:
            callback.on_save(record)

    def on_train_end(self, record: StepRecord) -> None:
        for callback in self._callbacks:
            callback.on_train_end(record)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the state of each callback that has one, by its name, copied."""
        states = {name: callback.state_dict() for name, callback in self._named()}
        return {name: copy.deepcopy(state) for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` returned."""
        for name, callback in self._named():
            if state := states.get(name):
                callback.load_state_dict(state)

    def _named(self) -> Iterator[tuple[str, Callback]]:
        """Yields each callback with its class name, numbered where a class has several."""
        seen: collections.Counter[str] = collections.Counter()
        for callback in self._callbacks:
            name = type(callback).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name}_{seen[name]}", callback
