"""One speculator from its options: trained, written to a directory, and read back to propose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file

from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import save_whole
from compressor.models.head import split
from compressor.speculate.cached import CachedModel
from compressor.speculate.corpus import Corpus
from compressor.speculate.draft import choose_blocks
from compressor.speculate.draft_proposer import DraftProposer
from compressor.speculate.draft_training import distil_draft
from compressor.speculate.eagle3 import Eagle3
from compressor.speculate.eagle3_config import config_for
from compressor.speculate.eagle3_proposer import Eagle3Proposer
from compressor.speculate.eagle3_training import make_head, train_eagle3
from compressor.speculate.features import Features
from compressor.speculate.medusa import MedusaHeads, States, train_medusa
from compressor.speculate.medusa_joint import train_jointly
from compressor.speculate.medusa_proposer import MedusaProposer, measure_ranks
from compressor.speculate.ngram import NgramProposer
from compressor.speculate.options import (
    DraftModelOptions,
    Eagle3Options,
    MedusaOptions,
    NgramOptions,
)
from compressor.speculate.proposer import Proposer
from compressor.speculate.trained import trained_tensors, write_trained
from compressor.speculate.tree import Tree, tree_from_ranks

WEIGHTS, SHAPE = "heads.safetensors", "heads.json"
DRAFT, WORK = "draft", "training"
CHECKPOINT = "checkpoint"  # of a target that was trained on with its heads
_BRANCHES = 4  # children of each chosen node of EAGLE-3's tree
_RANKS = 10  # guesses of a Medusa head among which a tree chooses


def train_speculator(
    options: BaseModel,
    target: Any,
    source: Path,
    corpus: Corpus,
    features: Features,
    directory: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Train what the options describe. Resumes what a killed call left.

    Args:
        options: of Medusa heads, an EAGLE-3 head or a draft model.
        target: the loaded target as it is served.
        source: directory that a draft is made of, not quantized: the target's, or a given draft's.
        corpus: what is trained on, and what is held out.
        features: what the target makes of it.
        directory: gets the speculator, and checkpoints in `WORK`.
        advance: called with a note after each step.

    Returns:
        What `training.train` returns; for a draft of the target's own blocks also ``blocks`` and
        what they were chosen by.

    Raises:
        RunError: of the method's own training.
    """
    output, work = split(target), directory / WORK
    if isinstance(options, MedusaOptions):
        heads, facts = train_medusa(output, corpus, features, options, work, advance=advance)
        _write(directory, heads.state_dict(), heads.shape())
        return facts
    if isinstance(options, Eagle3Options):
        embeddings = target.get_input_embeddings().weight.detach()
        head = make_head(target.config, embeddings, output, corpus, options)
        facts = train_eagle3(head, output, corpus, features, options, work, advance=advance)
        _write(directory, head.state_dict(), {})
        return facts
    assert isinstance(options, DraftModelOptions)
    made: dict[str, Any] = {}
    if options.blocks is not None:
        keep, made = choose_blocks(target, corpus, options.blocks, options.chosen_by)
        made["blocks"] = keep
    else:
        keep = list(range(len(CausalLM.open(source).blocks)))
    facts = distil_draft(
        source, keep, output, corpus, features, options, directory / DRAFT, work, advance=advance
    )
    return {**facts, **made}


def train_target(
    options: MedusaOptions,
    target: Any,
    source: Path,
    heads: MedusaHeads,
    corpus: Corpus,
    features: Features,
    directory: Path,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Medusa-2: train a target and the heads that it has already. Resumes what a killed call left.

    Args:
        options: with ``joint``.
        target: loaded from ``source`` in float32; trained in place.
        source: its checkpoint, not quantized.
        heads: that `train_speculator` made; trained in place.
        corpus, features: as there.
        directory: gets the heads, the target in `CHECKPOINT`, and training's checkpoints in `WORK`.
        advance: called with a note after each step.

    Returns:
        What `training.train` returns.

    Raises:
        RunError: of `train_jointly` or `trained_tensors`.
    """
    opened = CausalLM.open(source)
    trained_tensors(opened, target)  # what cannot be written is found before it is trained
    heads.to(next(target.parameters()).device)
    _, facts = train_jointly(
        target, heads, corpus, features, options, directory / WORK, advance=advance
    )
    _write(directory, heads.state_dict(), heads.shape())
    write_trained(opened, trained_tensors(opened, target), directory / CHECKPOINT)
    return facts


def _write(directory: Path, state: dict[str, torch.Tensor], shape: dict[str, Any]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_whole(tensors, directory / WEIGHTS)
    (directory / SHAPE).write_text(json.dumps(shape, sort_keys=True), encoding="utf-8")


def load_medusa_heads(directory: Path) -> MedusaHeads:
    """Heads that `train_speculator` wrote."""
    shape = json.loads((directory / SHAPE).read_text(encoding="utf-8"))
    return MedusaHeads.from_state(shape, load_file(directory / WEIGHTS))


def load_eagle3_head(directory: Path, options: Eagle3Options, config: Any) -> Eagle3:
    """The head that `train_speculator` wrote, for a target of that transformers config."""
    state = load_file(directory / WEIGHTS)
    offsets = state["d2t"]
    sizes = config_for(
        config,
        len(offsets),
        aux_layers=options.aux_layers,
        norm_before_residual=options.norm_before_residual,
        fc_norm=options.fc_norm,
    )
    head = Eagle3(sizes, offsets + torch.arange(len(offsets)))
    head.load_state_dict(state)
    return head.eval()


def make_proposers(
    options: BaseModel,
    directory: Path,
    target: Any,
    tree: Callable[[MedusaHeads], Tree],
    nodes: int,
    draft: Any = None,
) -> dict[str, Proposer]:
    """What proposes with a speculator, by the shape of its candidates: ``chain``, and ``tree``
    where the method has one.

    Args:
        options: as it was trained with.
        directory: that `train_speculator` filled; read for heads.
        target: the loaded target.
        tree: of Medusa's guesses, for these heads; see `measured_tree`.
        nodes: of EAGLE-3's tree.
        draft: the loaded draft model, of that method.
    """
    device = next(target.parameters()).device
    if isinstance(options, NgramOptions):
        return {"chain": NgramProposer(options.shortest, options.longest)}
    if isinstance(options, MedusaOptions):
        heads = load_medusa_heads(directory).to(device).eval()
        return {"chain": MedusaProposer(heads), "tree": MedusaProposer(heads, tree(heads))}
    if isinstance(options, Eagle3Options):
        head = load_eagle3_head(directory, options, target.config).to(device)
        branching = Eagle3Proposer(head, branches=_BRANCHES, nodes=nodes)
        return {"chain": Eagle3Proposer(head), "tree": branching}
    vocabulary = target.config.get_text_config().vocab_size
    return {"chain": DraftProposer(CachedModel(draft), vocabulary)}


def measured_tree(heads: MedusaHeads, corpus: Corpus, states: States, nodes: int) -> Tree:
    """The tree of so many nodes that would have had most accepted of the answers held out.

    Args:
        heads: the heads.
        corpus: of the target's answers.
        states: the target's hidden states of a sample, [length, hidden].
        nodes: of the tree, its root not counted.
    """
    device = heads.output_weight(0).device
    sequences = (
        (
            states(row).to(device).float(),
            torch.from_numpy(corpus.row(row).astype("int64")),
            int(corpus.starts[row]),
        )
        for row in corpus.rows("held_out")
    )
    return tree_from_ranks(measure_ranks(heads, sequences, most=_RANKS), nodes)
