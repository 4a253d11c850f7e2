"""A draft model made from the target by leaving out decoder blocks, and checks of a given one.

Which blocks go is measured. `block_influence` is that of Men, Xu, Zhang, Yuan, Wang, Zhao, Lin,
Lu, Han, Chen: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853: 1 - the cosine between a block's input and output. `divergence_order` takes out
one block after the other, each time the one whose loss changes the target's distributions least.
What is left is an ordinary directory of the same architecture and tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressor.errors import RunError
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import TensorWriter
from compressor.models.head import Head, last_hidden, split
from compressor.models.tokenizer import load_tokenizer
from compressor.speculate.corpus import Corpus
from compressor.speculate.features import block_outputs, decoder_blocks
from compressor.speculate.options import ChosenBy

_MAX_SHARD_BYTES = 5_000_000_000
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_CHUNK = 128  # tokens whose distributions are in memory at once


@torch.inference_mode()
def block_influence(
    model: Any,
    corpus: Corpus,
    rows: Sequence[int],
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> list[float]:
    """Mean of 1 - cos(input, output) of each decoder block over all tokens of some samples.

    Args:
        model: the target, loaded.
        corpus: of token sequences.
        rows: samples to run, one by one.
        advance: called with a note after each.

    Returns:
        one number per block, from 0 (it leaves directions as they are) to 2.
    """
    blocks = len(decoder_blocks(model))
    sums = torch.zeros(blocks, dtype=torch.float64)
    tokens = 0
    with block_outputs(model, range(blocks + 1)) as seen:
        for row in rows:
            last_hidden(model, _ids(model, corpus, row))
            for i in range(blocks):
                cosine = functional.cosine_similarity(seen[i].float(), seen[i + 1].float(), dim=-1)
                sums[i] += float((1 - cosine).sum(dtype=torch.float64))
            tokens += int(corpus.lengths[row])
            advance(f"{tokens} tokens")
    return (sums / max(tokens, 1)).tolist()


@torch.inference_mode()
def divergence_order(
    model: Any,
    corpus: Corpus,
    rows: Sequence[int],
    drop: int,
    *,
    advance: Callable[[str], None] = lambda note: None,
) -> list[tuple[int, float]]:
    """The blocks to leave out, the first one first.

    Every block that is left is left out in turn, which takes about blocks x ``drop`` passes.

    Args:
        model: the target, loaded.
        corpus: of token sequences.
        rows: samples to run.
        drop: how many blocks.
        advance: called with a note after each block that was chosen.

    Returns:
        (block, mean KL(target || without it and those before it) in nats per answer token).
    """
    head = split(model)
    blocks = len(decoder_blocks(model))
    wanted = [_answer_states(model, corpus, row) for row in rows]
    order: list[tuple[int, float]] = []
    for _ in range(drop):
        gone = [block for block, _ in order]
        costs = {}
        for block in range(blocks):
            if block in gone:
                continue
            with without(model, [*gone, block]):
                costs[block] = _divergence(head, wanted, model, corpus, rows)
        best = min(costs, key=lambda block: costs[block])
        order.append((best, costs[best]))
        advance(f"block {best}: KL {costs[best]:.3f}")
    return order


@contextlib.contextmanager
def without(model: Any, gone: Sequence[int]) -> Iterator[None]:
    """Under it, these decoder blocks hand on what they are given (without a cache)."""
    blocks = decoder_blocks(model)
    # What a block returns is asked of one that runs.
    as_tuple: list[bool] = []
    probe = blocks[0].register_forward_hook(
        lambda module, args, out: as_tuple.append(isinstance(out, tuple))
    )
    try:
        with torch.inference_mode():
            last_hidden(model, torch.zeros(1, 1, dtype=torch.int64, device=_device(model)))
    finally:
        probe.remove()

    def skip(hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if hidden is None else hidden
        return (hidden,) if as_tuple[0] else hidden

    for block in gone:
        blocks[block].forward = skip  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in gone:
            del blocks[block].__dict__["forward"]


def _divergence(
    head: Head, wanted: Sequence[torch.Tensor], model: Any, corpus: Corpus, rows: Sequence[int]
) -> float:
    total, tokens = 0.0, 0
    for states, row in zip(wanted, rows, strict=True):
        made = _answer_states(model, corpus, row)
        for one, other in zip(states.split(_CHUNK), made.split(_CHUNK), strict=True):
            p, q = (functional.log_softmax(head(part), -1) for part in (one, other))
            total += float((p.exp() * (p - q)).sum())
        tokens += len(states)
    return total / max(tokens, 1)


def _answer_states(model: Any, corpus: Corpus, row: int) -> torch.Tensor:
    """[tokens, hidden]: what the output layer reads where it predicts a sample's answer."""
    start = int(corpus.starts[row])
    return last_hidden(model, _ids(model, corpus, row))[0, start - 1 : -1]


