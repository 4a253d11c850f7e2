"""Fewer kernels in a decode step: a model's small operations compiled while the step is captured.

A block's norms, rotary embedding and gate are some thirty operations on a few kilobytes each: on a
GPU as many kernels, which weigh beside products that only have to read four bits a weight. Compiled
(torch.compile) they are a handful. The model's products stay as they are, so that little is
compiled, once for all blocks. What is replaced is put back at the end: a CUDA graph keeps the
kernels that it was captured with.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.siblings import Sibling

# What transformers' modelling files call them.
_SMALL = ("RMSNorm", "MLP")
_ROTARY = "apply_rotary_pos_emb"
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def fused(model: nn.Module, compile: Compile = torch.compile) -> Iterator[int]:
    """Run a model's norms, rotary embeddings and gated products compiled, as long as this lasts.

    Args:
        model: of transformers; other threads must not use its class meanwhile.
        compile: of a function.

    Yields:
        How many modules and functions are compiled.
    """
    compiled = functools.cache(compile)
    with contextlib.ExitStack() as stack:
        count = 0
        for kind in (QuantizedLinear, Sibling):  # their products are one kernel already
            whole = torch.compiler.disable(kind.forward)
            stack.enter_context(_replaced(kind, "forward", whole))
        for module in model.modules():
            if type(module).__name__.endswith(_SMALL):
                function = compiled(type(module).forward)
                bound = functools.partial(function, module)
                stack.enter_context(_replaced(module, "forward", bound))
                count += 1
        files = {sys.modules[type(module).__module__] for module in model.modules()}
        for file in files:
            if hasattr(file, _ROTARY):
                stack.enter_context(_replaced(file, _ROTARY, compiled(getattr(file, _ROTARY))))
                count += 1
        yield count


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute set for a while, and put back, or taken away, as it was."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
