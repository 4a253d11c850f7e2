"""A model that another tool quantized, as what our own quantization leaves on disk.

Evaluation, export and measurement read the files that `compressor.quantize.codes` describes,
whoever chose the codes. A GGUF file has block types that no grid of ours holds: it becomes a plain
checkpoint of the values that it stands for, in float32 (``checkpoint``). So does, for what is not
quantized, a model whose output layer is no longer the embeddings', as after a rotation.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RunError
from compressor.export.artifact import MAX_SHARD_BYTES
from compressor.imports.packed import PackedCheckpoint, open_packed
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint, untie, write_checkpoint
from compressor.models.gguf_file import open_gguf
from compressor.models.source import ResolvedSource, materialise
from compressor.numerics.scheme import Scheme
from compressor.quantize.codes import (
    HEAD,
    LAYERS,
    block_file,
    flatten,
    save_synced,
    write_synced,
)
from compressor.quantize.coverage import Coverage
from compressor.quantize.registry import relative_error

CHECKPOINT = "checkpoint"
GGUF_FILE = "model.gguf"
_OTHER_MODEL = "give a quantized form of the very model that `model:` names"


def import_model(
    model: CausalLM,
    resolved: ResolvedSource,
    directory: Path,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Read a quantized model into ``directory``, beside the baseline that it was made from.

    Args:
        model: the baseline, opened.
        resolved: the quantized model.
        directory: receives the codes, or the plain checkpoint of a GGUF file.
        advance: called with a note after each block.

    Returns:
        What `driver.quantize_model` returns, as far as it is known: seconds, tokens (0), scheme,
        coverage, head; and ``imported``, the format; ``dense``, whether there are no codes;
        ``checkpoint``, whether the codes are of the checkpoint beside them, not of the baseline.

    Raises:
        RunError: the format is not read, or it is another model.
    """
    started = time.perf_counter()
    if resolved.kind == "gguf":
        shutil.copyfile(resolved.path, directory / GGUF_FILE)
        facts = import_gguf(model, directory)
    else:
        facts = _import_packed(model, open_packed(resolved.path), directory, advance)
    return {"seconds": time.perf_counter() - started, "tokens": 0, **facts}


