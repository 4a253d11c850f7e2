"""What each kind of stage does: a function of its settings and inputs that fills a directory.

Heavy modules are imported inside the functions, so that a run whose stages are all in the store
never loads torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import speculate_stages, task_stages
from compressor.errors import RecipeError, RunError
from compressor.plan import Stage
from compressor.progress import Progress, counting, telling_lowered
from compressor.store import StoredStage, write_atomic

if TYPE_CHECKING:
    from torch import nn

    from compressor.models.source import ResolvedSource

_PROOF_TOKENS = 64  # of each prompt that an artifact is tried on


@dataclass(frozen=True)
class Context:
    """What a stage function gets.

    Attributes:
        stage: its place in the plan, with settings (``config``) and machine-local values.
        inputs: finished stages by name.
        directory: to be filled; may hold what a killed attempt left.
        progress: where to report.
    """

    stage: Stage
    inputs: dict[str, StoredStage]
    directory: Path
    progress: Progress

    @property
    def config(self) -> dict[str, Any]:
        return self.stage.config

    def find(self, kind: str, variant: str | None = None) -> StoredStage | None:
        """The input stage of that kind (and variant), if there is one."""
        for stored in self.inputs.values():
            manifest = stored.manifest
            if manifest["kind"] == kind and (variant is None or manifest["variant"] == variant):
                return stored
        return None

    def need(self, kind: str, variant: str | None = None) -> StoredStage:
        found = self.find(kind, variant)
        assert found is not None, f"{self.stage.name} was planned without a {kind} stage"
        return found

    @property
    def quantized(self) -> StoredStage | None:
        """What the variant has become of the model: codes, its own or another tool's, imported; or
        (``dense``) a checkpoint, of what was imported or of a target trained with its heads."""
        return self.find("quantize") or self.find("import") or self.find("joint")

    @property
    def baseline_dir(self) -> Path:
        """Checkpoint of the model that all is compared with."""
        return model_dir(self.need("load"))

    @property
    def model_dir(self) -> Path:
        """Checkpoint that the stage works on: the rotated one where the variant is rotated, by us
        or by who made what was imported."""
        rotated, imported = self.find("rotate"), self.find("import")
        if imported is not None and imported.result.get("checkpoint"):
            rotated = imported
        return rotated.path / "checkpoint" if rotated else self.baseline_dir

    def tokenizer(self) -> Any:
        """That of the checkpoint that the stage works on."""
        from compressor.models.tokenizer import load_tokenizer

        return load_tokenizer(self.model_dir)


def model_dir(load: StoredStage) -> Path:
    """Checkpoint directory that a load stage made, or the untouched one it refers to."""
    referred = load.result["path"]
    path = Path(referred) if referred else load.path / "checkpoint"
    if not (path / "config.json").is_file():
        raise RunError("the model's directory is gone", where=str(path), fix="put it back")
    return path


def load(context: Context) -> dict[str, Any]:
    """Materialise the model as safetensors where it is in another form."""
    from compressor.models.architecture import CausalLM
    from compressor.models.source import materialise
    from compressor.models.tokenizer import check_fits, load_tokenizer

    resolved = context.stage.local["resolved"]
    dtype = context.config["dtype"]
    with context.progress.task("load model", None):
        path = materialise(resolved, context.directory / "checkpoint", dtype=dtype)
        model = CausalLM.open(path, trust_remote_code=resolved.trust_remote_code)
        problems = model.check_weights()
        rows = model.model.get_input_embeddings().weight.shape[0]
        check_fits(load_tokenizer(path), rows, path)
        lost = _lost(resolved, path)
    size = sum(p.stat().st_size for p in path.glob("*.safetensors"))
    return {
        "path": None if path.is_relative_to(context.directory) else str(path),
        "source": resolved.source,
        "revision": resolved.revision,
        "architecture": type(model.model).__name__,
        "parameters": model.num_parameters,
        "size_bytes": size,
        "dtype": str(model.config.dtype).removeprefix("torch."),
        "notes": problems,
        "lost": lost,
        "unread": model.unread(),
    }


def _lost(resolved: ResolvedSource, path: Path) -> list[str]:
    """Tensors of a source in safetensors that transformers dropped in writing it anew."""
    from compressor.models.checkpoint import Checkpoint

    if resolved.kind == "gguf" or path == resolved.path:
        return []
    if not list(resolved.path.glob("*.safetensors")):
        return []  # pickles: what they held is not known without running them
    return sorted(set(Checkpoint(resolved.path).names) - set(Checkpoint(path).names))


def origin(context: Context) -> dict[str, Any]:
    """Keep the source's licence files, and what it says of its name and licence."""
    from compressor.models.origin import licence_files, read_origin

    resolved = context.stage.local["resolved"]
    for path in licence_files(resolved):
        shutil.copyfile(path, context.directory / path.name)
    return read_origin(resolved).to_dict()


