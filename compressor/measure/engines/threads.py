"""Processors for the thread that computes."""

from __future__ import annotations

import ctypes
import os

_SOFT = 1  # omp_pause_soft (OpenMP 5.0, 3.6): what threads keep stays


def release_workers() -> None:
    """Let the calling thread's idle OpenMP workers go; its next parallel operation makes new ones.

    Each thread that computes has workers of its own. GNU OpenMP's wait actively between operations
    only while there are no more of them than processors, all threads' counted (``GOMP_SPINCOUNT``
    in its manual); beyond that each operation first wakes them up. So those that loading a model
    left in one thread slow down the engine that serves it in another: SmolLM2 in int8 on two cores,
    70 ms instead of 46 ms a step. Nothing happens where torch was built with another OpenMP.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return
    try:  # torch's own, which is loaded: no other is
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        library.omp_pause_resource_all(_SOFT)
    except (OSError, AttributeError):
        pass
