"""What the frozen target makes of a corpus, computed once: epochs then cost the speculator alone.

Flat files in bfloat16, one run of numbers over all samples in their order, mapped when read:

    hidden.bf16     [tokens, hidden]: what the output layer reads, after the final norm
    aux.bf16        [tokens, layers * hidden]: the residual stream after some of the blocks
    features.json   how they are laid out, and how many batches are done
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.errors import RunError
from compressor.models.head import last_hidden
from compressor.speculate.corpus import Corpus, batches_of_like_length

_HIDDEN, _AUX, _FACTS = "hidden.bf16", "aux.bf16", "features.json"
_CHECKPOINT_SECONDS = 20.0
_BYTES = 2


def feature_bytes(tokens: int, hidden: int, layers: int = 0) -> int:
    """Bytes on disk of the features of so many tokens, without padding."""
    return tokens * hidden * (1 + layers) * _BYTES


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The decoder blocks of a loaded causal LM.

    Raises:
        RunError: it has no list of as many modules as its config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise RunError(
        f"no list of {count} decoder blocks was found",
        where=type(model).__name__,
        fix="only models with a list of equal decoder blocks can be given a speculator",
    )


@contextlib.contextmanager
def block_outputs(model: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collects the residual stream of every forward pass under it.

    Args:
        model: a transformers causal LM.
        layers: counted as vLLM counts ``eagle_aux_hidden_state_layer_ids``: 0 is the input of the
            first block, i the output of the i-th, before any norm.

    Yields:
        [batch, length, hidden] by layer, of the latest pass.

    Raises:
        RunError: the model has no such layer.
    """
    seen: dict[int, torch.Tensor] = {}
    blocks = decoder_blocks(model) if layers else nn.ModuleList()
    for layer in layers:
        if not 0 <= layer <= len(blocks):
            raise RunError(
                f"there is no output of block {layer}: the model has {len(blocks)}",
                where="speculator layers",
                fix=f"choose layers from 0 to {len(blocks)}",
            )

    def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[0] = args[0] if args else kwargs["hidden_states"]

    def leaving(layer: int) -> Any:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            seen[layer] = out[0] if isinstance(out, tuple) else out

        return note

    handles = []
    for layer in set(layers):
        if layer:
            handles.append(blocks[layer - 1].register_forward_hook(leaving(layer)))
        else:
            handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Features:
    """The target's states of a corpus, read from disk sample by sample. Make one with `open`.

    Attributes:
        size: width of a hidden state.
        layers: what `aux` is made of.
    """

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self.size: int = facts["hidden"]
        self.layers: tuple[int, ...] = tuple(facts["layers"])
        self._ends = np.cumsum(facts["lengths"], dtype=np.int64)
        shape = (int(self._ends[-1]), self.size)
        self._hidden = np.memmap(directory / _HIDDEN, np.uint16, "r", shape=shape)
        self._aux: np.ndarray | None = None
        if self.layers:
            shape = (shape[0], facts["aux"])
            self._aux = np.memmap(directory / _AUX, np.uint16, "r", shape=shape)

    @classmethod
    def open(cls, directory: Path) -> Features:
        """What `write_features` finished.

        Raises:
            RunError: it is not there, or not finished.
        """
        facts = _read_facts(directory)
        if facts is None or facts["done"] < facts["batches"]:
            raise RunError(
                "the target's states are not there, or not all of them",
                where=str(directory),
                fix="compute them again",
            )
        return cls(directory, facts)

    def hidden(self, row: int) -> torch.Tensor:
        """What the output layer reads at each token of a sample, bfloat16 [length, hidden]."""
        return self._read(self._hidden, row)

    def aux(self, row: int) -> torch.Tensor:
        """The residual stream after each of `layers`, side by side, at each token of a sample,
        bfloat16 [length, layers * hidden]; ValueError where there are none."""
        if self._aux is None:
            raise ValueError("the features were written without layers")
        return self._read(self._aux, row)

    def _read(self, source: np.ndarray, row: int) -> torch.Tensor:
        start = self._ends[row - 1] if row else 0
        values = np.array(source[start : self._ends[row]]).view(np.int16)
        return torch.from_numpy(values).view(torch.bfloat16)


def feature_batches(corpus: Corpus, batch_size: int) -> list[list[int]]:
    """The samples that run together: those of like length."""
    return batches_of_like_length(corpus.lengths, batch_size)