def calibrate(context: Context) -> dict[str, Any]:
    """Tokenise and pack the calibration text."""
    import numpy as np

    from compressor.data.sources import load_texts
    from compressor.data.tokens import pack_tokens, tokens_sha256

    c = context.config
    tokenizer = context.tokenizer()
    texts = load_texts(
        c["source"],
        split=c["split"],
        field=c["field"],
        base_dir=context.stage.local["base_dir"],
        tokenizer=tokenizer,
    )
    tokens = pack_tokens(texts, tokenizer, c["samples"], c["length"], c["seed"])
    np.save(context.directory / "tokens.npy", tokens)
    facts = {key: c[key] for key in ("source", "samples", "length", "seed")}
    return {**facts, "tokens": int(tokens.size), "sha256": tokens_sha256(tokens)}


def texts(context: Context) -> dict[str, Any]:
    """Tokenise the held-out texts into windows."""
    import numpy as np

    from compressor.data.sources import load_texts
    from compressor.data.tokens import evaluation_windows, tokens_sha256

    tokenizer = context.tokenizer()
    longer = context.config.get("positions")
    found, long = [], []
    for text in context.config["texts"]:
        loaded = load_texts(
            text["source"],
            split=text["split"],
            field=text["field"],
            base_dir=context.stage.local["base_dir"],
            tokenizer=tokenizer,
        )
        windows, n_bytes = evaluation_windows(
            loaded, tokenizer, context.config["length"], text["skip"] + text["max_tokens"]
        )
        if skipped := text["skip"] // context.config["length"]:
            windows, n_bytes = _behind(windows, skipped, tokenizer, text)
        np.save(context.directory / f"{text['name']}.npy", windows)
        found.append(
            {
                "name": text["name"],
                "source": text["source"],
                "windows": len(windows),
                "bytes": n_bytes,
                "sha256": tokens_sha256(windows),
            }
        )
        if longer is not None and (entry := _long_windows(context, text["name"], loaded)):
            long.append(entry)
    if longer is not None and not long:
        raise RecipeError(
            f"no text has {longer['length']} tokens, one window of evaluate.positions",
            where="evaluate.positions",
            fix="give a longer text, or a smaller length",
        )
    prompts = _drift_prompts(context, tokenizer) if context.config.get("drift") else None
    return {
        "texts": found,
        "length": context.config["length"],
        "long": long,
        "prompts": prompts,
    }


def _behind(windows: Any, skipped: int, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, int]:
    """The windows after the first ones, and the bytes that they predict."""
    kept = windows[skipped:]
    if not len(kept):
        raise RecipeError(
            f"the text {text['name']} has no window of tokens after the first {text['skip']}",
            where=text["source"],
            fix="leave out fewer, or give a longer text",
        )
    predicted = tokenizer.batch_decode(kept[:, 1:].tolist(), clean_up_tokenization_spaces=False)
    return kept, sum(len(part.encode("utf-8", "replace")) for part in predicted)


