"""The compressed-tensors format, read by vLLM, SGLang, TGI and transformers.

Format: https://github.com/vllm-project/compressed-tensors. ``config.json`` carries
``quantization_config``; only keys that older readers know are written. Tensors per linear:

- ``int-quantized`` (8-bit weights and activations): ``weight`` int8 [out, in], ``weight_scale``
  [out, groups], ``input_scale`` [1] when activations are static;
- ``pack-quantized`` (weights only): ``weight_packed`` int32 [out, in * bits / 32],
  ``weight_scale`` [out, groups], ``weight_shape`` int64 [2], ``weight_zero_point`` packed along
  out when asymmetric, ``weight_g_idx`` int32 [in] when columns were grouped by activation order.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import nn

from compressor.errors import RunError
from compressor.export.artifact import MAX_SHARD_BYTES, complete, write_json
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint, TensorWriter
from compressor.numerics.linear import QuantizedLinear
from compressor.numerics.packing import pack_int32, unpack_int32
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import ActivationScheme, Scheme, WeightScheme

NAME = "compressed-tensors"


def quantization_config(schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of a model.

    Args:
        schemes: of every quantized linear, by name.
        ignore: names of linears that stay as they are.
    """
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    order = sorted(members, key=lambda scheme: (scheme.name, str(scheme)))
    formats = {scheme: _format(scheme) for scheme in order}
    mixed = len(set(formats.values())) > 1
    groups = {}
    for number, scheme in enumerate(order):
        # Names, where several schemes share a model: engines look those up before classes.
        targets = ["Linear"] if len(order) == 1 else sorted(members[scheme])
        groups[f"group_{number}"] = {"targets": targets, **_config_group(scheme)}
        if mixed:
            groups[f"group_{number}"]["format"] = formats[scheme]
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if mixed else formats[order[0]],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }
    QuantizationConfig.model_validate(config)  # the format's own library must accept it
    return config


def _config_group(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.weights.num_bits,
        "type": "int",
        "symmetric": scheme.weights.symmetric,
        "strategy": scheme.weights.strategy,
        "dynamic": False,
    }
    if scheme.weights.strategy == "group":
        weights["group_size"] = scheme.weights.group_size
    activations = None
    if scheme.input_activations is not None:
        activations = {
            "num_bits": scheme.input_activations.num_bits,
            "type": "int",
            "symmetric": scheme.input_activations.symmetric,
            "strategy": scheme.input_activations.strategy,
            "dynamic": scheme.input_activations.dynamic,
        }
    return {"weights": weights, "input_activations": activations, "output_activations": None}


