"""The scratch memory of XLA:CPU: malloc settings, and one step's scratch at a time."""

import ctypes
import importlib.metadata
import importlib.util
import platform
import time
from typing import Any

import jax

_TRIM_EVERY = 10  # steps
_XLA_FREE_DELAY = 0.0005  # s; XLA:CPU frees scratch shortly after ready (<= 0.17 ms in 20 steps)


def tune_malloc() -> None:
    """Makes glibc keep freed memory for the next allocation instead of returning it.

    XLA:CPU allocates the scratch memory of a program at every call. If it is returned to the system
    each time, the next step takes page faults: about a third of a train step of a 10M model. Call
    it before JAX starts its threads. Memory stays at its peak, which the next step needs again. The
    price is one arena for all threads, so tokenizing is slower. Does nothing with another C
    library, or where JAX has a plugin for an accelerator, whose memory it manages itself.
    """
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    if platform.libc_ver()[0] != "glibc" or accelerators or importlib.util.find_spec("libtpu"):
        return
    # The numbers are those of malloc.h; a value that glibc refuses is ignored.
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)


def trim_malloc() -> None:
    """Returns free memory to the system; call it while a step holds its scratch memory.

    The scratch moves now and then, when a small allocation was placed beside the old one.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class StepMemory:
    """Limits a train loop on XLA:CPU to the scratch memory of one step; else does nothing.

    Args:
      is_cpu: whether the step runs on XLA:CPU.
    """

    def __init__(self, is_cpu: bool):
        self._is_cpu = is_cpu
        self._dispatched, self._steps = time.monotonic(), 0

    def before_step(self, previous: Any) -> None:
        """Waits until the previous step has freed its scratch memory.

        A step dispatched earlier would allocate a second one.

        Args:
          previous: outputs of the previous step; None if there is none.
        """
        if self._is_cpu and previous is not None:
            jax.block_until_ready(previous)
            # At most a hundredth of the step.
            time.sleep(min(_XLA_FREE_DELAY, (time.monotonic() - self._dispatched) / 100))
        self._dispatched = time.monotonic()

    def after_step(self) -> None:
        """Returns free memory to the system now and then; call it after the dispatch of a step."""
        self._steps += 1
        if self._is_cpu and self._steps % _TRIM_EVERY == 0:
            trim_malloc()

    def after_compiling(self) -> None:
        """Returns the memory that compiling used, which no step needs."""
        if self._is_cpu:
            trim_malloc()
