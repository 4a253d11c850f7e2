"""What a user is told before any work: whether memory holds it, and whether engines will run what
comes out of it as fast as its few bits promise."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor import support
from compressor.errors import RecipeError, RunError
from compressor.models.shapes import LinearShape, fused_experts, linear_shapes
from compressor.numerics.memory import free_bytes
from compressor.numerics.scheme import Scheme
from compressor.quantize import registry
from compressor.support import Support, Target

if TYPE_CHECKING:
    from compressor.plan import Plan, Stage
    from compressor.recipe import Recipe, Variant

# Where there is no GPU here: those that most artifacts are served on (A100, H100).
_COMMON_GPUS = (80, 90)


@dataclass(frozen=True)
class Finding:
    """What one engine will do with one variant's layers of one scheme.

    Attributes:
        chosen: it is the engine that the recipe measures with.
        here: the target is this machine.
    """

    variant: str
    scheme: str
    target: Target
    support: Support
    chosen: bool
    here: bool

    @property
    def sentence(self) -> str:
        """In words, for a warning."""
        s = self.support
        what = {
            "native": f"runs by {s.kernel}",
            "dequantized": f"runs by {s.kernel}, no faster than in full precision",
            "fails": "will not load",
        }[s.level]
        return f"{self.variant} ({self.scheme}): {self.target}: {what}{self.reason}"

    @property
    def reason(self) -> str:
        """Why, and of which layer, after a colon; empty where there is nothing to say."""
        if not self.support.reason:
            return ""
        layer = f" ({self.support.layer})" if self.support.layer else ""
        return f": {self.support.reason}{layer}"

    def to_dict(self) -> dict[str, Any]:
        own = {k: getattr(self, k) for k in ("variant", "scheme", "chosen", "here")}
        return own | {"target": str(self.target)} | asdict(self.support)


@dataclass(frozen=True)
class Preflight:
    """Everything that is known before the work begins.

    Attributes:
        findings: engines against variants.
        notes: what quantization itself will not be able to do, in sentences.
        stages: that are still to be done.
        free_bytes: memory that is free now.
        measured: engine that will be measured, and the program that the recipe names for it;
            None where nothing is left to measure.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]
    free_bytes: int
    measured: tuple[str, str | None] | None = None

    @property
    def warnings(self) -> list[str]:
        """What is wrong with what was asked for, on this machine and on the chosen engine."""
        found = [
            f.sentence
            for f in self.findings
            if f.support.level != "native"
            and (f.chosen or (f.here and f.target.engine != "transformers"))
        ]
        stage = max(self.stages, key=lambda s: s.estimate.memory_bytes, default=None)
        if stage is not None and stage.estimate.memory_bytes > self.free_bytes:
            found.append(
                f"{stage.name} may need {stage.estimate.memory_bytes / 1e9:.1f} GB of memory, "
                f"{self.free_bytes / 1e9:.1f} GB are free"
            )
        return [*self.notes, *found]

    def check(self) -> None:
        """Raise when the run cannot succeed.

        Raises:
            RunError: the least that a stage needs is more than the free memory, or the engine that
                the recipe measures with is not installed.
            RecipeError: that engine cannot load a variant, or is not where the recipe says.
        """
        stage = max(self.stages, key=lambda s: s.estimate.least_memory, default=None)
        if stage is not None and stage.estimate.least_memory > self.free_bytes:
            raise RunError(
                f"{stage.name} needs about {stage.estimate.least_memory / 1e9:.1f} GB of memory, "
                f"{self.free_bytes / 1e9:.1f} GB are free",
                where="memory",
                fix="end other programs, take fewer calibration samples or evaluation tokens, or "
                "use a machine with more; --force runs it all the same",
            )
        for finding in self.findings:
            if finding.chosen and finding.support.level == "fails":
                raise RecipeError(
                    f"{finding.target} cannot load it{finding.reason}",
                    where=f"variants.{finding.variant}",
                    fix="choose another scheme or group_size, or another measure.engine",
                )
        if self.measured is not None:
            _find_engine(*self.measured)


