"""What the stages of speculative decoding do; see `stages.py`, which hands them their context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import RecipeError
from compressor.export.options import MEDUSA_TGI
from compressor.progress import counting
from compressor.store import write_atomic

if TYPE_CHECKING:
    from compressor.speculate.medusa import MedusaHeads
    from compressor.speculate.proposer import Proposer
    from compressor.speculate.tree import Tree
    from compressor.stages import Context
    from compressor.store import StoredStage

LICENCES = "licence"  # directory of a given draft's licence files
RAW = "decoded.jsonl"  # what acceptance was counted from
_FEATURE_BATCH = 8  # samples that run together
_SWEEP_LENGTH = 48  # tokens of each answer that is timed, at most


def corpus(context: Context) -> dict[str, Any]:
    """The target's own answers to prompts, or given dialogues, tokenised."""
    from compressor.data.sources import load_messages
    from compressor.models.end_tokens import end_tokens
    from compressor.speculate import corpus as making
    from compressor.speculate.own_prompts import OWN

    c = context.config
    tokenizer = context.tokenizer()
    if c["answers"] == "given":
        conversations = load_messages(
            c["prompts"],
            split=c["split"],
            field=c["field"],
            base_dir=context.stage.local["base_dir"],
        )
        length = c["input_length"] + c["output_length"]
        chosen = _choose(conversations, c["samples"] + c["held_out"], c["seed"])
        made = making.dialogue_corpus(chosen, tokenizer, length=length, held_out=c["held_out"])
        made.save(context.directory)
    else:
        model, wanted = None, c["samples"] + c["held_out"]
        if c["prompts"] == OWN:
            model = target(context)
            chosen = _own_prompts(context, model, tokenizer, wanted)
        else:
            prompts = _prompts(context, c["prompts"], c["split"], c["field"])
            chosen = _choose(prompts, wanted, c["seed"])
        if len(chosen) <= c["held_out"]:
            raise RecipeError(
                f"{len(chosen)} prompts of at most {c['input_length']} tokens, {c['held_out']} of "
                "which are to be held out: none would be trained on",
                where="speculation.prompts",
                fix="give more prompts, or hold out fewer",
            )
        model = model or target(context)
        batches = making.corpus_batches(chosen, c["batch_size"])
        with context.progress.task(f"answers of {context.stage.variant}", len(batches)) as task:
            made = making.generate_corpus(
                model,
                chosen,
                output_length=c["output_length"],
                batch_size=c["batch_size"],
                temperature=c["temperature"],
                seed=c["seed"],
                end_tokens=end_tokens(model),
                held_out=c["held_out"],
                directory=context.directory,
                advance=counting(task),
            )
    return {
        "source": c["prompts"],
        "answers": c["answers"],
        "samples": len(made.lengths),
        "held_out": made.held_out,
        "answer_tokens": made.answer_tokens("train"),
        "held_out_tokens": made.answer_tokens("held_out"),
        "sha256": made.sha256(),
    }


def features(context: Context) -> dict[str, Any]:
    """The target's hidden states over the corpus, computed once."""
    from compressor.speculate.corpus import Corpus
    from compressor.speculate.eagle3_config import default_aux_layers
    from compressor.speculate.features import decoder_blocks, feature_batches, write_features

    read = Corpus.load(context.need("corpus").path)
    model = target(context)
    layers: tuple[int, ...] = ()
    if context.config["aux"]:
        layers = tuple(context.config["layers"] or default_aux_layers(len(decoder_blocks(model))))
    batches = feature_batches(read, _FEATURE_BATCH)
    with context.progress.task(f"hidden states of {context.stage.variant}", len(batches)) as task:
        write_features(
            model,
            read,
            context.directory,
            layers=layers,
            batch_size=_FEATURE_BATCH,
            advance=counting(task),
        )
    return {"layers": list(layers), "tokens": int(read.lengths.sum())}


