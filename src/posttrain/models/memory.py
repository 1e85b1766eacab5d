"""Memory that the C library holds on to."""

import ctypes
import os


def trim() -> None:
    """Give freed memory back to the system where the C library (glibc) would keep it.

    Blocks of a model come and go by the dozen; without this the holes they leave add up.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if release is not None:
        release(0)