def _context_length(directory: Path) -> int | None:
    """Positions of a checkpoint's model; None where its config names none."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config).get("max_position_embeddings")


def _long_windows(context: Context, name: str, texts: list[str]) -> dict[str, Any] | None:
    """Windows for perplexity by position; None where the text is too short for one."""
    import numpy as np

    from compressor.data.tokens import evaluation_windows, tokenise, tokens_sha256

    wanted, tokenizer = context.config["positions"], context.tokenizer()
    limit = _context_length(context.model_dir)
    if limit is not None and wanted["length"] > limit:
        raise RecipeError(
            f"the model has {limit} positions, evaluate.positions asks for {wanted['length']}",
            where="evaluate.positions",
            fix=f"set its length to {limit} or less",
        )
    most = max(wanted["max_tokens"], wanted["length"])
    if len(tokenise(texts, tokenizer, most)) < wanted["length"]:
        return None
    windows, n_bytes = evaluation_windows(texts, tokenizer, wanted["length"], most)
    (context.directory / "long").mkdir(exist_ok=True)
    np.save(context.directory / "long" / f"{name}.npy", windows)
    return {
        "name": name,
        "windows": len(windows),
        "bytes": n_bytes,
        "sha256": tokens_sha256(windows),
    }


def _drift_prompts(context: Context, tokenizer: Any) -> dict[str, Any] | None:
    """The prompts that are continued, as they are served; None where none is short enough."""
    import numpy as np

    from compressor.data.sources import load_texts
    from compressor.data.tokens import prompt_tokens
    from compressor.store import file_sha256

    c = context.config["drift"]
    texts = load_texts(
        c["prompts"],
        field="prompt",
        base_dir=context.stage.local["base_dir"],
        tokenizer=tokenizer,
    )
    limit = _context_length(context.model_dir)
    room = c["input_length"]
    if limit is not None:
        room = min(room, limit - c["output_length"])
    rows = []
    for index in np.random.default_rng(c["seed"]).permutation(len(texts)).tolist():
        ids = list(prompt_tokens(texts[index], tokenizer))
        if 0 < len(ids) <= room:
            rows.append({"prompt": texts[index], "tokens": ids})
        if len(rows) == c["samples"]:
            break
    if not rows:
        return None
    path = context.directory / "prompts.json"
    write_atomic(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    return {"source": c["prompts"], "prompts": len(rows), "sha256": file_sha256(path)}


def rotate(context: Context) -> dict[str, Any]:
    """Write the model with rotations folded into its weights."""
    from compressor.models.architecture import CausalLM
    from compressor.quantize.rotation import RotationOptions, rotate_checkpoint

    target = context.directory / "checkpoint"
    shutil.rmtree(target, ignore_errors=True)  # what a killed attempt left
    model = CausalLM.open(context.model_dir)
    with context.progress.task("rotate", len(model.blocks)) as task:
        return rotate_checkpoint(model, RotationOptions(**context.config), target, task.advance)


def sensitivity(context: Context) -> dict[str, Any]:
    """Predict what every scheme costs every linear."""
    from dataclasses import asdict

    import numpy as np
    import torch

    from compressor.models.architecture import CausalLM
    from compressor.numerics.scheme import Scheme
    from compressor.quantize.sensitivity import measure_sensitivity

    c = context.config
    grid = {key: value for key, value in c["grid"].items() if value is not None}
    tokens = np.load(context.need("calibrate").path / "tokens.npy")[: c["samples"]]
    model = CausalLM.open(context.model_dir)
    with context.progress.task("sensitivity", 2 * len(model.blocks)) as task:
        found = measure_sensitivity(
            model,
            [Scheme.parse(name, **grid) for name in c["schemes"]],
            tokens,
            context.directory,
            batch_size=c["batch_size"],
            device="cuda" if torch.cuda.is_available() else "cpu",
            advance=task.advance,
        )
    return {"tokens": int(tokens.size), "linears": [asdict(one) for one in found]}


def quantize(context: Context) -> dict[str, Any]:
    """Quantize every block's linears by the variant's algorithm."""
    import numpy as np
    import torch

    from compressor.export import compressed_tensors as formats
    from compressor.models.architecture import CausalLM
    from compressor.numerics.scheme import KV_CACHE
    from compressor.quantize import registry
    from compressor.quantize.driver import quantize_model
    from compressor.quantize.stream import calibration_dtype

    ((name, options),) = context.config["steps"][-1].items()
    if getattr(registry.get(name), "format", "") == "gguf":
        return _quantize_by_llama_cpp(context, registry.get(name), options)
    if registry.get(name).kind == "library":
        return _quantize_by_library(context, registry.get(name), options)
    scale_dtype = _scale_dtype(context.need("load"))
    transforms, algorithm, refinements = algorithms(context.config["steps"], scale_dtype)
    calibration = context.find("calibrate")
    tokens = np.load(calibration.path / "tokens.npy") if calibration else None
    model = CausalLM.open(context.model_dir)
    head = None
    if "lm_head" in context.config:
        formats.check_head(model)
        head = algorithms([context.config["lm_head"]], scale_dtype)[1]
    exceptions, allocation = _allocation(context)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = context.config.get("dtype", "auto")
    dtype = getattr(torch, wanted, None) or calibration_dtype(model.config.dtype, device)
    kv_cache = context.config.get("kv_cache")
    title = f"quantize {context.stage.variant}"
    total = len(model.blocks) + (head is not None)
    total += sum(r.options.steps for r in refinements if r.level == "model")
    with context.progress.task(title, total) as task:
        facts = quantize_model(
            model,
            algorithm,
            context.directory,
            transforms=transforms,
            refinements=refinements,
            exceptions=exceptions,
            head=head,
            tokens=tokens,
            ignore=context.config["ignore"],
            kv_cache=KV_CACHE[kv_cache] if kv_cache else None,
            batch_size=context.config.get("batch_size", 1),
            all_experts=context.config.get("all_experts", False),
            dtype=dtype,
            device=device,
            advance=counting(task),
            lowered=telling_lowered(context.progress, title),
        )
    facts["kv_cache"] = kv_cache
    return facts | ({"allocation": allocation} if allocation else {})


def _quantize_by_library(context: Context, cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    from compressor.models.architecture import CausalLM

    model = CausalLM.open(context.model_dir)
    title = f"quantize {context.stage.variant}"
    with context.progress.task(title, len(model.blocks)) as task:
        return cls(cls.Options(**options)).quantize_checkpoint(
            model, context.directory, ignore=context.config["ignore"], advance=counting(task)
        )


def _quantize_by_llama_cpp(context: Context, cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Convert, take the importance matrix, run llama-quantize, and read back what it made."""
    import time

    import numpy as np
    import torch

    from compressor.export import gguf, llama_quantize
    from compressor.export.gguf_model import Layout
    from compressor.imports.codes import import_gguf
    from compressor.models.architecture import CausalLM
    from compressor.quantize.coverage import is_ignored
    from compressor.quantize.imatrix import squared_inputs
    from compressor.quantize.llama_cpp import llama_quantize as program

    started, directory = time.perf_counter(), context.directory
    scratch = directory / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    model = CausalLM.open(context.model_dir)
    layout = Layout(model.config)
    imatrix, tokens = None, 0
    title = f"quantize {context.stage.variant}"
    with context.progress.task(title, len(model.blocks)) as task:
        if options["imatrix"]:
            calibration = context.need("calibrate")
            ids = np.load(calibration.path / "tokens.npy")
            statistics = squared_inputs(
                model,
                ids,
                scratch,
                batch_size=context.config["batch_size"],
                device="cuda" if torch.cuda.is_available() else "cpu",
                advance=counting(task),
            )
            imatrix, tokens = scratch / "imatrix.gguf", int(ids.size)
            llama_quantize.write_imatrix(
                imatrix,
                layout,
                {name: (one.sums, one.tokens) for name, one in statistics.items()},
                dataset=calibration.result["source"],
                chunks=len(ids),
                chunk_size=ids.shape[1],
            )
        gguf.export(context.model_dir, (), {}, scratch / "plain")
        source = (scratch / "plain" / gguf.FILE).rename(scratch / gguf.FILE)
        model = CausalLM.open(context.model_dir)
        kept = [
            str(layout.name(f"{ref.name}.weight")).removesuffix(".weight")
            for index in range(len(model.blocks))
            for ref in model.linears(index)
            if is_ignored(ref.name, context.config["ignore"])
        ]
        llama_quantize.quantize_file(
            program(),
            source,
            directory / gguf.FILE,
            options["type"],
            imatrix=imatrix,
            kept=kept,
            threads=torch.get_num_threads(),
        )
    shutil.rmtree(scratch)
    facts = import_gguf(model, directory)
    facts["scheme"] = cls(cls.Options(**options)).scheme
    return {"seconds": time.perf_counter() - started, "tokens": tokens, **facts}