def preflight(plan: Plan, targets: Sequence[Target] | None = None) -> Preflight:
    """Check a plan against this machine.

    Args:
        plan: as `make_plan` made it.
        targets: served engines' devices to look at, this machine's first of each engine; when not
            given, that of the engines that take what the recipe exports and, where there is no
            GPU, common ones.
    """
    recipe, names = plan.recipe, {stage.variant for stage in plan.stages}
    served = list(targets if targets is not None else _targets(recipe))
    measured = recipe.measure.engine if recipe.measure is not None else None
    findings, notes = [], []
    fused = fused_experts(plan.facts.tensors)
    if fused:
        shapes_of = dict(plan.facts.tensors)
        size = sum(math.prod(shapes_of[name]) for name in fused)
        notes.append(
            f"{len(fused)} tensors hold all experts of a layer in one "
            f"({size / max(plan.facts.parameters, 1):.0%} of the parameters), such as {fused[0]}: "
            "they cannot be taken apart yet and stay in full precision"
        )
    for name, variant in recipe.variants.items():
        if name not in names:
            continue
        own = own_target((variant.serve and variant.serve.dtype) or _dtype(recipe))
        nearest = {own.engine: own} | {t.engine: t for t in reversed(served)}
        shapes = linear_shapes(_kept(plan.facts.tensors, variant.ignore))
        for scheme, g_idx in _schemes(variant):
            if refusal := _indivisible(scheme, shapes):
                notes.append(f"{name} ({scheme.name}): {refusal}: the quantizer will refuse it")
                continue
            for target in (own, *served):
                here = target == nearest[target.engine]
                findings.append(
                    Finding(
                        variant=name,
                        scheme=_described(scheme),
                        target=target,
                        support=support.check(target, scheme, shapes, g_idx=g_idx),
                        chosen=here and target.engine == measured,
                        here=here,
                    )
                )
    remaining = tuple(plan.remaining)
    engine = None
    if recipe.measure is not None and any(stage.kind == "measure" for stage in remaining):
        engine = (recipe.measure.engine, recipe.measure.program)
    return Preflight(tuple(findings), tuple(notes), remaining, free_bytes(), engine)


def _find_engine(engine: str, program: str | None) -> None:
    """Raise where an engine that is not part of this package is not on this machine."""
    if engine == "vllm":
        from compressor.measure.fleet import vllm_interpreter

        vllm_interpreter(program)
    elif engine == "llama.cpp":
        from compressor.measure.engines.llama_cpp import llama_server

        llama_server(program)


def _targets(recipe: Recipe) -> list[Target]:
    """Of the servers that take what the recipe exports."""
    targets = vllm_targets() if "compressed-tensors" in recipe.export else []
    return [*targets, *(llama_cpp_targets() if "gguf" in recipe.export else [])]


def own_target(dtype: str) -> Target:
    """This package's own engine on this machine, where the recipe's dtype of activations may be
    ``auto``."""
    capability = _gpu_capability()
    return Target(
        "transformers",
        "cuda" if capability else "cpu",
        capability,
        bfloat16=dtype in ("auto", "bfloat16"),
    )


def _gpu_capability() -> int:
    """Compute capability of this machine's GPU, 90 for 9.0; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def llama_cpp_targets() -> list[Target]:
    """llama.cpp on this machine's processor, for which ``scripts/setup_llama_cpp.sh`` builds it,
    and on its GPU, or without one on a common one."""
    cpu = replace(this_cpu(), engine="llama.cpp")
    return [cpu, Target("llama.cpp", "cuda", _gpu_capability() or _COMMON_GPUS[0])]


def vllm_targets() -> list[Target]:
    """vLLM on this machine; without a GPU here, also on common ones."""
    if capability := _gpu_capability():
        return [Target("vllm", "cuda", capability)]
    return [this_cpu(), *(Target("vllm", "cuda", capability) for capability in _COMMON_GPUS)]


def this_cpu() -> Target:
    """vLLM on this machine's processor."""
    import torch

    arm = platform.machine().lower() in ("aarch64", "arm64")
    return Target("vllm", "cpu", amx=torch.cpu._is_amx_tile_supported(), arm=arm)


def _dtype(recipe: Recipe) -> str:
    return recipe.measure.dtype if recipe.measure is not None else "auto"


def _schemes(variant: Variant) -> list[tuple[Scheme, bool]]:
    """Every scheme that layers of the variant may get, and whether columns get a group index."""
    options: Any = variant.quantizer.options if variant.quantize and not variant.library else None
    if not isinstance(options, registry.SchemeOptions):
        return []  # a library's or a third party's, whose grid is not known
    g_idx = getattr(options, "desc_act", False) and not getattr(options, "static_groups", True)
    if variant.precision is None:
        return [(options.parsed(), g_idx)]
    return [
        (options.model_copy(update={"scheme": name}).parsed(), g_idx)
        for name in variant.precision.schemes
    ]


def _indivisible(scheme: Scheme, shapes: Sequence[LinearShape]) -> str:
    for shape in shapes:
        try:
            scheme.weights.groups(shape.in_features)
        except ValueError as error:
            return f"{error} of {shape.name}"
    return ""


def _described(scheme: Scheme) -> str:
    """``W4A16, groups of 64, asymmetric``."""
    parts = [scheme.name]
    if scheme.weights.strategy == "group":
        parts.append(f"groups of {scheme.weights.group_size}")
    if not scheme.weights.symmetric:
        parts.append("asymmetric")
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        parts.append("static")
    if scheme.input_activations is not None and not scheme.input_activations.symmetric:
        parts.append("activations with zero points")
    return ", ".join(parts)


def _kept(
    tensors: Sequence[tuple[str, tuple[int, ...]]], ignore: Sequence[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Without those whose linear the recipe leaves out (as the driver reads `ignore`)."""

    def ignored(name: str) -> bool:
        linear = name.removesuffix(".weight")
        return any(linear == entry or re.fullmatch(entry, linear) for entry in ignore)

    return [(name, shape) for name, shape in tensors if not ignored(name)]