def speculate(context: Context) -> dict[str, Any]:
    """Train a speculator."""
    import shutil

    from compressor.speculate.corpus import Corpus
    from compressor.speculate.features import Features
    from compressor.speculate.options import OPTIONS
    from compressor.speculate.pipeline import WORK, train_speculator

    options: Any = OPTIONS[context.config["method"]].model_validate(context.config["options"])
    read = Corpus.load(context.need("corpus").path)
    states = Features.open(context.need("features").path)
    model = target(context)
    title = f"train {context.config['method']} of {context.stage.variant}"
    with context.progress.task(title, None) as task:
        facts = train_speculator(
            options,
            model,
            _draft_source(context),
            read,
            states,
            context.directory,
            advance=counting(task),
        )
    shutil.rmtree(context.directory / WORK, ignore_errors=True)
    return facts


def joint(context: Context) -> dict[str, Any]:
    """Train the target on together with its Medusa heads: the variant is what it becomes."""
    import shutil

    from compressor.speculate.corpus import Corpus
    from compressor.speculate.features import Features
    from compressor.speculate.options import MedusaOptions
    from compressor.speculate.pipeline import WORK, load_medusa_heads, train_target

    options = MedusaOptions.model_validate(context.config["options"])
    with context.progress.task(f"train {context.stage.variant} with its heads", None) as task:
        facts = train_target(
            options,
            target(context),
            context.model_dir,
            load_medusa_heads(context.need("speculate").path),
            Corpus.load(context.need("corpus").path),
            Features.open(context.need("features").path),
            context.directory,
            advance=counting(task),
        )
    shutil.rmtree(context.directory / WORK, ignore_errors=True)
    return {**facts, "dense": True}


def draft(context: Context) -> dict[str, Any]:
    """Open a given draft model, and see that it speaks the target's tokens."""
    import shutil

    from compressor.models.architecture import CausalLM
    from compressor.models.origin import licence_files, read_origin
    from compressor.models.source import materialise
    from compressor.speculate.draft import check_tokenizer

    resolved = context.stage.local["resolved"]
    with context.progress.task(f"draft model of {context.stage.variant}", None):
        path = materialise(resolved, context.directory / "checkpoint")
        check_tokenizer(context.baseline_dir, path)
        model = CausalLM.open(path)
        problems = model.check_weights()
    for file in licence_files(resolved):
        (context.directory / LICENCES).mkdir(exist_ok=True)
        shutil.copyfile(file, context.directory / LICENCES / file.name)
    return {
        "path": None if path.is_relative_to(context.directory) else str(path),
        "source": resolved.source,
        "revision": resolved.revision,
        "parameters": model.num_parameters,
        "notes": problems,
        "origin": read_origin(resolved).to_dict(),
    }