def import_model(context: Context) -> dict[str, Any]:
    """Read what another tool made of the model."""
    from compressor.imports.codes import import_model as read
    from compressor.models.architecture import CausalLM

    model = CausalLM.open(context.baseline_dir)
    title = f"import {context.stage.variant}"
    with context.progress.task(title, len(model.blocks)) as task:
        return read(model, context.stage.local["resolved"], context.directory, counting(task))


def export(context: Context) -> dict[str, Any]:
    """Write one variant in one format, with the hash of every file."""
    load, quantized = context.need("load"), context.quantized
    # Keys of the inputs identify every setting that made this artifact; times stay out of it.
    provenance = {
        "tool": "compressor",
        "variant": context.config["variant"],
        "format": context.config["format"],
        "source": load.result["source"],
        "revision": load.result["revision"],
        "stages": {
            "rotate" if stored.manifest["kind"] == "rotate" else name: stored.key
            for name, stored in context.inputs.items()
        },
    }
    target = context.directory / "artifact"
    if "method" in context.config:
        with context.progress.task(f"export {context.config['method']}", None):
            speculate_stages.export(context, provenance, target)
        size = sum(p.stat().st_size for p in target.iterdir())
        return {"format": context.config["format"], "size_bytes": size, "tensors": None}
    with context.progress.task(f"export {context.stage.variant}", None):
        notes = _write_artifact(context, quantized, provenance, target)
    size = sum(p.stat().st_size for p in target.iterdir())
    tensors = _tensor_ledger(context, target)
    result = {"format": context.config["format"], "size_bytes": size, "tensors": tensors}
    return result | ({"notes": notes} if notes else {})


