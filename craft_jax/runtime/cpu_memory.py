"""How glibc's malloc treats the scratch memory of XLA:CPU."""

import ctypes
import importlib.metadata
import importlib.util
import platform


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation instead of giving it back.

    XLA:CPU allocates the scratch memory of a program at every call. Returned to the system each
    time, it comes back as page faults: about a third of a train step of a 10M model. To be called
    before JAX starts its threads. Memory stays at its peak, which the next step needs again. The
    price is one arena for all threads, so tokenizing takes longer. Nothing happens with another C
    library, nor where JAX has a plugin for an accelerator, whose memory it manages itself.
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


def return_freed_memory() -> None:
    """Gives the system back what is free now; to be called while a step has its scratch memory.

    That takes another place now and then, where something small was put beside the old one.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