@torch.inference_mode()
def write_features(
    model: Any,
    corpus: Corpus,
    directory: Path,
    *,
    layers: Sequence[int] = (),
    batch_size: int = 8,
    advance: Callable[[str], None] = lambda note: None,
) -> Features:
    """Run the frozen target over a corpus, once; resumes what a killed call left, to equal bytes.

    Args:
        model: a transformers causal LM in evaluation mode, quantized or not.
        corpus: what it reads.
        directory: for the files.
        layers: see `block_outputs`; none for hidden states alone.
        batch_size: samples that run together.
        advance: called with a note after each of `feature_batches`.

    Returns:
        The features.

    Raises:
        RunError: the model has no such layer, or the disk no room.
    """
    directory.mkdir(parents=True, exist_ok=True)
    batches = feature_batches(corpus, batch_size)
    device = next(model.parameters()).device
    with block_outputs(model, layers) as seen:
        hidden = last_hidden(model, torch.tensor([[int(corpus.tokens[0, 0])]], device=device))
        facts: dict[str, Any] = {
            "hidden": hidden.shape[-1],
            "aux": sum(seen[layer].shape[-1] for layer in layers),
            "layers": list(layers),
            "lengths": corpus.lengths.tolist(),
            "batches": len(batches),
            "corpus": corpus.sha256(),
        }
        before = _read_facts(directory) or {}
        with _Writer(directory, facts) as writer:
            same = {**before, "done": 0} == {**facts, "done": 0} and not writer.anew
            done = before["done"] if same else 0
            for number, rows in enumerate(batches):
                if number < done:
                    advance("already done")
                    continue
                longest = int(corpus.lengths[rows].max())
                ids = torch.from_numpy(corpus.tokens[rows, :longest].astype(np.int64)).to(device)
                hidden = last_hidden(model, ids)
                aux = torch.cat([seen[layer] for layer in layers], -1) if layers else None
                for place, row in enumerate(rows):
                    length = int(corpus.lengths[row])
                    writer.write(_HIDDEN, row, hidden[place, :length])
                    if aux is not None:
                        writer.write(_AUX, row, aux[place, :length])
                writer.done(number + 1)
                advance(f"{int(corpus.lengths[rows].sum())} tokens")
    return Features.open(directory)


class _Writer:
    """The files of features under way.

    Args:
        directory: that they lie in.
        facts: of ``features.json``, without how many batches are done.

    Attributes:
        anew: files of this size were not there yet.
    """

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self.directory = directory
        self.facts = facts
        self._starts = np.concatenate([[0], np.cumsum(facts["lengths"], dtype=np.int64)])
        self._written = time.monotonic()
        self._widths = {_HIDDEN: facts["hidden"]} | ({_AUX: facts["aux"]} if facts["aux"] else {})
        self._files: dict[str, int] = {}
        self.anew = False

    def __enter__(self) -> _Writer:
        for name, width in self._widths.items():
            size = int(self._starts[-1]) * width * _BYTES
            self._files[name] = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o666)
            self.anew = self.anew or os.fstat(self._files[name]).st_size != size
            try:
                os.posix_fallocate(self._files[name], 0, size)
            except OSError as error:
                self.__exit__()
                raise RunError(
                    f"no room for {size / 1e9:.1f} GB of the target's states ({error.strerror})",
                    where=str(self.directory),
                    fix="free disk space, or train on fewer or shorter samples",
                ) from error
            os.truncate(self._files[name], size)
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def write(self, name: str, row: int, states: torch.Tensor) -> None:
        """States [length, width] of a sample into one of the files."""
        values: Any = states.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        data = memoryview(values.reshape(-1)).cast("B")
        place = int(self._starts[row]) * self._widths[name] * _BYTES
        while data:
            count = os.pwrite(self._files[name], data, place)
            data, place = data[count:], place + count

    def done(self, batches: int) -> None:
        """Note that so many batches are written, now and then: they are synced before that."""
        if batches < self.facts["batches"] and (
            time.monotonic() - self._written < _CHECKPOINT_SECONDS
        ):
            return
        for number in self._files.values():
            os.fsync(number)
        temporary = self.directory / f"{_FACTS}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps({**self.facts, "done": batches}, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / _FACTS)
        self._written = time.monotonic()


def _read_facts(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
