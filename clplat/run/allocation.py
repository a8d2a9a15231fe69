"""Memory that a step has freed, kept for the next one."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt
_MOST = 2**31 - 1
_TOLD = ("MALLOC_MMAP_", "MALLOC_TRIM_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Let this process keep the memory that it frees, for what it asks for next; whether it does.

    glibc gives each tensor above 32 MB pages of its own, and these back as soon as the tensor is freed: the system then
    clears pages anew in every step, which takes as long as the network itself where activations are large (EfficientNet
    on images of 224 pixels). A process that is told what to keep (`MALLOC_MMAP_...`, `MALLOC_TRIM_...`,
    `GLIBC_TUNABLES`) is left alone, and so is one with another C library. Memory of an accelerator is not concerned.
    """
    if any(name.startswith(_TOLD) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _MOST))
