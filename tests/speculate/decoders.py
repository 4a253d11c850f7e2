"""Targets for tests of verified decoding, and a proposer that is right as often as is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare

from compressor.models.architecture import CausalLM, LinearRef, by_input
from compressor.numerics import grid, siblings
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme
from compressor.speculate.cached import CachedModel
from compressor.speculate.candidates import ROOT, Candidates
from compressor.speculate.proposer import States
from tests import tiny


def load(directory: Path, arch: str = "llama", scheme: str | None = None, **changes: Any) -> Any:
    """A tiny causal LM in float32; rounded to nearest where there is a scheme."""
    tiny.build(arch, directory, **changes)
    model = CausalLM.open(directory)
    if scheme is not None:
        parsed = Scheme.parse(scheme, 32 if scheme[1] in "234" else None)
        for index in range(len(model.blocks)):
            for group in by_input(model.linears(index)).values():
                made = siblings.quantized([_rounded(model, ref, parsed) for ref in group])
                model.replace_linears(group, made)
    return model.load_full(torch.float32)


def _rounded(
    model: CausalLM, ref: LinearRef, scheme: Scheme
) -> tuple[QuantizedTensor, Scheme, torch.Tensor | None]:
    weight = model.checkpoint.tensor(f"{ref.name}.weight").float()
    scale, zero = grid.fit_grid(weight, scheme.weights)
    bias = None
    if ref.module.bias is not None:
        bias = model.checkpoint.tensor(f"{ref.name}.bias").float()
    return grid.quantize(weight, scale, zero, scheme.weights), scheme, bias


def target(directory: Path, arch: str = "llama", scheme: str | None = None, **changes: Any) -> Any:
    """The same, ready to decode."""
    return CachedModel(load(directory, arch, scheme, **changes))


def prompts(count: int, most: int = 20, seed: int = 0) -> list[list[int]]:
    """Random token ids, of all lengths up to ``most``."""
    random = np.random.default_rng(seed)
    return [random.integers(4, 250, 1 + i % most).tolist() for i in range(count)]


def chi_square(counts: Mapping[Any, int], probabilities: Mapping[Any, float]) -> float:
    """How likely (p-value) it is that counts are as far from what their probabilities give; what
    hardly comes is one cell, since the test wants about 5 in each."""
    total = sum(counts.values())
    assert all(probabilities[key] > 0 for key in counts)
    observed, wanted = [0.0], [0.0]
    for key, probability in probabilities.items():
        if total * probability >= 5:
            observed.append(counts[key])
            wanted.append(total * probability)
        else:
            observed[0] += counts[key]
            wanted[0] += total * probability
    assert len(wanted) > 30
    start = 0 if wanted[0] >= 5 else 1
    if start:
        observed[1] += observed[0]
        wanted[1] += wanted[0]
    return float(chisquare(observed[start:], wanted[start:], sum_check=False).pvalue)


class Foresight:
    """Proposes random trees in which what the target will say is hidden.

    Args:
        outputs: what the target says to each prompt.
        hits: how often a node behind a right one is right too.
        nodes: of a tree; a chain where ``branching`` is False.
        aux_layers: as `Proposer`.
    """

    def __init__(
        self,
        outputs: Sequence[Sequence[int]],
        *,
        hits: float = 0.7,
        nodes: int = 12,
        branching: bool = True,
        aux_layers: tuple[int, ...] = (),
    ) -> None:
        self.aux_layers = aux_layers
        self.outputs, self.hits, self.nodes, self.branching = outputs, hits, nodes, branching
        self.random = np.random.default_rng(0)
        self.live: list[int] = []
        self.seen: list[list[States]] = []

    def start(
        self,
        sequences: Sequence[States],
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.live = list(range(len(sequences)))
        self.seen = [[states] for states in sequences]
        self.prompts = [len(states.tokens) for states in sequences]

    def propose(self, last: Sequence[int], depth: int) -> list[Candidates]:
        return [self._tree(i, token, depth) for i, token in zip(self.live, last, strict=True)]

    def drop(self, rows: Sequence[int]) -> None:
        self.live = [i for row, i in enumerate(self.live) if row not in rows]

    def accept(self, states: Sequence[States]) -> None:
        for i, settled in zip(self.live, states, strict=True):
            self.seen[i].append(settled)

    def states(self, index: int) -> States:
        """All that was seen of a sequence."""
        tokens, hidden, aux = zip(*self.seen[index], strict=True)
        return States(
            torch.cat(tokens), torch.cat(hidden), torch.cat(aux) if self.aux_layers else None
        )

    def _tree(self, index: int, last: int, depth: int) -> Candidates:
        made = sum(len(states.tokens) for states in self.seen[index]) - self.prompts[index]
        output = self.outputs[index]
        assert output[made] == last
        ahead = output[made + 1 :]
        tokens: list[int] = []
        parents: list[int] = []
        depths, right = {ROOT: 0}, {ROOT: True}
        for _ in range(int(self.random.integers(0, self.nodes + 1))):
            node = len(tokens)
            parent = int(self.random.integers(ROOT, node)) if self.branching else node - 1
            level = depths[parent]
            if level == depth:
                continue
            can = right[parent] and level < len(ahead)
            right[node] = bool(can and self.random.random() < self.hits)
            depths[node] = level + 1
            parents.append(parent)
            tokens.append(ahead[level] if right[node] else int(self.random.integers(4, 250)))
        return Candidates(
            torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64)
        )
