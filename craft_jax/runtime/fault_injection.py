"""Fault injection: makes a process die, hang or fail at a chosen point, for tests.

`CRAFT_FAULT=POINT:NTH:ACTION` in the environment arms one point; the NTH time that the process
passes it, the action happens. Several are separated by commas. Without the variable `point` does
nothing. docs/reliability.md lists the points.

`CRAFT_POISON=KIND:STEPS` corrupts gradients in some steps (`nan:12`, `inf:5-9`), see `poisoned`.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

POINTS = (
    "start", "data", "compile", "step", "eval", "ckpt.begin", "ckpt.mid_write",
    "ckpt.before_commit", "ckpt.after_commit", "ckpt.mid_gc",
)  # fmt: skip


def _raise() -> None:
    raise OSError(errno.EIO, "a fault that CRAFT_FAULT asked for")


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "raise": _raise,
    "exit0": lambda: os._exit(0),
}


def _armed(text: str) -> dict[str, dict[int, Callable[[], None]]]:
    found: dict[str, dict[int, Callable[[], None]]] = {}
    for part in filter(None, text.split(",")):
        name, nth, action = part.split(":")
        kind, _, value = action.partition("=")
        if name not in POINTS or (kind != "sleep" and kind not in _ACTIONS):
            raise ValueError(f"CRAFT_FAULT={part}: no such point or action")
        act = _ACTIONS[kind] if kind != "sleep" else _sleeper(float(value))
        found.setdefault(name, {})[int(nth)] = act
    return found


def _sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


_ARMED = _armed(os.environ.get("CRAFT_FAULT", ""))
_passed: dict[str, int] = {}


def _pass(name: str) -> None:
    _passed[name] = _passed.get(name, 0) + 1
    if act := _ARMED.get(name, {}).get(_passed[name]):
        act()


def _nothing(name: str) -> None:
    """Does nothing: no fault is armed."""


point: Callable[[str], None] = _pass if _ARMED else _nothing
"""Marks a place in the program by its name, one of `POINTS`."""

_KINDS = ("nan", "inf")


def _poisons(text: str) -> list[tuple[str, int, int]]:
    found = []
    for part in filter(None, text.split(",")):
        kind, _, steps = part.partition(":")
        first, _, last = steps.partition("-")
        if kind not in _KINDS:
            raise ValueError(f"CRAFT_POISON={part}: no such kind")
        found.append((kind, int(first), int(last or first)))
    return found


_POISONS = _poisons(os.environ.get("CRAFT_POISON", ""))


def poisoned(gradients: Callable) -> Callable:
    """Wraps a gradient function: corrupts the gradients of the steps that `CRAFT_POISON` names.

    Without the variable the function itself is returned. With it the program is the same for every
    step, corrupted or not: `nan:0` gives the reference.

    Args:
      gradients: from (state, batch) to (loss, grads); `state.step` is the number of updates before
        this one, and the first update is step 1.
    """
    if not _POISONS:
        return gradients

    def corrupted(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        loss, grads = gradients(state, batch)
        return loss, _corrupt(grads, state.step)

    return corrupted


def _corrupt(grads: dict[str, Any], step: Any) -> dict[str, Any]:
    for kind, first, last in _POISONS:
        is_bad = (first <= step + 1) & (step + 1 <= last)
        # One element of one array: if devices split the layer, only one of them has it.
        path = sorted(grads)[len(grads) // 2]
        flat = grads[path].reshape(-1)
        place = (1 - is_bad.astype("int32")) * flat.size  # Beyond the end nothing is set.
        flat = flat.at[place].set(float(kind), mode="drop")
        grads = {**grads, path: flat.reshape(grads[path].shape)}
    return grads
