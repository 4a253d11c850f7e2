"""MKL's vector math (cos, exp, log, ... of torch on x86 CPUs), made safe to use from threads.

Its first call in a process finds out the kind of CPU: it writes the raw answer into a global, and
then, in a second store, the index of its tables that this stands for. Another thread that reads in
between takes kernels of another accuracy: the cosines of a rotary table were off by 1.5e-4 that
way in half their rows, about once in a thousand processes and often on a busy machine.
"""

from __future__ import annotations

import torch


def settle() -> None:
    """Make that first call on one thread (a tensor of one element is never split)."""
    torch.cos(torch.zeros(1))