def export(
    model_dir: Path,
    quantized: Iterable[tuple[str, QuantizedTensor, Scheme]],
    ignore: Sequence[str],
    provenance: dict[str, Any],
    directory: Path,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once.
        ignore: names of linears left unquantized.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
        replaced: unquantized tensors that differ from the baseline's, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = Checkpoint(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    schemes: dict[str, Scheme] = {}
    writer = TensorWriter(directory, MAX_SHARD_BYTES)
    for name, tensor, scheme in quantized:
        dtype = source.dtype(f"{name}.weight")
        for key, value in _tensors(tensor, scheme, dtype).items():
            writer.add(f"{name}.{key}", value)
        schemes[name] = scheme
    for name in source.names:
        if name.removesuffix(".weight") not in schemes:
            changed = (replaced or {}).get(name)
            writer.add(name, source.tensor(name) if changed is None else changed)
    writer.close()
    config["quantization_config"] = quantization_config(schemes, ignore)
    write_json(directory / "config.json", config)
    complete(model_dir, provenance, directory)


def export_dense(model_dir: Path, provenance: dict[str, Any], directory: Path) -> None:
    """The baseline itself as a complete artifact directory, so that it is served alike."""
    directory.mkdir(parents=True, exist_ok=True)
    source = Checkpoint(model_dir)
    writer = TensorWriter(directory, MAX_SHARD_BYTES)
    for name in source.names:
        writer.add(name, source.tensor(name))
    writer.close()
    shutil.copyfile(model_dir / "config.json", directory / "config.json")
    complete(model_dir, provenance, directory)


def load_model(
    directory: Path,
    *,
    kernel: Literal["reference", "auto"] = "reference",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A compressed-tensors directory (ours or another tool's) as a runnable causal LM.

    Args:
        directory: holds config.json with ``quantization_config`` and safetensors; a directory
            without ``quantization_config`` is loaded as it is.
        kernel: ``reference`` (dequantized weights, activations rounded as the engine rounds them)
            or ``auto`` (low-bit kernels where this device has them).
        dtype: of activations and of everything that is not quantized.

    Raises:
        RunError: the directory uses a part of the format that is not read here.
    """
    model = CausalLM.open(directory)
    found = json.loads((directory / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    if found:
        scheme_of = _read_schemes(found, directory)
        source = Checkpoint(directory)
        for index in range(len(model.blocks)):
            for ref in model.linears(index):
                if source.has(f"{ref.name}.weight") and not source.has(f"{ref.name}.weight_scale"):
                    continue
                scheme = scheme_of(ref.name)
                tensor = read_tensor(source, ref.name, scheme)
                bias = source.tensor(f"{ref.name}.bias") if ref.module.bias is not None else None
                model.replace_linear(
                    ref,
                    QuantizedLinear.from_tensor(tensor, scheme, bias, kernel=kernel, dtype=dtype),
                )
    return model.load_full(dtype, "cpu")


def read_tensor(source: Checkpoint, name: str, scheme: Scheme) -> QuantizedTensor:
    """One linear of a compressed-tensors checkpoint."""
    scale = source.tensor(f"{name}.weight_scale").float()
    bits = scheme.weights.num_bits
    if source.has(f"{name}.weight_packed"):
        shape = torch.Size(source.tensor(f"{name}.weight_shape").tolist())
        codes = unpack_int32(source.tensor(f"{name}.weight_packed"), bits, shape)
    else:
        codes = source.tensor(f"{name}.weight")
    zero_point = None
    if not scheme.weights.symmetric:
        zero_point = source.tensor(f"{name}.weight_zero_point")
        if zero_point.dtype == torch.int32:
            zero_point = unpack_int32(zero_point, bits, scale.shape, packed_dim=0)
    g_idx = None
    if source.has(f"{name}.weight_g_idx"):
        g_idx = source.tensor(f"{name}.weight_g_idx")
    input_scale = None
    if source.has(f"{name}.input_scale"):
        input_scale = source.tensor(f"{name}.input_scale").float().view(1)
    return QuantizedTensor(codes, scale, zero_point, g_idx, scheme.weights, input_scale)


def _format(scheme: Scheme) -> str:
    return "int-quantized" if scheme.input_activations is not None else "pack-quantized"


def _tensors(
    tensor: QuantizedTensor, scheme: Scheme, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The format's tensors of one linear. Scales of packed weights are stored in the model's own
    dtype, which engines load them into; the grid was rounded to it before codes were chosen."""
    if _format(scheme) == "int-quantized":
        found = {"weight": tensor.codes, "weight_scale": tensor.scale}
        if tensor.input_scale is not None:
            found["input_scale"] = tensor.input_scale
        return found
    bits = scheme.weights.num_bits
    found = {
        "weight_packed": pack_int32(tensor.codes, bits),
        "weight_scale": tensor.scale.to(dtype),
        "weight_shape": torch.tensor(tensor.codes.shape, dtype=torch.int64),
    }
    if tensor.zero_point is not None:
        found["weight_zero_point"] = pack_int32(tensor.zero_point, bits, packed_dim=0)
    if tensor.g_idx is not None:
        found["weight_g_idx"] = tensor.g_idx
    return found


def _read_schemes(config: dict[str, Any], directory: Path) -> Callable[[str], Scheme]:
    """What the scheme of a linear is, by its name."""
    where = str(directory / "config.json")
    groups = list(config.get("config_groups", {}).values())
    if config.get("quant_method") != NAME or not groups:
        raise RunError(
            "only compressed-tensors checkpoints with config groups are read",
            where=where,
            fix="export the model as compressed-tensors",
        )
    read = [(group["targets"], _read_scheme(group)) for group in groups]

    def scheme_of(name: str) -> Scheme:
        for by_name in (True, False):  # names go before classes
            for targets, scheme in read:
                for target in targets:
                    pattern = target.removeprefix("re:")
                    named = re.match(pattern, name) if target.startswith("re:") else name == target
                    if named if by_name else target == "Linear":
                        return scheme
        raise RunError(
            f"no config group is for {name}, which holds quantized weights",
            where=where,
            fix="the checkpoint's config and weights do not belong together: export it again",
        )

    return scheme_of


def _read_scheme(group: dict[str, Any]) -> Scheme:
    weights, activations = group["weights"], group.get("input_activations")
    bits = weights["num_bits"]
    return Scheme(
        name=f"W{bits}A{activations['num_bits'] if activations else 16}",
        weights=WeightScheme(
            num_bits=bits,
            symmetric=weights["symmetric"],
            strategy=weights["strategy"],
            group_size=weights.get("group_size"),
        ),
        input_activations=ActivationScheme(
            num_bits=activations["num_bits"],
            symmetric=activations["symmetric"],
            strategy=activations["strategy"],
            dynamic=activations["dynamic"],
        )
        if activations
        else None,
    )