def _write_artifact(
    context: Context, quantized: StoredStage | None, provenance: dict[str, Any], target: Path
) -> list[str]:
    """Write the weights in their format; returns what is not carried over."""
    from compressor.export import awq, bitsandbytes, dense, gguf, gptq
    from compressor.export import compressed_tensors as formats
    from compressor.numerics.scheme import KV_CACHE
    from compressor.quantize.bitsandbytes import iterate_tensors
    from compressor.quantize.codes import iterate_quantized, kv_scales, replaced_tensors

    source, fmt, result = context.model_dir, context.config["format"], {}
    if quantized is not None:
        result = quantized.result
        if fmt == gguf.NAME and (quantized.path / gguf.FILE).is_file():
            gguf.copy(source, quantized.path / gguf.FILE, provenance, target)
            return []
        if result.get("dense"):  # no codes of ours
            source, quantized = quantized.path / "checkpoint", None
    if fmt == bitsandbytes.NAME and quantized is not None:
        tensors = iterate_tensors(quantized.path)
        bitsandbytes.export(source, tensors, result["settings"], provenance, target)
        return []
    codes = iterate_quantized(quantized.path) if quantized else iter(())
    changed: dict[str, Any] = {
        "replaced": replaced_tensors(quantized.path) if quantized else None,
    }
    ignore = [entry["name"] for entry in result["coverage"]["skipped"]] if quantized else []
    if quantized is not None and fmt != awq.NAME:
        changed["head"] = result.get("head")
    if fmt == gguf.NAME:
        found = gguf.export(
            source,
            codes,
            provenance,
            target,
            title=f"{Path(provenance['source']).stem} {context.config['variant']}",
            embeddings=context.config.get("embeddings", gguf.STORED),
            **changed,
        )
        return found.notes
    if quantized is None:
        formats.export_dense(source, provenance, target)
        return []
    if fmt == dense.NAME:
        options = context.config.get("options", {})
        return dense.export(source, codes, provenance, target, **changed, **options)
    if fmt == gptq.NAME:
        gptq.export(
            source, codes, ignore, provenance, target, **changed, **context.config["options"]
        )
    elif fmt == awq.NAME:
        awq.export(source, codes, ignore, provenance, target, **changed)
    else:
        kv_cache = result.get("kv_cache")
        formats.export(
            source,
            codes,
            ignore,
            provenance,
            target,
            kv_cache=KV_CACHE[kv_cache] if kv_cache else None,
            kv_scales=kv_scales(quantized.path),
            **changed,
        )
    return []


def _tensor_ledger(context: Context, artifact: Path) -> dict[str, Any]:
    """The artifact's tensors against the source's, also where a rotated checkpoint lies between."""
    from dataclasses import asdict

    from compressor.export import gguf
    from compressor.export.ledger import compare_tensors
    from compressor.models.checkpoint import Checkpoint
    from compressor.quantize.codes import read_layers

    load, quantized = context.need("load"), context.quantized
    layers = read_layers(quantized.path) if quantized else []
    schemes = {layer["name"]: layer["scheme"]["name"] for layer in layers if "scheme" in layer}
    unread, lost = load.result["unread"], load.result["lost"]
    if context.config["format"] == gguf.NAME:
        return asdict(
            gguf.compare_tensors(context.baseline_dir, artifact, schemes, unread=unread, lost=lost)
        )
    ledger = compare_tensors(
        Checkpoint(context.baseline_dir),
        Checkpoint(artifact),
        schemes,
        unread=unread,
        lost=lost,
    )
    return asdict(ledger)


