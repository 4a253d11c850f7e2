"""GGUF, the format of llama.cpp and of what is built on it (Ollama, LM Studio).

One file, ``model.gguf``, holds weights, the model's shape and the tokenizer
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Codes are carried over as they are
wherever one of ggml's block types holds the grid (`compressor.numerics.ggml`):

- symmetric, up to 4 bits: Q4_0; asymmetric: Q4_1; symmetric, 5 to 8 bits: Q8_0; with one scale per
  output channel, or per group of a multiple of 32 columns;
- a linear that no block type holds (FP8, groups of 16 columns) is written as its dequantized values
  in 16 bits, and named in ``compression.json``;
- every other matrix keeps its dtype, the embeddings unless they are asked for in Q8_0; vectors are
  float32, as llama.cpp wants them.

llama.cpp rounds activations itself, to 8 bits per 32 columns, with every quantized weight: a
scheme's own activations (W8A8) are not carried over, nor are scales of cached keys and values.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from compressor.errors import RunError
from compressor.export.artifact import complete
from compressor.export.gguf_model import Layout
from compressor.export.gguf_vocabulary import add_vocabulary
from compressor.export.ledger import TensorLedger
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.numerics.ggml import permute_rows, round_to_q8_0, to_blocks
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme

NAME = "gguf"
FILE = "model.gguf"
STORED = "stored"
_TOOL = "compressor"
_FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
_FLOAT16_MAX = 65504.0
_EMBEDDINGS = "token_embd.weight"
_OUTPUT = "output.weight"  # the output layer, where it does not share the embeddings


@dataclass
class Conversion:
    """What became of the quantized linears.

    Attributes:
        types: how many linears have which type of ggml.
        rounded: linears whose scales float16 holds only nearly: largest error of a value, in steps
            of the grid, by name. All others are exact.
        in_16_bits: why no block type holds a linear, by name.
        notes: what is not carried over.
        embeddings: where they were rounded: type, and length of the error / that of the weight.
    """

    types: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    in_16_bits: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    embeddings: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``compression.json`` has it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def export(
    model_dir: Path,
    quantized: Iterable[tuple[str, QuantizedTensor, Scheme]],
    provenance: dict[str, Any],
    directory: Path,
    replaced: Mapping[str, torch.Tensor] | None = None,
    head: str | None = None,
    title: str = "",
    embeddings: str = STORED,
) -> Conversion:
    """Write a complete artifact directory; equal inputs give equal bytes.

    One tensor is in memory at a time.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once; nothing for the baseline.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
        replaced: unquantized tensors that differ from the baseline's, by name.
        head: name of the output layer, where it is among those quantized.
        title: ``general.name``, the model's name for people.
        embeddings: ``stored``, or ``Q8_0`` to round them to it, and with them the output layer
            where it is the same matrix.

    Raises:
        RunError: llama.cpp would compute something else than this model; columns are grouped by
            activation order; or a tensor has no place in the format.
    """
    model = CausalLM.open(model_dir)
    layout = Layout(model.config)
    source = Checkpoint(model_dir)
    skipped = set(model.unread())
    shared = model.head_key() if model.head_is_tied else None
    if shared is not None:  # a checkpoint may hold the shared weight twice
        skipped |= {f"{ref.name}.weight" for ref in (model.head(),) if ref} - {shared}
    directory.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    found = Conversion()
    with tempfile.TemporaryFile(dir=directory) as spool:
        writer = GGUFWriter(None, layout.arch, use_temp_file=True)
        writer.temp_file = cast(Any, spool)
        sizes: Counter[Type] = Counter()
        for name, tensor, scheme in quantized:
            order = layout.row_order(f"{name}.weight")
            if order is not None:
                tensor = permute_rows(tensor, order)
            kind, data = _linear(name, tensor, found)
            place = _OUTPUT if name == head else _place(layout, f"{name}.weight")
            writer.add_tensor(place, data, raw_dtype=kind)
            sizes[kind] += tensor.codes.numel()
            if not (name == head and shared is not None):
                done.add(f"{name}.weight")
            if scheme.input_activations is not None and not found.notes:
                found.notes.append(
                    f"{scheme.name}: llama.cpp rounds activations to 8 bits per 32 columns, not as "
                    "this scheme does"
                )
        if not sizes:
            sizes.update(_matrices(source, model))
        for key in source.names:
            if key in done or key in skipped:
                continue
            value = (replaced or {}).get(key)
            value = source.tensor(key) if value is None else value
            order = layout.row_order(key)
            place = _EMBEDDINGS if key == shared else _place(layout, key)
            if place == _EMBEDDINGS and embeddings != STORED:
                kind, data = _embeddings(value, found)
            else:
                kind, data = _dense(value if order is None else value[order])
            writer.add_tensor(place, data, raw_dtype=kind)
        for key, value in layout.extra().items():
            writer.add_tensor(key, value.numpy(), raw_dtype=Type.F32)
        _add_metadata(writer, layout, model_dir, found, title, max(sizes, key=lambda k: sizes[k]))
        writer.write_header_to_file(path=directory / FILE)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    complete(model_dir, {**provenance, "gguf": found.to_dict()}, directory)
    return found


def copy(model_dir: Path, file: Path, provenance: dict[str, Any], directory: Path) -> None:
    """A GGUF file that another tool wrote as a complete artifact directory."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, directory / FILE)
    complete(model_dir, provenance, directory)