def _ids(model: Any, corpus: Corpus, row: int) -> torch.Tensor:
    return torch.from_numpy(corpus.row(row).astype("int64"))[None].to(_device(model))


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def choose_blocks(
    model: Any,
    corpus: Corpus,
    keep: int,
    method: ChosenBy = "influence",
    *,
    samples: int = 16,
    advance: Callable[[str], None] = lambda note: None,
) -> tuple[list[int], dict[str, Any]]:
    """The decoder blocks that a draft of so many keeps.

    Args:
        model: the target, loaded.
        corpus: measured on the first samples of its training part.
        keep: how many blocks, fewer than there are.
        method: `block_influence` (one pass) or `divergence_order` (many).
        samples: how many samples are looked at.
        advance: called with notes.

    Returns:
        the blocks, ascending; and what was measured: ``influence`` of every block, or ``dropped``,
        the blocks left out in order with the divergence after each.

    Raises:
        RunError: nothing would be left, or left out, or there is no sample.
    """
    blocks = len(decoder_blocks(model))
    if not 0 < keep < blocks:
        raise RunError(
            f"a draft of {keep} of the target's {blocks} blocks",
            where="draft model",
            fix=f"keep 1 to {blocks - 1} blocks",
        )
    rows = list(corpus.rows("train"))[:samples]
    if not rows:
        raise RunError(
            "there is no sample to measure blocks on",
            where="draft model",
            fix="give more prompts, or hold out fewer",
        )
    if method == "divergence":
        dropped = divergence_order(model, corpus, rows, blocks - keep, advance=advance)
        gone = {block for block, _ in dropped}
        return [b for b in range(blocks) if b not in gone], {"dropped": dropped}
    influence = block_influence(model, corpus, rows, advance=advance)
    kept = sorted(range(blocks), key=lambda block: (-influence[block], block))[:keep]
    return sorted(kept), {"influence": influence}