def verify(context: Context) -> dict[str, Any]:
    """Load an artifact in what will load it, and compare it with the model as it was evaluated.

    Raises:
        RunError: it does not load, or something else is computed from it.
    """
    from compressor.data.sources import load_texts
    from compressor.data.tokens import prompt_tokens
    from compressor.export import verify as proof

    exported, quantized = context.need("export"), context.quantized
    fmt, directory = exported.result["format"], exported.path / "artifact"
    consumers, missing = context.config["consumers"], context.config["missing"]
    if not consumers:
        return proof.Verification("", None, False, None, None, None, missing).to_dict()
    tokenizer = context.tokenizer()
    texts = load_texts("builtin:prompts", field="prompt", base_dir=Path())
    prompts = [
        prompt_tokens(text, tokenizer)[:_PROOF_TOKENS]
        for text in texts[: context.config["prompts"]]
    ]
    with context.progress.task(f"verify {context.stage.variant}, {fmt}", None):
        model = quantized_model(context.model_dir, quantized, "cpu")
        reference = proof.make_reference(model, prompts, context.config["tokens"])
        del model
        found = proof.verify_artifact(
            directory, fmt, reference, consumers, missing, rounded=context.config["rounded"]
        )
    if found.verified is False:
        raise RunError(
            f"the {fmt} artifact is not what was evaluated: {found.consumer} "
            + (f"finds that {found.why}" if found.loads else f"does not load it ({found.why})"),
            where=str(context.stage.name),
            fix="another format or scheme may load; --no-verify keeps the artifact, unverified",
        )
    return found.to_dict()


