"""NF4, FP4 and LLM.int8() by the library bitsandbytes: no calibration, a format of its own.

A ``library`` algorithm is not one of the integer quantizers: it does the whole model by itself, and
what it makes can be held in its own format alone. Weights go through the library one linear at a
time, read from the checkpoint's shards, on the CPU, so that every machine makes the same bytes.

Output, readable block by block:

    block-00000.safetensors   per linear the tensors of `compressor.numerics.bitsandbytes`, each
                              under ``{linear}.{part}``; the block's records are in its metadata
    layers.jsonl              one line per linear: scheme, relative error of the weight
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import nn

from compressor.errors import RunError
from compressor.models.architecture import CausalLM, LinearRef
from compressor.models.experts import UnfusedExperts
from compressor.numerics import bitsandbytes as formats
from compressor.quantize.codes import LAYERS, block_file, save_synced, write_synced
from compressor.quantize.coverage import is_ignored
from compressor.quantize.registry import AlgorithmOptions, register, relative_error

THRESHOLD = 6.0  # LLM.int8(), section 3.2
BLOCKSIZE = 64


class BitsAndBytesOptions(AlgorithmOptions):
    """Options of bitsandbytes, by the library's names."""

    quant_type: formats.QuantType = Field(
        "nf4", description="nf4 or fp4: 4-bit weights in blocks; int8: LLM.int8()."
    )
    blocksize: Literal[64, 128, 256, 512, 1024] | None = Field(
        None, description=f"Weights that share a scale, for nf4 and fp4. Default: {BLOCKSIZE}."
    )
    double_quant: bool = Field(
        False, description="Keep the scales of nf4 and fp4 in 8 bits (bnb_4bit_use_double_quant)."
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="What nf4 and fp4 are multiplied in when served (bnb_4bit_compute_dtype). "
        "Default: the dtype that the model is stored in.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        description="Magnitude from which int8 multiplies an input column unrounded "
        f"(llm_int8_threshold); 0 rounds all. Default: {THRESHOLD:g}.",
    )

    @property
    def needs_calibration(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check_type(self) -> BitsAndBytesOptions:
        four_bit = ("blocksize", "double_quant", "compute_dtype")
        others = four_bit if self.quant_type == "int8" else ("threshold",)
        for name in others:
            if getattr(self, name):
                raise ValueError(f"{name} is not an option of quant_type {self.quant_type}")
        return self


@register("bitsandbytes")
class BitsAndBytes:
    """NF4, FP4 or LLM.int8() by the library bitsandbytes; needs no calibration."""

    Options: ClassVar[type[BitsAndBytesOptions]] = BitsAndBytesOptions
    kind: ClassVar[str] = "library"
    format: ClassVar[str] = "bitsandbytes"

    def __init__(self, options: BitsAndBytesOptions) -> None:
        self.options = options

    @classmethod
    def version(cls) -> str:
        """The library's version; RunError when it is missing or too old."""
        return formats.check_installed()

    @property
    def scheme(self) -> dict[str, Any]:
        """How reports call it: name, and group_size None for a scale per row."""
        o = self.options
        name = o.quant_type.upper() + ("+DQ" if o.double_quant else "")
        group = None if o.quant_type == "int8" else o.blocksize or BLOCKSIZE
        return {"name": name, "weights": {"group_size": group}}

    @property
    def threshold(self) -> float:
        return THRESHOLD if self.options.threshold is None else self.options.threshold

    def quantize(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
        """Quantize a weight [out, in].

        Returns:
            its tensors (see `compressor.numerics.bitsandbytes`), and its relative squared error.

        Raises:
            ValueError: the weight is not finite.
        """
        o = self.options
        if o.quant_type == "int8":
            tensors = formats.quantize_int8(weight)
        else:
            blocksize = o.blocksize or BLOCKSIZE
            tensors = formats.quantize_4bit(weight, o.quant_type, blocksize, o.double_quant)
        return tensors, relative_error(weight.float(), formats.dequantize(tensors), None)

    def settings(self, dtype: torch.dtype, skip_modules: Sequence[str]) -> dict[str, Any]:
        """Arguments of transformers' ``BitsAndBytesConfig``.

        Args:
            dtype: of the checkpoint.
            skip_modules: paths of the linears that are not quantized.
        """
        o = self.options
        skipped: dict[str, Any] = {"llm_int8_skip_modules": sorted(skip_modules)}
        if o.quant_type == "int8":
            return {"load_in_8bit": True, "llm_int8_threshold": self.threshold, **skipped}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": o.quant_type,
            "bnb_4bit_use_double_quant": o.double_quant,
            "bnb_4bit_compute_dtype": o.compute_dtype or str(dtype).removeprefix("torch."),
            **skipped,
        }

    def quantize_checkpoint(
        self,
        model: CausalLM,
        directory: Path,
        *,
        ignore: Sequence[str] = (),
        advance: Callable[[str], None] = lambda note: None,
    ) -> dict[str, Any]:
        """Quantize every linear of every block into ``directory``; resume what is already there.

        Args:
            model: the opened model; its weights are read one by one.
            directory: receives the files named in this module's docstring.
            ignore: names or regular expressions of linears to leave as they are.
            advance: called with a note after each block.

        Returns:
            seconds, scheme, coverage as of `driver.quantize_model`; ``format``, and ``settings``
            for it (see `settings`).

        Raises:
            RunError: the library is missing, no linear is left to quantize, or a weight is not
                finite.
        """
        started = time.perf_counter()
        formats.library()
        directory.mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]] = []
        for index in range(len(model.blocks)):
            path = block_file(directory, index)
            if path.exists():
                found = _records(path)
                advance("already done")
            else:
                tensors, found = self._block(model, index, ignore)
                save_synced(tensors, path, {"layers": json.dumps(found)})
                worst = max((r["error"] for r in found if "error" in r), default=0.0)
                advance(f"block {index}: worst relative error {worst:.2e}")
            records += found
        write_synced(directory / LAYERS, [json.dumps(record) for record in records])
        done = {record["name"] for record in records if "error" in record}
        if not done:
            raise RunError(
                "no linear was quantized: every one is ignored or left out",
                fix="remove entries of `ignore`",
            )
        quantized = sum(record.get("parameters", 0) for record in records)
        return {
            "seconds": time.perf_counter() - started,
            "tokens": 0,
            "scheme": self.scheme,
            "coverage": {
                "total_parameters": model.num_parameters,
                "quantized_parameters": quantized,
                "share": quantized / model.num_parameters,
                "skipped": _skipped(model, records),
            },
            "format": self.format,
            "settings": self.settings(model.config.dtype, _unquantized_modules(model, done)),
        }

    def _block(
        self, model: CausalLM, index: int, ignore: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """(tensors, records) of a block's linears."""
        tensors: dict[str, torch.Tensor] = {}
        records: list[dict[str, Any]] = []
        for ref in model.linears(index):
            reason = "ignored by the recipe" if is_ignored(ref.name, ignore) else None
            reason = reason or self._spans_rows(ref) or _unloadable(model, ref)
            if reason:
                records.append({"block": index, "name": ref.name, "reason": reason})
                continue
            weight = model.checkpoint.tensor(f"{ref.name}.weight")
            try:
                made, error = self.quantize(weight)
            except ValueError as problem:
                raise RunError(
                    str(problem), where=ref.name, fix="name the layer under `ignore`"
                ) from problem
            tensors |= {f"{ref.name}.{part}": value for part, value in made.items()}
            records.append(
                {
                    "block": index,
                    "name": ref.name,
                    "scheme": self.scheme,
                    "parameters": weight.numel(),
                    "tokens": None,
                    "undersampled": False,
                    "error": error,
                    "rtn_error": None,
                    "fallback": False,
                }
            )
        return tensors, records

    def _spans_rows(self, ref: LinearRef) -> str | None:
        """Why blocks do not fit the linear, if so: bitsandbytes 0.49 and 0.50 dequantize
        blocks that span two rows wrongly on CPUs with AVX512."""
        blocksize, width = self.scheme["weights"]["group_size"], ref.module.in_features
        if blocksize is None or width % blocksize == 0:
            return None
        return f"its {width} inputs are not a multiple of the blocksize {blocksize}"


def iterate_tensors(directory: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(linear name, its tensors by part) of a quantized directory, one linear at a time."""
    for path in sorted(directory.glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = sorted(file.keys())
            for record in json.loads(file.metadata()["layers"]):
                prefix = f"{record['name']}."
                if "error" in record:
                    yield (
                        record["name"],
                        {
                            key.removeprefix(prefix): file.get_tensor(key).clone()
                            for key in keys
                            if key.startswith(prefix)
                        },
                    )


def _records(path: Path) -> list[dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["layers"])


def _skipped(model: CausalLM, records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Name and reason of every matrix that stays as it is."""
    found = [
        (name, reason)
        for index in range(len(model.blocks))
        for name, reason in model.skipped(index)
    ]
    found += model.outside_linears()
    found += [(r["name"], r["reason"]) for r in records if "reason" in r]
    return [{"name": name, "reason": reason} for name, reason in found]


def _unloadable(model: CausalLM, ref: LinearRef) -> str | None:
    """Why transformers would not load this linear from the library's format, if so."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    if _among_experts(model, ref.path):
        return "expert: transformers holds experts in one tensor, bitsandbytes takes linears alone"
    if type(ref.module) is not nn.Linear:
        return f"a {type(ref.module).__name__}: bitsandbytes takes plain linears alone"
    kept = list(getattr(model.model, "_keep_in_fp32_modules", None) or ())
    if not should_convert_module(ref.path, kept):
        return "kept in float32 by the architecture"
    return None


def _unquantized_modules(model: CausalLM, quantized: set[str]) -> list[str]:
    """Paths of the modules that transformers would take for quantized ones."""
    from transformers.pytorch_utils import Conv1D

    return [
        path
        for path, module in model.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and model.disk_name(f"{path}.weight").removesuffix(".weight") not in quantized
        and not _among_experts(model, path)
    ]


def _among_experts(model: CausalLM, path: str) -> bool:
    parents = path.split(".")
    return any(
        isinstance(model.model.get_submodule(".".join(parents[:depth])), UnfusedExperts)
        for depth in range(1, len(parents))
    )
