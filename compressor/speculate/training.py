"""The training loop that every speculator shares: AdamW, a cosine, exact resume, early stop.

Loshchilov, Hutter: "Decoupled Weight Decay Regularization", arXiv 1711.05101. A run that is killed
goes on from its last checkpoint and ends with the bytes of an undisturbed one (on as many threads:
the order of sums depends on that).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import nn

from compressor.errors import RunError
from compressor.models.checkpoint import drop_unfinished, save_whole

STATE = "training.safetensors"
BEST = "best.safetensors"
CHECKPOINT_SECONDS = 20.0

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_PATIENCE_NON_FINITE = 3
_WRITING_SHARE = 0.05  # of the time that checkpoints may take, where the disk is slow


class SpeculatorOptions(BaseModel):
    """What the options of every speculator are made from."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(10, ge=1, description="Times that every sample is trained on.")
    learning_rate: float = Field(1e-3, gt=0, description="At its peak (AdamW, cosine to zero).")
    batch_size: int = Field(4, ge=1, description="Samples whose gradients are taken at once.")
    accumulate: int = Field(
        1, ge=1, description="Such batches per step, over all processes together."
    )
    warm_up: float = Field(
        0.05, ge=0, le=1, description="Share of the steps in which the rate rises."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the products; what is trained is float32 either way."
    )
    evaluations: int = Field(1, ge=1, description="Evaluations on the samples held out, per epoch.")
    patience: int = Field(
        3, ge=0, description="Evaluations without a gain after which training stops; 0: never."
    )
    seed: int = Field(0, ge=0, description="Of the order of samples.")


def steps_per_epoch(rows: int, options: SpeculatorOptions) -> int:
    """Optimizer steps of an epoch over so many samples."""
    return math.ceil(rows / (options.batch_size * options.accumulate))


def train(
    parameters: Mapping[str, nn.Parameter],
    backward: Callable[[Sequence[int], float], dict[str, float]],
    evaluate: Callable[[], dict[str, Any]],
    rows: Sequence[int],
    options: SpeculatorOptions,
    directory: Path,
    *,
    size: Callable[[int], float],
    advance: Callable[[str], None] = lambda note: None,
    groups: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Train parameters in place; resume what a killed call left in the directory.

    Under ``accelerate launch`` (or torchrun) the samples of each step are shared out among the
    processes and gradients are summed, so that the steps are the same on any number of processes
    but for rounding; the first process evaluates and writes.

    Args:
        parameters: float32 masters, by name.
        backward: given the samples of a micro-batch and a weight, adds weight x the gradient of
            the loss summed over what is predicted, and returns sums to log, ``loss`` among them
            (not weighted, one float each, the same keys every time).
        evaluate: figures on the samples held out; ``score`` among them, higher is better.
        rows: the samples to train on.
        options: see `SpeculatorOptions`.
        directory: for ``training.safetensors`` and ``best.safetensors``, which stay there: a
            finished call with the same directory only reads them.
        size: how much a sample counts: tokens that it predicts. A step's weight is one over the sum
            of its samples'.
        advance: called with a note after each step, also those that were done before.
        groups: factor on the learning rate by name; 1 where a name is missing.

    Returns:
        ``steps`` (of each: ``step``, and what ``backward`` returned over the step's size),
        ``evaluations`` (of each: ``step`` and what ``evaluate`` returned; the first before any
        step), ``best_step``, ``seconds``, ``skipped`` steps (the gradient was not finite),
        ``stopped_early``. The parameters hold the best step's values.

    Raises:
        RunError: there is nothing to train on, or three steps in a row were not finite.
    """
    if not rows:
        raise RunError(
            "there is no sample to train on",
            where="speculator",
            fix="give more prompts, or hold out fewer",
        )
    return _Run(parameters, options, directory, groups or {}).go(
        backward, evaluate, rows, size, advance
    )