def write_draft(
    source: Path,
    keep: Sequence[int],
    directory: Path,
    trained: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``config.json`` and weights of a model with some of the blocks of another.

    Args:
        source: directory of the target, in safetensors, not quantized.
        keep: the blocks, ascending.
        directory: made if need be; nothing else is put there.
        trained: tensors to use instead, by their name in the draft; they get the source's dtypes.

    Raises:
        RunError: the architecture's config does not say what a block is independently of its
            number, so that what is left would be another model.
    """
    target = CausalLM.open(source)
    config = _cut_config(source, target, keep)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    writer = TensorWriter(directory, _MAX_SHARD_BYTES)
    for name, key in sorted(_kept_names(target, keep).items()):
        value = (trained or {}).get(name)
        stored = target.checkpoint.dtype(key)
        writer.add(name, target.checkpoint.tensor(key) if value is None else value.to(stored))
    writer.close()
    _check_blocks(target, CausalLM.open(directory), keep)


def _kept_names(target: CausalLM, keep: Sequence[int]) -> dict[str, str]:
    """Name in the draft -> key in the target's checkpoint."""
    prefixes = [target.disk_path(name) for name in target.block_names]
    above = prefixes[0].rpartition(".")[0]
    if any(prefix != f"{above}.{i}" for i, prefix in enumerate(prefixes)):
        raise RunError(
            "the decoder blocks are not numbered in the checkpoint",
            where=str(target.checkpoint.directory),
            fix="use a given draft model instead",
        )
    unread = set(target.unread())
    new = {old: number for number, old in enumerate(keep)}
    names = {}
    for key in target.checkpoint.names:
        found = re.match(re.escape(above) + r"\.(\d+)\.(.+)", key)
        if key in unread:
            continue
        if found is None:
            names[key] = key
        elif int(found[1]) in new:
            names[f"{above}.{new[int(found[1])]}.{found[2]}"] = key
    return names


def _cut_config(source: Path, target: CausalLM, keep: Sequence[int]) -> dict[str, Any]:
    """``config.json`` of the draft: whatever speaks of single blocks is cut to those left."""
    blocks = len(target.blocks)
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise RunError(
            "a draft is made from weights that are not quantized",
            where=str(source),
            fix="give the target's own checkpoint, and quantize the draft afterwards",
        )
    parsed = target.config.to_dict()
    for name in _COUNTS:
        if config.get(name, parsed.get(name)) == blocks:
            config[name] = len(keep)
    for name, value in parsed.items():  # also what the config class derived from other settings
        about_blocks = isinstance(value, list) and len(value) == blocks
        if about_blocks and re.search("layer|block", name):
            config[name] = [value[i] for i in keep]
    if config.get("first_k_dense_replace") is not None:
        config["first_k_dense_replace"] = sum(i < config["first_k_dense_replace"] for i in keep)
    if parsed.get("scale_attn_by_inverse_layer_idx"):
        raise _differ_by_number(source)
    step = parsed.get("decoder_sparse_step")
    if step:
        dense = set(parsed.get("mlp_only_layers") or ())
        dense |= {i for i in range(blocks) if (i + 1) % step}
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [new for new, old in enumerate(keep) if old in dense]
    return config


def _check_blocks(target: CausalLM, draft: CausalLM, keep: Sequence[int]) -> None:
    """Raise unless every block of the draft is built as the one it was."""
    built = [_description(block) for block in draft.blocks]
    meant = [_description(target.blocks[i]) for i in keep]
    if built != meant:
        raise _differ_by_number(target.checkpoint.directory)


def _differ_by_number(source: Path) -> RunError:
    return RunError(
        "blocks of this architecture differ by their number in a way that its config cannot say: a "
        "draft with some of them would be another model",
        where=str(source),
        fix="use a given draft model instead",
    )


def _description(block: nn.Module) -> Any:
    """Classes, plain settings and shapes of everything in a block."""
    return [
        (
            name,
            type(module).__name__,
            sorted(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "_uuid")
            ),
            sorted((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)),
        )
        for name, module in block.named_modules()
    ]


def check_tokenizer(target: Path, draft: Path) -> None:
    """Raise unless a draft model speaks the target's tokens.

    Args:
        target: directory of the target, with its tokenizer.
        draft: directory of the draft, with its own.

    Raises:
        RunError: a tokenizer cannot be read, a token differs, or the output layers have different
            numbers of rows (vLLM refuses that).
    """
    theirs, ours = (_tokens(directory) for directory in (draft, target))
    fix = "choose a draft of the same model family, or make one from the target"
    if theirs != ours:
        differ = sorted(i for i in theirs.keys() | ours.keys() if theirs.get(i) != ours.get(i))
        first = differ[0]
        raise RunError(
            f"{len(differ)} tokens differ from the target's: {first} is {theirs.get(first)!r}, and "
            f"{ours.get(first)!r} there",
            where=str(draft),
            fix=fix,
        )
    sizes = [_vocabulary(directory) for directory in (draft, target)]
    if sizes[0] != sizes[1]:
        raise RunError(
            f"the draft's config has vocab_size {sizes[0]}, the target's {sizes[1]}: engines "
            "verify no draft whose logits are of another size",
            where=str(draft),
            fix=fix,
        )


def _tokens(directory: Path) -> dict[int, str]:
    return {number: token for token, number in load_tokenizer(directory).get_vocab().items()}


def _vocabulary(directory: Path) -> int:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(
            f"the config cannot be read ({(str(error).splitlines() or ['?'])[0]})",
            where=str(directory),
            fix="put the model's config.json there",
        ) from error