def quantize_draft(context: Context) -> dict[str, Any]:
    """Quantize a draft model, given or made, on the calibration text."""
    import numpy as np
    import torch

    from compressor.models.architecture import CausalLM
    from compressor.quantize.driver import quantize_model
    from compressor.quantize.stream import calibration_dtype
    from compressor.stages import algorithms

    c, calibration = context.config, context.find("calibrate")
    model = CausalLM.open(_draft_dir(context))
    transforms, algorithm, refinements = algorithms(c["steps"], model.config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = getattr(torch, c.get("dtype", "auto"), None)
    total = len(model.blocks)
    total += sum(one.options.steps for one in refinements if one.level == "model")
    with context.progress.task(f"quantize the draft of {context.stage.variant}", total) as task:
        return quantize_model(
            model,
            algorithm,
            context.directory,
            transforms=transforms,
            refinements=refinements,
            tokens=np.load(calibration.path / "tokens.npy") if calibration else None,
            batch_size=c.get("batch_size", 1),
            all_experts=c.get("all_experts", False),
            dtype=wanted or calibration_dtype(model.config.dtype, device),
            device=device,
            advance=counting(task),
        )


def accept(context: Context) -> dict[str, Any]:
    """Try a speculator on prompts that it was not trained on."""
    from compressor.models.end_tokens import end_tokens
    from compressor.speculate.cached import CachedModel
    from compressor.speculate.trial import sweep, try_out

    c = context.config
    found = _prompts(context, c["test_prompts"], None, "prompt")
    prompts = _choose(found, max(c["test_samples"], *c["sweep"]), c["seed"])
    model = target(context)
    cached = CachedModel(model)
    made = proposers(context, model)
    chosen: Tree | None = getattr(made.get("tree"), "tree", None)
    title = f"try {c['method']} of {context.stage.variant}"
    tried = prompts[: c["test_samples"]]
    with context.progress.task(title, (1 + len(made)) * len(tried)) as task:

        def advance(note: str) -> None:
            task.advance(1)

        results, raw = try_out(
            cached,
            made,
            tried,
            depth=c["depth"],
            output_length=c["output_length"],
            batch_size=c["batch_size"],
            ends=sorted(end_tokens(model)),
            advance=advance,
        )
    text = "".join(json.dumps(row) + "\n" for row in raw)
    write_atomic(context.directory / RAW, text)
    with context.progress.task(f"time {c['method']} of {context.stage.variant}", None):
        times = sweep(
            cached,
            made,
            prompts,
            depths=range(1, c["depth"] + 1),
            batch_sizes=[size for size in c["sweep"] if size <= len(prompts)],
            output_length=min(c["output_length"], _SWEEP_LENGTH),
        )
    return {
        "method": c["method"],
        "depth": c["depth"],
        "prompts": c["test_prompts"],
        "results": results,
        "tree": None if chosen is None else [list(path) for path in chosen.paths],
        "times": times,
    }


def proposers(context: Context, model: Any) -> dict[str, Proposer]:
    """What proposes to this model with an ``accept`` stage's speculator, by shape of candidates
    (chain, tree)."""
    import torch

    from compressor.speculate.corpus import Corpus
    from compressor.speculate.features import Features
    from compressor.speculate.medusa import current_states
    from compressor.speculate.options import OPTIONS
    from compressor.speculate.pipeline import make_proposers, measured_tree

    c, trained = context.config, _trained(context)
    options: Any = OPTIONS[c["method"]].model_validate(c["options"])

    def tree(heads: MedusaHeads) -> Tree:
        corpus = Corpus.load(context.need("corpus").path)
        features = Features.open(context.need("features").path)

        def now(row: int) -> torch.Tensor:
            """States of the target as it became; its features are of before."""
            with torch.no_grad():
                return current_states(model, corpus, [row])(row)

        states = now if context.find("joint") else features.hidden
        return measured_tree(heads, corpus, states, c["tree_nodes"])

    drafts = _draft_model(context, model) if c["method"] == "draft" else None
    directory = trained.path if trained else context.directory
    return make_proposers(options, directory, model, tree, c["tree_nodes"], drafts)


def export(context: Context, provenance: dict[str, Any], directory: Path) -> None:
    """Write a trained speculator as its engine loads it."""
    from compressor.export import medusa, speculators
    from compressor.models.architecture import CausalLM
    from compressor.speculate.options import OPTIONS
    from compressor.speculate.pipeline import load_eagle3_head, load_medusa_heads

    fmt = context.config["format"]
    if fmt == "draft-model":
        return _export_draft(context, provenance, directory)
    trained, load = _trained(context), context.need("load")
    assert trained is not None
    options: Any = OPTIONS[context.config["method"]].model_validate(context.config["options"])
    if context.config["method"] == "medusa":
        heads = load_medusa_heads(trained.path)
        state, shape = heads.state_dict(), heads.shape()
        if fmt == MEDUSA_TGI:
            base = context.config["target"]
            medusa.export_tgi(state, shape, provenance, directory, base_model=base)
        else:
            medusa.export_vllm(state, shape, provenance, directory)
    else:
        opened = CausalLM.open(context.model_dir)
        speculators.export(
            load_eagle3_head(trained.path, options, opened.config),
            directory,
            tokens=options.depth,
            verifier={
                "name_or_path": load.result["source"],
                "architectures": [load.result["architecture"]],
            },
            provenance=provenance,
        )


def _export_draft(context: Context, provenance: dict[str, Any], directory: Path) -> None:
    """Write a draft model, quantized where it is."""
    from compressor.export import draft as exporter
    from compressor.quantize.codes import iterate_quantized, replaced_tensors

    given, quantized = context.find("draft"), context.find("quantize-draft")
    if given is not None:
        provenance = provenance | {
            "draft": {key: given.result[key] for key in ("source", "revision")}
        }
    codes = None
    if quantized is not None:
        skipped = [entry["name"] for entry in quantized.result["coverage"]["skipped"]]
        codes = exporter.Codes(
            iterate_quantized(quantized.path), skipped, replaced_tensors(quantized.path)
        )
    exporter.export(
        _draft_dir(context),
        _draft_source(context),
        context.model_dir,
        provenance,
        directory,
        codes,
        licences=sorted((given.path / LICENCES).glob("*")) if given else (),
    )


def serving_flags(settings: dict[str, Any], directory: Path | None) -> tuple[str, ...]:
    """What vLLM is told of a variant's speculation.

    Args:
        settings: ``method``, ``depth`` and ``options`` of the recipe.
        directory: the exported speculator; None for prompt lookup.
    """
    from compressor.export import vllm

    lookup, options = {}, settings["options"]
    if directory is None:
        lookup = {
            "prompt_lookup_min": options["shortest"],
            "prompt_lookup_max": options["longest"],
        }
    return vllm.serving_flags(settings["method"], settings["depth"], directory, **lookup)


def target(context: Context) -> Any:
    """The model of the stage, in float32: what the variant has become of the baseline."""
    import torch

    from compressor.stages import quantized_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = quantized_model(context.model_dir, context.quantized, device)
    return model.eval().requires_grad_(False)


def _trained(context: Context) -> StoredStage | None:
    """Heads as they were trained last; None where nothing is trained."""
    return context.find("joint") or context.find("speculate")


def _draft_source(context: Context) -> Path:
    """Checkpoint that a draft is made of: the given one, or the target's."""
    from compressor.stages import model_dir

    given = context.find("draft")
    return model_dir(given) if given is not None else context.model_dir


def _draft_dir(context: Context) -> Path:
    """Checkpoint of the draft: as it was trained, or the given one as it is."""
    from compressor.speculate.pipeline import DRAFT

    trained = context.find("speculate")
    return trained.path / DRAFT if trained is not None else _draft_source(context)


def _draft_model(context: Context, target: Any) -> Any:
    """The draft, quantized where it is, on the target's device and in its dtype."""
    from compressor.stages import quantized_model

    embeddings = target.get_input_embeddings().weight
    made = quantized_model(
        _draft_dir(context),
        context.find("quantize-draft"),
        embeddings.device.type,
        embeddings.dtype,
    )
    return made.eval().requires_grad_(False)


def _own_prompts(context: Context, model: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts that the target writes; long ones left out."""
    from compressor.speculate.own_prompts import own_batches, own_prompts

    c = context.config
    batches = own_batches(count, c["batch_size"])
    with context.progress.task(f"prompts of {context.stage.variant}", batches) as task:
        made = own_prompts(
            model,
            tokenizer,
            count=count,
            batch_size=c["batch_size"],
            seed=c["seed"],
            directory=context.directory / "prompts",
            advance=counting(task),
        )
    return [prompt for prompt in made if len(prompt) <= c["input_length"]]


def _prompts(context: Context, source: str, split: str | None, field: str) -> list[list[int]]:
    """Prompts as they are served: in the chat template, where there is one; long ones left out."""
    from compressor.data.sources import load_texts
    from compressor.data.tokens import prompt_tokens

    tokenizer = context.tokenizer()
    texts = load_texts(
        source,
        split=split,
        field=field,
        base_dir=context.stage.local["base_dir"],
        tokenizer=tokenizer,
    )
    found = []
    for text in texts:
        ids = prompt_tokens(text, tokenizer)
        if 0 < len(ids) <= context.config["input_length"]:
            found.append(list(ids))
    return found


def _choose(items: list[Any], count: int, seed: int) -> list[Any]:
    """So many of them, in a seeded order; all where there are fewer."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[i] for i in order]
