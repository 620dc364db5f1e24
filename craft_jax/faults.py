"""Faults on purpose: how the tests make a process die, hang or fail at a chosen place.

`CRAFT_FAULT=POINT:NTH:ACTION` in the environment arms one point; the NTH time that the process
passes it, the action happens. Several are separated by commas. Without the variable `point` does
nothing. docs/reliability.md lists the points.
"""

import errno
import os
import signal
import time
from collections.abc import Callable

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