def _linear(
    name: str, tensor: QuantizedTensor, found: Conversion
) -> tuple[Type, NDArray[np.generic]]:
    """One quantized linear's type and bytes, entered in ``found``."""
    if tensor.g_idx is not None:
        raise RunError(
            "GGUF has no columns grouped by activation order",
            where=name,
            fix="set static_groups: true beside desc_act, or remove gguf from `export:`",
        )
    blocks = to_blocks(tensor)
    if isinstance(blocks, str):
        found.in_16_bits[name] = blocks
        value = tensor.dequantize()
        fits = float(value.abs().max()) <= _FLOAT16_MAX
        kind, data = _dense(value.to(torch.float16 if fits else torch.bfloat16))
    else:
        kind, data = blocks.type, blocks.data
        if blocks.error:
            found.rounded[name] = round(blocks.error, 6)
    found.types[kind.name] = found.types.get(kind.name, 0) + 1
    return kind, data


def _embeddings(value: torch.Tensor, found: Conversion) -> tuple[Type, NDArray[np.generic]]:
    """The embeddings in Q8_0, or as they are where it cannot hold them; entered in ``found``."""
    made = round_to_q8_0(value)
    if isinstance(made, str):
        found.notes.append(f"the embeddings are as they were stored, not in Q8_0: {made}")
        return _dense(value)
    data, error = made
    found.embeddings = {"type": Type.Q8_0.name, "error": round(error, 6)}
    found.notes.append(
        f"the embeddings are rounded to Q8_0 (relative error {error:.2g}), which no evaluation of "
        "the codes sees"
    )
    return Type.Q8_0, data


def _dense(value: torch.Tensor) -> tuple[Type, NDArray[np.generic]]:
    """Type and bytes of a tensor that is not quantized: vectors in float32, matrices as they are
    (bfloat16 as uint8 with a last dimension of bytes, as the library has it)."""
    if value.ndim <= 1:
        return Type.F32, value.float().numpy()
    kind = _FLOATS.get(value.dtype)
    if kind is None:
        kind, value = Type.F32, value.float()
    if kind == Type.BF16:
        return kind, value.contiguous().view(torch.uint8).numpy()
    return kind, value.contiguous().numpy()


def _place(layout: Layout, key: str) -> str:
    """Name in the file of a tensor of the checkpoint."""
    name = layout.name(key)
    if name is None:
        raise RunError(
            f"tensor {key} has no place in a GGUF file of architecture {layout.arch}",
            where=NAME,
            fix="remove gguf from `export:`",
        )
    return name


def _matrices(source: Checkpoint, model: CausalLM) -> Counter[Type]:
    """Elements of the blocks' linears by type, where none is quantized."""
    sizes: Counter[Type] = Counter()
    for index in range(len(model.blocks)):
        for ref in model.linears(index):
            key = f"{ref.name}.weight"
            sizes[_FLOATS.get(source.dtype(key), Type.F32)] += source.numel(key)
    return sizes


def _add_metadata(
    writer: GGUFWriter, layout: Layout, model_dir: Path, found: Conversion, title: str, most: Type
) -> None:
    """Everything but the tensors. ``most`` is the type that most of the weights have."""
    writer.add_type(gguf.GGUFType.MODEL)
    if title:
        writer.add_name(title)
    total, shared, expert, count = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, count))
    if found.types:
        writer.add_quantized_by(_TOOL)
    if found.notes:
        writer.add_description("; ".join(found.notes))
    layout.add_metadata(writer)
    writer.add_file_type(_FILE_TYPES[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, model_dir, layout.config.vocab_size)


def compare_tensors(
    source_dir: Path,
    directory: Path,
    schemes: Mapping[str, str],
    *,
    unread: Iterable[str] = (),
    lost: Iterable[str] = (),
) -> TensorLedger:
    """An artifact against its source, as `compressor.export.ledger.compare_tensors` has it.

    Sizes are by scheme with ggml's type (``W4A16, Q4_0``), or by that type alone.

    Args:
        source_dir: the original checkpoint.
        directory: the artifact.
        schemes: name of the scheme of every quantized linear, by the linear's name.
        unread: tensors of the source that the modelling code never reads; they are left out.
        lost: tensors that went missing before the source was written.
    """
    model = CausalLM.open(source_dir)
    layout = Layout(model.config)
    written = {tensor.name: tensor for tensor in GGUFReader(directory / FILE).tensors}
    scheme_of = {layout.name(f"{name}.weight") or name: one for name, one in schemes.items()}
    expected = {*layout.extra(), *scheme_of}
    missing = set(lost) | set(unread)
    for key in Checkpoint(source_dir).names:
        name = layout.name(key)
        if name == _OUTPUT and model.head_is_tied:
            name = _EMBEDDINGS
        if name in written:
            expected.add(name)
        elif key not in missing:
            missing.add(key)
    sizes: Counter[str] = Counter()
    for name, tensor in written.items():
        kind = tensor.tensor_type.name
        sizes[f"{scheme_of[name]}, {kind}" if name in scheme_of else kind] += int(tensor.n_bytes)
    return TensorLedger(
        missing=sorted(missing),
        added=sorted(set(written) - expected),
        unread=[],
        bytes_by_scheme=dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
    )
