"""Distillation of scales: what rounding took away is made up for by the scales and the norms,
trained end to end.

Chen, Shao, Xu, Wang, Gao, Zhang, Qiao, Luo: "EfficientQAT: Efficient Quantization-Aware Training
for Large Language Models", arXiv 2407.11062, second phase (E2E-QP): codes stay as they are, the
scale of every group is trained through the whole model. Here the loss is not that of the next token
but KL(original || quantized) over the whole vocabulary at every position, which says more per token
and does not teach the model its calibration text; and the weights of the norms are trained too.
What is trained are factors that start at 1, so that one learning rate suits every tensor. Scales
and norms are rounded as they will be stored and inputs as they will be when served; gradients pass
that (straight-through). Products are of the dtype that the model runs in.

Some samples are held out. If the loss on those did not fall, nothing is changed, and the report
says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from compressor.models.folding import weight_offset
from compressor.numerics.kernels import rounded
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import ActivationScheme
from compressor.quantize.registry import AlgorithmOptions, register

_HELD_OUT = 16  # one sample in so many
_ROWS = 256  # tokens whose distributions are in memory at once
_WARM_UP = 4  # steps
_BETAS = (0.9, 0.95)

State = dict[str, torch.Tensor]


class DistillationOptions(AlgorithmOptions):
    """Options of distillation."""

    steps: int = Field(64, ge=1, description="Optimizer steps.")
    batch_size: int = Field(2, ge=1, description="Calibration samples per step.")
    learning_rate: float = Field(
        1.5e-3, gt=0, description="Of the factors on scales and norms, at its peak (Adam, cosine)."
    )
    norms: bool = Field(True, description="Train the weights of the norms as well.")


class ScaledLinear(nn.Module):
    """A quantized linear whose scales are trained: y = x W^T + b, W = codes * scale * factor.

    Args:
        tensor: the weight.
        activations: how inputs are rounded when served; None where they are not.
        bias: [out] or None.
        dtype: of the product.
        stored: dtype that scales are stored in.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    back: torch.Tensor | None
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None

    def __init__(
        self,
        tensor: QuantizedTensor,
        activations: ActivationScheme | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        stored: torch.dtype,
    ) -> None:
        super().__init__()
        self.activations = activations
        self.dtype = dtype
        self.stored = stored
        index = tensor.column_groups()
        order = torch.argsort(index, stable=True)
        codes = tensor.codes.float()
        if tensor.zero_point is not None:
            codes = codes - tensor.zero_point.float()[:, index]
        sorted_already = bool((order[1:] > order[:-1]).all())
        codes = codes if sorted_already else codes[:, order]
        # [out, groups, columns of a group], exact in bfloat16: integers of at most 8 bits.
        self.register_buffer("codes", codes.view(*tensor.scale.shape, -1).to(dtype))
        self.register_buffer("scale", tensor.scale)
        self.register_buffer("back", None if sorted_already else torch.argsort(order))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.register_buffer("input_scale", tensor.input_scale)
        self.factor = nn.Parameter(torch.ones_like(tensor.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        x = x.to(self.dtype)  # of the output layer in float32, by `Head`
        if self.activations is not None:
            flat = x.detach().reshape(-1, x.shape[-1])
            near = rounded(flat, self.activations, self.input_scale).view_as(x)
            x = x + (near - x).detach()
        weight = (self.codes * self.stored_scale().to(self.dtype).unsqueeze(-1)).flatten(1)
        if self.back is not None:
            weight = weight[:, self.back]
        return functional.linear(x, weight, self.bias)

    def stored_scale(self) -> torch.Tensor:
        """[out, groups], as it will be stored."""
        return (self.scale * self.factor).to(self.stored)


class ScaledNorm(nn.Module):
    """A norm whose weight is multiplied by a trained factor.

    Args:
        norm: any module with a one-dimensional ``weight``; what is scaled is what it multiplies by.
        stored: dtype that its weight is stored in.
    """

    def __init__(self, norm: nn.Module, stored: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.stored = stored
        weight: Any = norm.weight
        self.factor = nn.Parameter(torch.ones(weight.shape, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the norm's."""
        weight: Any = self.norm.weight
        scaled = self.stored_weight().to(weight.dtype)
        return torch.func.functional_call(self.norm, {"weight": scaled}, (x,))

    def stored_weight(self) -> torch.Tensor:
        """The weight as it will be stored."""
        weight: Any = self.norm.weight
        offset = weight_offset(self.norm)
        return ((weight.detach().float() + offset) * self.factor - offset).to(self.stored)


@register("distillation")
class Distillation:
    """Trains scales and norms of a quantized model against the original.

    Args:
        options: see `DistillationOptions`.
        scale_dtype: dtype that scales are stored in.
    """

    Options: ClassVar[type[DistillationOptions]] = DistillationOptions
    kind: ClassVar[str] = "refinement"
    level: ClassVar[str] = "model"
    takes_floats: ClassVar[bool] = True

    def __init__(
        self, options: DistillationOptions, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        self.options = options
        self.scale_dtype = scale_dtype

    def rows(self, samples: int) -> list[int]:
        """The samples, of so many, that `refine` looks at."""
        options = self.options
        train, aside = _split(samples)
        steps = (_samples(train, options.batch_size, step) for step in range(options.steps))
        return sorted({row for rows in steps for row in rows} | set(aside))

    def refine(
        self,
        factors: Mapping[str, nn.Parameter],
        last_hidden: Callable[[torch.Tensor], torch.Tensor],
        heads: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
        tokens: torch.Tensor,
        targets: Mapping[int, torch.Tensor],
        *,
        state: State | None = None,
        save: Callable[[State], None] = lambda state: None,
        advance: Callable[[str], None] = lambda note: None,
    ) -> dict[str, Any]:
        """Train the factors, in place.

        Args:
            factors: float32, by the name of what they belong to; they start at 1.
            last_hidden: the quantized model's input of the head, [1, length, hidden], of token ids
                [1, length].
            heads: (of the original, of the quantized model): logits [n, vocabulary] of [n, hidden].
            tokens: int64 [samples, length].
            targets: the original's input of its head, [length, hidden], by sample (see `rows`).
            state: of a run that was interrupted, as given to ``save``.
            save: is given everything that the next steps follow from, after each step.
            advance: called with a note after each step.

        Returns:
            the divergence on the samples that were held out, in nats per token, before and after
            (the same where nothing was gained, and then all factors are 1), and of each step.
        """
        options = self.options
        train, aside = _split(len(tokens))
        optimizer = torch.optim.Adam(list(factors.values()), options.learning_rate, _BETAS)
        losses: list[float] = []
        if state:
            before, losses = float(state["before"]), state["losses"].tolist()
            _restore(optimizer, factors, state)
        else:
            before = self._divergence(last_hidden, heads, tokens, targets, aside)
        for _ in losses:
            advance("already done")
        for step in range(len(losses), options.steps):
            rows = _samples(train, options.batch_size, step)
            rate = min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / options.steps))
            optimizer.param_groups[0]["lr"] = options.learning_rate * rate / 2
            total = 0.0
            for row in rows:
                total += self._backward(
                    last_hidden, heads, tokens[row : row + 1], targets[row], len(rows)
                )
            if not math.isfinite(total):
                break
            for factor in factors.values():  # an expert that no token went through has none
                if factor.grad is None:
                    factor.grad = torch.zeros_like(factor)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            save(_state(optimizer, factors, before, losses))
            advance(f"KL {total:.4f}")
        after = math.inf
        if len(losses) == options.steps:
            after = self._divergence(last_hidden, heads, tokens, targets, aside)
        kept = after < before
        if not kept:
            with torch.no_grad():
                for factor in factors.values():
                    factor.fill_(1.0)
        return {
            "kl_before": before,
            "kl_after": after if kept else before,
            "kept": kept,
            "held_out_samples": len(aside),
            "losses": losses,
        }

    def _backward(
        self,
        last_hidden: Callable[[torch.Tensor], torch.Tensor],
        heads: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
        ids: torch.Tensor,
        target: torch.Tensor,
        share: int,
    ) -> float:
        """Add one sample's part of the gradient; returns its part of the loss."""
        with torch.enable_grad():
            made = last_hidden(ids)[0]
            leaf = made.detach().requires_grad_(True)
            total = 0.0
            for wanted, got in zip(target.split(_ROWS), leaf.split(_ROWS), strict=True):
                loss = _kl(heads, wanted, got).sum() / (len(target) * share)
                loss.backward()
                total += float(loss.detach())
            made.backward(leaf.grad)
        return total

    @torch.no_grad()
    def _divergence(
        self,
        last_hidden: Callable[[torch.Tensor], torch.Tensor],
        heads: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
        tokens: torch.Tensor,
        targets: Mapping[int, torch.Tensor],
        rows: Sequence[int],
    ) -> float:
        """Mean over tokens of KL(original || quantized)."""
        total = 0.0
        for row in rows:
            made = last_hidden(tokens[row : row + 1])[0]
            for wanted, got in zip(targets[row].split(_ROWS), made.split(_ROWS), strict=True):
                total += float(_kl(heads, wanted, got).sum())
        return total / (len(rows) * tokens.shape[1])


def _kl(
    heads: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
    wanted: torch.Tensor,
    got: torch.Tensor,
) -> torch.Tensor:
    """KL of every token, float32 [n], from hidden states [n, hidden]."""
    original, quantized = heads
    with torch.no_grad():
        p = functional.log_softmax(original(wanted.to(got.device)), -1)
    q = functional.log_softmax(quantized(got), -1)
    return (p.exp() * (p - q)).sum(-1)


def _split(samples: int) -> tuple[int, Sequence[int]]:
    """How many samples, the first ones, are trained on, and which are held out; a single one is
    both."""
    held = max(1, samples // _HELD_OUT) if samples > 1 else 0
    return samples - held, range(samples - held, samples) if held else range(samples)


def _samples(count: int, size: int, step: int) -> list[int]:
    """Samples of a step: every one once, in an order of its own each time round."""
    rows = []
    for position in range(step * size, (step + 1) * size):
        turn, place = divmod(position, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(turn))
        rows.append(int(order[place]))
    return rows


def _state(
    optimizer: torch.optim.Adam,
    factors: Mapping[str, nn.Parameter],
    before: float,
    losses: list[float],
) -> State:
    state = {
        "before": torch.tensor(before, dtype=torch.float64),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }
    for name, factor in factors.items():
        moments = optimizer.state[factor]
        state |= {
            f"{name}:factor": factor.detach(),
            f"{name}:mean": moments["exp_avg"],
            f"{name}:square": moments["exp_avg_sq"],
        }
    return state


def _restore(
    optimizer: torch.optim.Adam, factors: Mapping[str, nn.Parameter], state: State
) -> None:
    done = torch.tensor(float(len(state["losses"])))
    for name, factor in factors.items():
        factor.data.copy_(state[f"{name}:factor"])
        optimizer.state[factor] = {
            "step": done.clone(),
            "exp_avg": state[f"{name}:mean"].to(factor.device),
            "exp_avg_sq": state[f"{name}:square"].to(factor.device),
        }