def evaluate(context: Context) -> dict[str, Any]:
    """Score the baseline, or a variant against the baseline's stored scores."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from compressor.evaluate.divergence import (
        Scores,
        by_position,
        score_baseline,
        score_variant,
        summarise,
    )
    from compressor.models.architecture import CausalLM
    from compressor.models.checkpoint import save_whole
    from compressor.models.head import split

    texts, baseline = context.need("texts"), context.find("evaluate")
    quantized = context.quantized
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = CausalLM.open(context.baseline_dir).load_full(torch.float32, device)
    model = quantized_model(context.model_dir, quantized, device) if quantized else plain
    head = split(plain)
    listed, long = texts.result["texts"], texts.result["long"]
    total = sum(text["windows"] for text in [*listed, *long])
    batch, length, bins = (context.config[key] for key in ("batch_size", "length", "bins"))

    title = f"evaluate {context.stage.variant}"
    lowered = telling_lowered(context.progress, title)

    def score(name: str, batch: int, advance: Callable[[int], None]) -> tuple[Scores, Scores]:
        """(scores, the baseline's) of the windows in a file."""
        windows = np.load(texts.path / f"{name}.npy")
        (context.directory / name).parent.mkdir(exist_ok=True)
        if baseline is None:
            scores, hidden = score_baseline(model, windows, batch, advance, lowered)
            save_whole({"hidden": hidden}, context.directory / f"{name}.hidden.safetensors")
            reference = scores
        else:
            hidden = load_file(baseline.path / f"{name}.hidden.safetensors")["hidden"]
            reference = Scores.load(baseline.path / f"{name}.safetensors")
            scores = score_variant(model, windows, batch, hidden, head, advance, lowered)
        scores.save(context.directory / f"{name}.safetensors")
        return scores, reference

    results, positions = [], []
    with context.progress.task(title, total) as task:
        for text in listed:
            name = text["name"]
            scores, reference = score(name, batch, task.advance)
            results.append({"text": name, **summarise(scores, reference, text["bytes"])})
            if not long:
                parts = by_position(scores, reference, bins)
                positions.append({"text": name, "length": length, "bins": parts})
        for text in long:
            name, longer = text["name"], context.config["positions"]
            fewer = max(1, batch * length // longer)
            scores, reference = score(f"long/{name}", fewer, task.advance)
            parts = by_position(scores, reference, bins)
            positions.append({"text": name, "length": longer, "bins": parts})
    drift = None
    if texts.result["prompts"]:
        drift = _drift(context, model, texts, baseline, lowered)
    return {"quality": results, "positions": positions, "drift": drift}


def _drift(
    context: Context,
    model: Any,
    texts: StoredStage,
    baseline: StoredStage | None,
    lowered: Callable[[int], None],
) -> dict[str, Any]:
    """Continue the prompts greedily, and say where that leaves the baseline's continuation."""
    import torch

    from compressor.evaluate import drift
    from compressor.measure.engines.transformers import TransformersEngine
    from compressor.models.end_tokens import end_tokens
    from compressor.numerics.memory import in_batches

    c = context.config["drift"]
    rows = json.loads((texts.path / "prompts.json").read_text(encoding="utf-8"))
    tokenizer, ends = context.tokenizer(), end_tokens(model)
    engine = TransformersEngine(lambda dtype: model)
    engine.start()
    made: list[drift.Continuation] = []

    def go_on(part: list[dict[str, Any]]) -> list[list[int]]:
        steps = engine.steps([row["tokens"] for row in part], c["output_length"])
        return torch.cat([step for step, _ in steps], dim=1).tolist()

    with context.progress.task(f"continue {context.stage.variant}", len(rows)) as task:
        for part, tokens in in_batches(rows, c["batch_size"], go_on, lowered):
            for row, new in zip(part, tokens, strict=True):
                kept = drift.until_end(new, ends)
                text = tokenizer.decode(kept, skip_special_tokens=True)
                made.append(drift.Continuation(row["prompt"], kept, text))
            task.advance(len(part))
    drift.write_continuations(made, context.directory / drift.FILE)
    reference = made
    if baseline is not None:
        reference = drift.read_continuations(baseline.path / drift.FILE)
    return drift.summarise_drift(made, reference, c["output_length"])


def measure(context: Context) -> dict[str, Any]:
    """Measure every exported variant, interleaved, on the same prompts."""
    from compressor.data.sources import load_texts
    from compressor.measure import fleet, runner
    from compressor.measure.settings import MeasureSettings, serves
    from compressor.measure.workload import build_workload, tokenizer_encode

    settings = MeasureSettings.from_config(context.config)
    artifacts: dict[str, StoredStage] = {}
    speculators: dict[str, StoredStage] = {}
    for stage, stored in context.inputs.items():
        if stored.manifest["kind"] != "export":
            continue
        if stored.result["tensors"] is None:
            speculators[stage.split(":")[1]] = stored
            continue
        if not serves(settings.engine, stored.result["format"]):
            continue
        # The manifest names the variant that it was made for; others may share it.
        artifacts.setdefault(stage.split(":")[1], stored)
    tokenizer = context.tokenizer()
    prompts = load_texts(
        settings.prompts,
        field="prompt",
        base_dir=context.stage.local["base_dir"],
        tokenizer=tokenizer,
    )
    needed = max(settings.served(point) for point in settings.points)
    workload = build_workload(
        prompts,
        tokenizer_encode(tokenizer, settings.chat_template),
        input_length=settings.input_length,
        count=min(needed, max(len(prompts), *settings.concurrency, 1)),
        seed=settings.seed,
        source=settings.prompts,
        chat_template=settings.chat_template,
    )
    logs = context.directory / runner.LOGS
    if settings.engine in ("vllm", "llama.cpp"):
        logs.mkdir(parents=True, exist_ok=True)
    variants: dict[str, fleet.Candidates] = {}
    if settings.engine == "endpoint":
        for name, one in settings.endpoints.items():
            variants[name] = fleet.endpoint(one, tokenizer)
    for name, stored in artifacts.items():
        directory, log, own = stored.path / "artifact", logs / name, settings.of(name)
        if settings.engine == "transformers":
            loader = _loader(directory, stored.result["format"])
            variants[name] = fleet.in_process(loader, own, workload.longest)
        elif settings.engine == "vllm":
            if name in context.config.get("speculate", {}):
                found = speculators.get(name)
                flags = speculate_stages.serving_flags(
                    context.config["speculate"][name], found.path / "artifact" if found else None
                )
                own = replace(own, flags=(*own.flags, *flags))
            variants[name] = fleet.vllm(directory, log, own)
        elif settings.engine == "llama.cpp":
            (file,) = directory.glob("*.gguf")
            variants[name] = fleet.llama_cpp(file, log, own, workload.longest)
    sizes = {name: stored.result["size_bytes"] for name, stored in artifacts.items()}
    return runner.measure(
        variants,
        workload,
        settings,
        context.directory,
        context.progress,
        artifact_bytes={name: size for name, size in sizes.items() if name in variants},
        basis=_estimates_basis(context) if settings.engine != "endpoint" else None,
    )


def _estimates_basis(context: Context) -> dict[str, Any]:
    """The machine and the model in figures, from which the report estimates what it measured."""
    from compressor.measure.devices import this_device
    from compressor.models.dimensions import read_dimensions

    try:
        found = read_dimensions(str(context.baseline_dir))
    except RunError:  # measured all the same, but without estimates beside it
        return {}
    dims = replace(found, name=context.need("load").result["source"])
    return {"device": this_device().to_dict(), "dimensions": dims.to_dict()}


def _loader(directory: Path, fmt: str) -> Callable[[Any], nn.Module]:
    """Loads an artifact in a dtype of its activations, on the GPU if there is one."""
    import torch

    from compressor.export import bitsandbytes
    from compressor.export import compressed_tensors as formats

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if fmt == bitsandbytes.NAME:
        return lambda dtype: bitsandbytes.load_model(directory, dtype=dtype, device=device)
    return lambda dtype: formats.load_model(directory, kernel="auto", dtype=dtype, device=device)


FUNCTIONS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "load": load,
    "origin": origin,
    "calibrate": calibrate,
    "texts": texts,
    "rotate": rotate,
    "sensitivity": sensitivity,
    "quantize": quantize,
    "import": import_model,
    "corpus": speculate_stages.corpus,
    "features": speculate_stages.features,
    "speculate": speculate_stages.speculate,
    "joint": speculate_stages.joint,
    "draft": speculate_stages.draft,
    "quantize-draft": speculate_stages.quantize_draft,
    "accept": speculate_stages.accept,
    "export": export,
    "verify": verify,
    "evaluate": evaluate,
    "tasks": task_stages.tasks,
    "served": task_stages.served,
    "measure": measure,
}


def algorithms(steps: list[dict[str, Any]], scale_dtype: Any) -> tuple[list[Any], Any, list[Any]]:
    """(transforms, quantizer, refinements) of a variant's steps."""
    from compressor.quantize import registry

    made: dict[str, list[Any]] = {kind: [] for kind in registry.KINDS}
    for step in steps:
        ((name, options),) = step.items()
        cls = registry.get(name)
        settings = cls.Options(**options)
        one = cls(settings) if cls.kind == "transform" else cls(settings, scale_dtype)
        made[cls.kind].append(one)
    return made["transform"], made["weights"][0], made["refinement"]


def _allocation(context: Context) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(algorithm by linear, what to record) of mixed precision; empty without a budget."""
    from dataclasses import asdict

    from compressor.quantize.precision import allocate_precision
    from compressor.quantize.sensitivity import Sensitivity

    budget = context.config.get("precision")
    if not budget:
        return {}, None
    measured = context.need("sensitivity")
    linears = [Sensitivity(**one) for one in measured.result["linears"]]
    allocation = allocate_precision(
        linears,
        mean_bits=budget["mean_bits"],
        most_bytes=budget["size_gb"] and budget["size_gb"] * 1e9,
        most_loss=budget["max_loss"],
        ignore=context.config["ignore"],
    )
    dtype = _scale_dtype(context.need("load"))
    made = {}
    for scheme in budget["schemes"]:
        steps = [
            {name: options | {"scheme": scheme}} if "scheme" in options else {name: options}
            for step in context.config["steps"]
            for name, options in step.items()
        ]
        made[scheme] = algorithms(steps, dtype)[1]
    exceptions = {name: made[scheme] for name, scheme in allocation.schemes.items()}
    return exceptions, asdict(allocation)


def _scale_dtype(load: StoredStage) -> Any:
    import torch

    return getattr(torch, load.result["dtype"])


def quantized_model(
    directory: Path, quantized: StoredStage | None, device: str, dtype: Any = None
) -> Any:
    """The variant as the engine computes it: dequantized weights, activations and cache rounded;
    in float32 if no dtype is given.

    Args:
        directory: checkpoint that the variant was made of.
        quantized: what it has become (`Context.quantized`); None: the checkpoint as it is.
        device: of the model.
        dtype: of what is not quantized, and of activations.
    """
    from functools import partial

    import torch

    from compressor.models.architecture import CausalLM
    from compressor.models.kv_cache import round_cache
    from compressor.numerics import bitsandbytes
    from compressor.numerics.linear import QuantizedLinear
    from compressor.numerics.scheme import KV_CACHE
    from compressor.quantize.bitsandbytes import iterate_tensors
    from compressor.quantize.codes import kv_scales, replace_linears, replaced_tensors

    dtype = dtype or torch.float32
    if quantized is None:
        return CausalLM.open(directory).load_full(dtype, device)
    if quantized.result.get("dense"):
        return CausalLM.open(quantized.path / "checkpoint").load_full(dtype, device)
    model = CausalLM.open(directory)
    if quantized.result.get("format") == "bitsandbytes":
        refs = {ref.name: ref for i in range(len(model.blocks)) for ref in model.linears(i)}
        threshold = quantized.result["settings"].get("llm_int8_threshold", 0.0)
        for name, tensors in iterate_tensors(quantized.path):
            ref = refs[name]
            bias = model.checkpoint.tensor(f"{name}.bias") if ref.module.bias is not None else None
            model.replace_linear(ref, bitsandbytes.linear(tensors, bias, threshold))
        return model.load_full(dtype, device)
    replace_linears(
        model,
        quantized.path,
        partial(QuantizedLinear.from_tensor, dtype=dtype),
        untie_head=quantized.result.get("head") is not None,
    )
    if quantized.result.get("kv_cache"):
        round_cache(model, kv_scales(quantized.path), KV_CACHE[quantized.result["kv_cache"]])
    return model.load_full(dtype, device, replaced_tensors(quantized.path))
