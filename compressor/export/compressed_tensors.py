"""The compressed-tensors format, read by vLLM, SGLang, TGI and transformers.

Format: https://github.com/vllm-project/compressed-tensors. ``config.json`` carries
``quantization_config``; only keys that older readers know are written. Tensors per linear:

- ``int-quantized`` (8-bit weights and activations): ``weight`` int8 [out, in], ``weight_scale``
  [out, groups], ``input_scale`` [1] when activations are static;
- ``float-quantized`` (8-bit floating point): the same with ``weight`` float8_e4m3fn;
- ``pack-quantized`` (weights only): ``weight_packed`` int32 [out, in * bits / 32],
  ``weight_scale`` [out, groups], ``weight_shape`` int64 [2], ``weight_zero_point`` packed along
  out when asymmetric, ``weight_g_idx`` int32 [in] when columns were grouped by activation order.

With ``kv_cache_scheme``, each attention has ``k_scale`` and ``v_scale`` float32 [1].
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import nn

from compressor.errors import RunError
from compressor.export.artifact import MAX_SHARD_BYTES, complete, write_json
from compressor.export.weights import Quantized, write_weights
from compressor.models.architecture import CausalLM, LinearRef, by_input
from compressor.models.checkpoint import Checkpoint, TensorWriter
from compressor.models.kv_cache import KEY, VALUE, round_cache
from compressor.numerics import siblings
from compressor.numerics.packing import pack_int32, unpack_int32
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import KV_CACHE, ActivationScheme, Scheme, WeightScheme

NAME = "compressed-tensors"
# Model types whose logits vLLM 0.32 computes from the embeddings, or by a ParallelLMHead that it
# does not give the quantization config (vllm/model_executor/models).
_NO_QUANTIZED_HEAD = frozenset(
    {
        "bloom", "cohere", "cohere2", "cohere2_moe", "falcon_h1", "gemma2", "gemma3n_text",
        "gpt_oss", "jamba", "mamba", "mamba2", "opt", "plamo3", "qwen3_next", "step3_text",
        "zamba2",
    }
)  # fmt: skip


def check_head(model: CausalLM) -> None:
    """Raise `RunError` where engines do not load a quantized output layer.

    vLLM 0.32 does for a ``ParallelLMHead`` that is named lm_head and given the quantization config.
    """
    ref, family = model.head(), model.config.model_type
    if ref is None or ref.name.rpartition(".")[2] != "lm_head" or family in _NO_QUANTIZED_HEAD:
        raise RunError(
            f"engines load no quantized lm_head for models of type {family}",
            where=type(model.model).__name__,
            fix="remove `lm_head:` from the variant",
        )


def quantization_config(
    schemes: Mapping[str, Scheme],
    ignore: Sequence[str],
    head: str | None = None,
    kv_cache: ActivationScheme | None = None,
) -> dict[str, Any]:
    """``quantization_config`` of a model.

    Args:
        schemes: of every quantized linear, by name.
        ignore: names of linears that stay as they are.
        head: name of the output layer, where it is one of those quantized. Its group names it:
            to vLLM it is no "Linear".
        kv_cache: of cached keys and values; None where they stay as they are.
    """
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    uniform = len({scheme for name, scheme in schemes.items() if name != head}) == 1
    order = sorted(members, key=lambda scheme: (scheme.name, str(scheme)))
    formats = {scheme: _format(scheme) for scheme in order}
    mixed = len(set(formats.values())) > 1
    groups = {}
    for number, scheme in enumerate(order):
        # Names, where several schemes share a model: engines look those up before classes.
        targets = sorted(members[scheme])
        if uniform and members[scheme] != [head]:
            targets = ["Linear"] + [name for name in targets if name == head]
        groups[f"group_{number}"] = {"targets": targets, **_config_group(scheme)}
        if mixed:
            groups[f"group_{number}"]["format"] = formats[scheme]
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if mixed else formats[order[0]],
        "quantization_status": "compressed",
        "config_groups": groups,
        # lm_head: transformers' name for output layers that have another on disk (GPT-NeoX).
        "ignore": sorted(set(ignore) | ({"lm_head"} if head is None else set())),
        "kv_cache_scheme": _activations(kv_cache) if kv_cache else None,
    }
    QuantizationConfig.model_validate(config)  # the format's own library must accept it
    return config


def _config_group(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.weights.num_bits,
        "type": scheme.weights.type,
        "symmetric": scheme.weights.symmetric,
        "strategy": scheme.weights.strategy,
        "dynamic": False,
    }
    if scheme.weights.strategy == "group":
        weights["group_size"] = scheme.weights.group_size
    inputs = scheme.input_activations
    activations = _activations(inputs) if inputs is not None else None
    return {"weights": weights, "input_activations": activations, "output_activations": None}


def _activations(scheme: ActivationScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.num_bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "dynamic": scheme.dynamic,
    }


def export(
    model_dir: Path,
    quantized: Quantized,
    ignore: Sequence[str],
    provenance: dict[str, Any],
    directory: Path,
    replaced: Mapping[str, torch.Tensor] | None = None,
    head: str | None = None,
    kv_cache: ActivationScheme | None = None,
    kv_scales: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete artifact directory; equal inputs give equal bytes.

    Args:
        model_dir: the baseline's checkpoint directory.
        quantized: (linear name, tensor, scheme), in any order, read once.
        ignore: names of linears left unquantized.
        provenance: written as ``compression.json``; must hold no times.
        directory: receives the artifact.
        replaced: unquantized tensors that differ from the baseline's, by name.
        head: name of the output layer, where it is among those quantized. Where it shared the
            embeddings' weight, that stays, and the config says that it is no longer shared.
        kv_cache: scheme of cached keys and values; None where they stay as they are.
        kv_scales: their scales float32 [1], by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, schemes = write_weights(
        model_dir, quantized, _tensors, directory, replaced=replaced, head=head, further=kv_scales
    )
    config["quantization_config"] = quantization_config(schemes, ignore, head, kv_cache)
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
    device: str = "cpu",
) -> nn.Module:
    """A compressed-tensors directory (ours or another tool's) as a runnable causal LM.

    Args:
        directory: holds config.json with ``quantization_config`` and safetensors; a directory
            without ``quantization_config`` is loaded as it is.
        kernel: ``reference`` (dequantized weights, activations rounded as the engine rounds them)
            or ``auto`` (low-bit kernels where this device has them, and linears that read one
            input as one product, dense ones too). The cache of keys and values is held in
            ``dtype``, rounded as a low-bit one.
        dtype: of activations and of everything that is not quantized.
        device: of the model.

    Raises:
        RunError: the directory uses a part of the format that is not read here.
    """
    model = CausalLM.open(directory)
    found = json.loads((directory / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    if found:
        scheme_of = read_schemes(found, directory)
        source = Checkpoint(directory)
        refs = [ref for index in range(len(model.blocks)) for ref in model.linears(index)]
        if (head := model.head()) is not None:
            refs.append(head)
        refs = [ref for ref in refs if source.has(f"{ref.name}.weight_scale")]
        for group in by_input(refs).values() if kernel == "auto" else [[ref] for ref in refs]:
            weights = [_read_linear(source, ref, scheme_of(ref.name), device) for ref in group]
            made = siblings.quantized(weights, kernel=kernel, dtype=dtype)
            model.replace_linears(group, made)
        if found.get("kv_cache_scheme"):
            kv_cache = _read_kv_cache(found["kv_cache_scheme"], directory)
            scales = {n: source.tensor(n) for n in source.names if n.endswith((KEY, VALUE))}
            round_cache(model, scales, kv_cache)
    loaded = model.load_full(dtype, device)
    if kernel == "auto":
        for index in range(len(model.blocks)):  # one by one, so that what was copied is freed
            for group in by_input(model.linears(index)).values():
                model.replace_linears(group, siblings.dense([ref.module for ref in group]))
    return loaded


def _read_linear(
    source: Checkpoint, ref: LinearRef, scheme: Scheme, device: str
) -> tuple[QuantizedTensor, Scheme, torch.Tensor | None]:
    """Weight, scheme and bias of a linear."""
    bias = None if ref.module.bias is None else source.tensor(f"{ref.name}.bias").to(device)
    return read_tensor(source, ref.name, scheme).to(device), scheme, bias


def read_tensor(source: Checkpoint, name: str, scheme: Scheme) -> QuantizedTensor:
    """One linear of a compressed-tensors checkpoint."""
    scale = source.tensor(f"{name}.weight_scale").float()
    bits = scheme.weights.num_bits
    if source.has(f"{name}.weight_packed"):
        shape = torch.Size(source.tensor(f"{name}.weight_shape").tolist())
        codes = unpack_int32(source.tensor(f"{name}.weight_packed"), bits, shape)
    else:
        codes = source.tensor(f"{name}.weight")
    if scheme.weights.strategy == "tensor":
        scale = scale.view(1, 1).expand(codes.shape[0], 1).contiguous()
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
    if scheme.weights.type == "float":
        return "float-quantized"
    return "int-quantized" if scheme.input_activations is not None else "pack-quantized"


def _tensors(
    _: str, tensor: QuantizedTensor, scheme: Scheme, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The format's tensors of one linear. Scales of packed weights are stored in the model's own
    dtype, which engines load them into; the grid was rounded to it before codes were chosen."""
    if _format(scheme) != "pack-quantized":
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


def read_schemes(config: Mapping[str, Any], directory: Path) -> Callable[[str], Scheme]:
    """What the scheme of a linear is, by its name."""
    where = str(directory / "config.json")
    groups = list(config.get("config_groups", {}).values())
    if config.get("quant_method") != NAME or not groups:
        raise RunError(
            "only compressed-tensors checkpoints with config groups are read",
            where=where,
            fix="export the model as compressed-tensors",
        )
    read = [(group["targets"], _read_scheme(group, where)) for group in groups]

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


def _read_kv_cache(config: dict[str, Any], directory: Path) -> ActivationScheme:
    keys = ("num_bits", "symmetric", "strategy", "dynamic", "type")
    scheme = ActivationScheme(**{key: config[key] for key in keys if key in config})
    if scheme not in KV_CACHE.values():
        raise RunError(
            f"the key-value cache is quantized in a form that is not read: {scheme}",
            where=str(directory / "config.json"),
            fix="export it with 8 bits, symmetric, and one static scale per tensor",
        )
    return scheme


def _read_scheme(group: dict[str, Any], where: str) -> Scheme:
    weights, activations = group["weights"], group.get("input_activations")
    bits, kind = weights["num_bits"], weights.get("type", "int")
    if (kind == "float" and bits != 8) or weights["strategy"] not in ("tensor", "channel", "group"):
        raise RunError(
            f"weights of {bits} bits, type {kind}, with a scale per {weights['strategy']} are not "
            "read",
            where=where,
            fix="export the model with integers, or float8_e4m3fn per channel",
        )
    name = f"W{bits}A{activations['num_bits'] if activations else 16}"
    return Scheme(
        name="FP8" if kind == "float" and activations else name,
        weights=WeightScheme(
            num_bits=bits,
            symmetric=weights["symmetric"],
            strategy=weights["strategy"],
            group_size=weights.get("group_size"),
            type=kind,
        ),
        input_activations=ActivationScheme(
            num_bits=activations["num_bits"],
            symmetric=activations["symmetric"],
            strategy=activations["strategy"],
            dynamic=activations["dynamic"],
            type=activations.get("type", "int"),
        )
        if activations
        else None,
    )