def _import_packed(
    model: CausalLM,
    packed: PackedCheckpoint,
    directory: Path,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    if packed.config.get("kv_cache_scheme"):
        raise RunError(
            "an imported checkpoint with scales of cached keys and values is not read",
            where=str(packed.source.directory / "config.json"),
            fix="import one without kv_cache_scheme",
        )
    names = set(packed.names)
    records: list[dict[str, Any]] = []
    schemes: Counter[Scheme] = Counter()
    done: set[str] = set()
    head = model.head()
    if head is not None and head.name not in names:
        head = None
    coverage = Coverage(model, head)
    own_head = _own_head(model, packed) if head is None else None
    changed = _changed(model, packed, names)
    if own_head is not None:
        # Whose output layer parted from the embeddings without being quantized was rotated, or
        # changed as a whole in some other way: its weights are not the baseline's plus an error.
        _write_checkpoint(model, changed | own_head, directory / CHECKPOINT)
        changed = {}
    blocks = [(index, model.linears(index)) for index in range(len(model.blocks))]
    if head is not None:
        blocks.append((len(blocks), [head]))
    for index, refs in blocks:
        tensors: dict[str, torch.Tensor] = {}
        for ref in refs:
            if ref.name not in names:
                records.append({"block": index, "name": ref.name, "reason": "not quantized there"})
                continue
            tensor, scheme = packed.read(ref.name)
            key = model.head_key() if ref is head else f"{ref.name}.weight"
            weight = model.checkpoint.tensor(key).float()
            if tensor.codes.shape != weight.shape:
                raise _another(f"{ref.name} is {tuple(tensor.codes.shape)}", packed)
            tensors |= flatten(ref.name, tensor)
            schemes[scheme] += weight.numel()
            done.add(ref.name)
            record = _record(index, ref.name, scheme.to_dict(), weight, tensor.dequantize())
            records.append(record if own_head is None else record | {"error": None})
        path = directory / HEAD if index == len(model.blocks) else block_file(directory, index)
        if index == 0:
            tensors |= {f"{key}.replaced": value for key, value in changed.items()}
        save_synced(tensors, path, {})
        advance(f"block {index}")
    if strange := names - done:
        raise _another(f"it has a quantized {sorted(strange)[0]}, which the model has not", packed)
    if not done:
        raise _another("none of its layers is quantized", packed)
    write_synced(directory / LAYERS, [json.dumps(record) for record in records])
    return {
        "scheme": schemes.most_common(1)[0][0].to_dict(),
        "coverage": coverage.facts(records),
        "head": head.name if head is not None else None,
        "imported": packed.format,
        "dense": False,
        "checkpoint": own_head is not None,
    }


def _own_head(model: CausalLM, packed: PackedCheckpoint) -> dict[str, torch.Tensor] | None:
    """The output layer's weight by its name, where it was the embeddings' and no longer is."""
    path = packed.source.directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    tied = config.get("text_config", config).get("tie_word_embeddings", True)
    head = model.head()
    if head is None or not model.head_is_tied or tied:
        return None
    key = f"{head.name}.weight"
    if not packed.source.has(key):
        return None
    weight = packed.source.tensor(key)
    if weight.shape != model.checkpoint.shape(model.head_key()):
        raise _another(f"{key} is {tuple(weight.shape)}", packed)
    return {key: weight}


def _write_checkpoint(model: CausalLM, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """The baseline with other tensors, and an output layer of its own."""
    source = model.checkpoint
    kept = ((key, source.tensor(key)) for key in source.names if key not in tensors)
    write_checkpoint(chain(kept, tensors.items()), source.directory, directory, MAX_SHARD_BYTES)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    untie(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _changed(
    model: CausalLM, packed: PackedCheckpoint, quantized: set[str]
) -> dict[str, torch.Tensor]:
    """Unquantized tensors that are not the baseline's, such as norms that AWQ scaled, by name."""
    found = {}
    for key in model.checkpoint.names:
        if key.removesuffix(".weight") in quantized or not packed.source.has(key):
            continue
        theirs, ours = packed.source.tensor(key), model.checkpoint.tensor(key)
        if theirs.shape != ours.shape:
            raise _another(f"{key} is {tuple(theirs.shape)}", packed)
        if not torch.equal(theirs.float(), ours.float()):
            found[key] = theirs
    return found


def _another(what: str, packed: PackedCheckpoint) -> RunError:
    return RunError(
        f"this is another model than the baseline: {what}",
        where=str(packed.source.directory),
        fix=_OTHER_MODEL,
    )


def import_gguf(model: CausalLM, directory: Path) -> dict[str, Any]:
    """Dequantize ``directory/model.gguf`` into ``directory/checkpoint``, and record its layers.

    Args:
        model: the baseline, opened.

    Returns:
        scheme, coverage and so on, as of `import_model`.
    """
    file = directory / GGUF_FILE
    found = ResolvedSource("gguf", file, None, str(file), [file])
    reader = open_gguf(file)
    path = materialise(found, directory / CHECKPOINT, dtype="float32")
    theirs = Checkpoint(path)
    coverage = Coverage(model, None)
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    scheme = {"name": "/".join(sorted(sizes)), "weights": {"group_size": None}}
    records = []
    for index in range(len(model.blocks)):
        for ref in model.linears(index):
            key = f"{ref.name}.weight"
            ours = model.checkpoint.tensor(key).float()
            if not theirs.has(key) or theirs.shape(key) != tuple(ours.shape):
                raise RunError(
                    f"this is another model than the baseline: {key} is not the same there",
                    where=str(file),
                    fix=_OTHER_MODEL,
                )
            records.append(_record(index, ref.name, scheme, ours, theirs.tensor(key).float()))
    write_synced(directory / LAYERS, [json.dumps(record) for record in records])
    return {
        "scheme": scheme,
        "coverage": coverage.facts(records),
        "head": None,
        "imported": "gguf",
        "dense": True,
    }


def _record(
    block: int, name: str, scheme: dict[str, Any], ours: torch.Tensor, theirs: torch.Tensor
) -> dict[str, Any]:
    """A layer's line in ``layers.jsonl``; the error is that of the weight [out, in]."""
    return {
        "block": block,
        "name": name,
        "scheme": scheme,
        "parameters": ours.numel(),
        "tokens": None,
        "undersampled": False,
        "error": relative_error(ours, theirs, None),
        "rtn_error": None,
        "fallback": False,
    }
