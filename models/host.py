"""What a process has to be told about its memory and threads, most of it before torch is imported. Standard library.

Each setting was measured to matter on CPUs and leaves alone what the user's environment already says.
"""

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def prepare() -> None:
    """Call before the first import of torch; a later call changes nothing that torch has read by then."""
    # Threads that spin while they wait lose most of their speed as soon as another job wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Large tensors on huge pages: weights that are read once a token come from memory almost half as fast again.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _set_heap_limit(32 * 2**20)


def return_memory() -> None:
    """Give every freed tensor of 2 MB or more back at once: for models beside which activations count.

    glibc keeps what is smaller than a limit on a heap, which fragments: a training step of 13 M parameters leaves it a
    third larger than what the step holds. Giving it back costs page faults, a tenth of the speed of a 1 M model, none
    that could be measured of larger ones.
    """
    _set_heap_limit(2 * 2**20)


def _set_heap_limit(size: int) -> None:
    """Tell glibc which allocations are too large for its heap; left alone, it moves this limit as it goes."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and os.name == "posix":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # else it is not glibc, and there is nothing to mend
            mallopt(_M_MMAP_THRESHOLD, size)
