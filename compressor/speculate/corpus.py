"""What speculators are trained on: prompts with the target's own answers, or given dialogues.

A draft is accepted for saying what the target would say, so the target's own answers teach it more
than anybody else's (self-distillation; Cai et al.: "Medusa", arXiv 2401.10774, section 2.3.2).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from compressor.errors import RecipeError, RunError

Part = Literal["train", "held_out"]

_ARRAYS = ("tokens", "lengths", "starts")
_FACTS = "corpus.json"
_ANSWERS = "answers.jsonl"  # of the batches that are done, while the corpus is being made
_BLOCK = 256  # tokens whose probabilities are summed first, where one is drawn
_PADDING = 0  # any token will do: it is masked, or lies behind the end


@dataclass(frozen=True)
class Corpus:
    """Token sequences, each a prompt and an answer.

    Attributes:
        tokens: int32 [samples, length], padded with 0 on the right.
        lengths: int32 [samples], tokens of each sample.
        starts: int32 [samples], index of the answer's first token, at least 1. Only what predicts a
            token at this index or later counts in losses and figures.
        held_out: so many samples, the last ones, are not trained on.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    held_out: int

    def __post_init__(self) -> None:
        samples, length = self.tokens.shape
        if not self.lengths.shape == self.starts.shape == (samples,):
            raise ValueError("lengths and starts must have one number per sample")
        if samples and not (
            (self.starts >= 1).all()
            and (self.starts < self.lengths).all()
            and (self.lengths <= length).all()
        ):
            raise ValueError("every sample needs 1 <= start < its length <= the padded length")
        if not 0 <= self.held_out <= samples:
            raise ValueError(f"{self.held_out} of {samples} samples cannot be held out")

    @classmethod
    def from_samples(
        cls, samples: Sequence[tuple[Sequence[int], Sequence[int]]], held_out: int
    ) -> Corpus:
        """Of (prompt, answer), neither of them empty."""
        length = max((len(prompt) + len(answer) for prompt, answer in samples), default=0)
        tokens = np.full((len(samples), length), _PADDING, np.int32)
        for row, (prompt, answer) in enumerate(samples):
            tokens[row, : len(prompt) + len(answer)] = [*prompt, *answer]
        return cls(
            tokens,
            np.array([len(prompt) + len(answer) for prompt, answer in samples], np.int32),
            np.array([len(prompt) for prompt, _ in samples], np.int32),
            held_out,
        )

    def rows(self, part: Part) -> range:
        """The samples of a part."""
        trained = len(self.tokens) - self.held_out
        return range(trained) if part == "train" else range(trained, len(self.tokens))

    def row(self, row: int) -> np.ndarray:
        """The tokens of a sample, without padding, int32."""
        return self.tokens[row, : self.lengths[row]]

    def answer_tokens(self, part: Part) -> int:
        """How many tokens the answers of a part have."""
        rows = self.rows(part)
        return int((self.lengths - self.starts)[rows.start : rows.stop].sum())

    def frequent_tokens(self, count: int, vocabulary: int) -> np.ndarray:
        """The ``count`` tokens that the answers trained on hold most often, int64, ascending.

        Where they hold fewer than that, the first ids of the vocabulary make up the rest: in
        byte-pair vocabularies those are the most frequent ones.
        """
        counts = np.zeros(vocabulary, np.int64)
        for row in self.rows("train"):
            counts += np.bincount(self.row(row)[self.starts[row] :], minlength=vocabulary)
        return np.sort(np.argsort(-counts, kind="stable")[:count])

    def sha256(self) -> str:
        """Hex digest of tokens, lengths and starts."""
        digest = hashlib.sha256(str(self.tokens.shape).encode())
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name), "<i4").tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``tokens.npy``, ``lengths.npy``, ``starts.npy`` and, last, ``corpus.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)
        temporary = directory / f"{_FACTS}.tmp"
        facts = {"held_out": self.held_out, "sha256": self.sha256()}
        temporary.write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, directory / _FACTS)

    @classmethod
    def load(cls, directory: Path) -> Corpus:
        """What `save` wrote.

        Raises:
            RunError: it is not there, or not what was written.
        """
        try:
            facts = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
            arrays = [np.load(directory / f"{name}.npy", allow_pickle=False) for name in _ARRAYS]
            tokens, lengths, starts = arrays
            made = cls(tokens, lengths, starts, facts["held_out"])
            whole = made.sha256() == facts["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"the corpus cannot be read ({error})", where=str(directory), fix="make it again"
            ) from error
        if not whole:
            raise RunError(
                "the corpus is not what was written", where=str(directory), fix="make it again"
            )
        return made


def corpus_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The prompts that are answered together, by index: those of like length, the longest last."""
    return batches_of_like_length(list(map(len, prompts)), batch_size)


def batches_of_like_length(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Indices in batches of so many, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_corpus(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    output_length: int,
    batch_size: int,
    temperature: float,
    seed: int,
    end_tokens: Collection[int],
    held_out: int,
    directory: Path,
    advance: Callable[[str], None] = lambda note: None,
) -> Corpus:
    """The target's own answers to prompts; resumes what a killed call left.

    Batches are padded on the left; a row that said an end token leaves its batch. Every prompt has
    a random generator of its own, so that its answer does not depend on which others it was
    answered with (but for rounding, where two tokens are almost equally likely).

    Args:
        model: a transformers causal LM, in evaluation mode.
        prompts: token ids, none empty.
        output_length: the most tokens of an answer, the end token included.
        batch_size: prompts answered at once.
        temperature: 0 for the likeliest token each time; else answers are drawn from
            softmax(logits / temperature).
        seed: of what is drawn.
        end_tokens: ids after which an answer is over.
        held_out: so many prompts, the last ones, are not for training.
        directory: holds the corpus afterwards, and what is done until then.
        advance: called with a note after each of `corpus_batches`.

    Returns:
        The corpus, in the order of the prompts.

    Raises:
        RunError: a prompt is empty or too long for the model's context, or nothing is left to train
            on.
    """
    _check_prompts(model, prompts, output_length, held_out)
    batches = corpus_batches(prompts, batch_size)
    if (directory / _FACTS).exists():
        (directory / _ANSWERS).unlink(missing_ok=True)
        for _ in batches:
            advance("already done")
        return Corpus.load(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ends = sorted(set(end_tokens))
    settings = [output_length, batch_size, temperature, seed, ends, held_out]
    text = json.dumps([[list(map(int, p)) for p in prompts], settings])
    key = hashlib.sha256(text.encode()).hexdigest()
    done = _read_answers(directory / _ANSWERS, key)
    answers: dict[int, list[int]] = {}
    with open(directory / _ANSWERS, "a", encoding="utf-8") as file:
        for number, indices in enumerate(batches):
            if number < len(done):
                answers |= zip(indices, done[number], strict=True)
                advance("already done")
                continue
            draw = _Draw(temperature, seed, indices)
            made = _answer(model, [prompts[i] for i in indices], output_length, set(ends), draw)
            file.write(json.dumps(made) + "\n")
            file.flush()
            os.fsync(file.fileno())
            answers |= zip(indices, made, strict=True)
            advance(f"{sum(map(len, made))} tokens")
    corpus = Corpus.from_samples(
        [(prompt, answers[index]) for index, prompt in enumerate(prompts)], held_out
    )
    corpus.save(directory)
    (directory / _ANSWERS).unlink()
    return corpus


def _check_prompts(
    model: Any, prompts: Sequence[Sequence[int]], output_length: int, held_out: int
) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise RunError(
                "a prompt is empty", where=f"prompt {index}", fix="leave it out of the prompts"
            )
        if context is not None and len(prompt) + output_length > context:
            raise RunError(
                f"{len(prompt)} tokens and an answer of {output_length} do not fit the model's "
                f"context of {context}",
                where=f"prompt {index}",
                fix="shorten the prompt or the answers",
            )
    if not 0 <= held_out < len(prompts):
        raise RunError(
            f"{held_out} of {len(prompts)} prompts are to be held out: none would be trained on",
            where="speculator corpus",
            fix="give more prompts, or hold out fewer",
        )


def _read_answers(path: Path, key: str) -> list[list[list[int]]]:
    """Answers of the batches that are done; the file is made anew where it is of other settings,
    and cut after its last whole line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done: list[list[list[int]]] = []
    if lines and lines[0] == key:
        for line in lines[1:]:
            try:
                done.append(json.loads(line))
            except ValueError:
                break  # cut short by a kill
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{x}\n" for x in (key, *map(json.dumps, done))), "utf-8")
    os.replace(temporary, path)
    return done


class _Draw:
    """Chooses tokens, each row by a random generator of its own.

    Args:
        temperature: 0 for the likeliest.
        seed: shared by all rows.
        indices: of the rows' prompts.
    """

    def __init__(self, temperature: float, seed: int, indices: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [np.random.default_rng([seed, index]) for index in indices]

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        """A token for each of these rows, from logits float32 [rows, vocabulary]."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        # By the cumulative distribution, of blocks of tokens first: over all tokens it would take
        # as long as the model.
        shares = ((logits - logits.max(-1, keepdim=True).values) / self.temperature).exp_()
        shares = nn.functional.pad(shares, (0, -shares.shape[-1] % _BLOCK)).unflatten(
            -1, (-1, _BLOCK)
        )
        sums = shares.sum(-1, dtype=torch.float64).cumsum(-1)
        places = torch.tensor([self.generators[row].random() for row in rows]).double()
        wanted = places.to(sums.device).unsqueeze(-1) * sums[:, -1:]
        block = torch.searchsorted(sums, wanted, right=True)
        before = nn.functional.pad(sums, (1, 0)).gather(1, block)
        inner = shares[torch.arange(len(rows)), block.squeeze(-1)].double().cumsum(-1)
        last = (inner < inner[:, -1:]).sum(-1, keepdim=True)  # where rounding leads beyond it
        place = torch.minimum(torch.searchsorted(inner, wanted - before, right=True), last)
        return (block * _BLOCK + place).squeeze(-1).tolist()


@torch.inference_mode()
def _answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    output_length: int,
    ends: set[int],
    draw: _Draw,
) -> list[list[int]]:
    """One answer per prompt, up to and with its end token."""
    from compressor.models.growing_cache import growing_cache

    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    length = max(map(len, prompts))
    ids = torch.tensor([[_PADDING] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = bool((mask == 0).any())
    cache = growing_cache(model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for step in range(output_length):
        arguments: dict[str, Any] = {}
        if padded:
            arguments["attention_mask"] = mask
            if "position_ids" in accepted:
                positions = (mask.cumsum(-1) - 1).clamp_(min=0)
                arguments["position_ids"] = positions[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids, past_key_values=cache, use_cache=True, **arguments, **last_only
        ).logits[:, -1]
        tokens = draw(logits.float(), live)
        for row, token in zip(live, tokens, strict=True):
            answers[row].append(token)
        stay = [place for place, token in enumerate(tokens) if token not in ends]
        if not stay or step == output_length - 1:
            break
        if len(stay) < len(live):
            kept = torch.tensor(stay, device=device)
            cache.batch_select_indices(kept)
            mask = mask[kept]
            live = [live[place] for place in stay]
        ids = torch.tensor([[tokens[place]] for place in stay], device=device)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return answers


def dialogue_corpus(
    conversations: Sequence[Sequence[Mapping[str, str]]],
    tokenizer: Any,
    *,
    length: int,
    held_out: int,
) -> Corpus:
    """Given dialogues, one sample for each answer of the assistant, in its context as served.

    Args:
        conversations: chat messages with ``role`` and ``content``.
        tokenizer: with a chat template.
        length: samples are cut after so many tokens; an answer that begins later is left out.
        held_out: so many conversations, the last ones with an answer, are not for training.

    Raises:
        RecipeError: there is no chat template, or too few answers.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "the data are dialogues, but the model has no chat template",
            where="speculator corpus",
            fix="use a model with a chat template, or have the answers generated",
        )
    found = [
        samples
        for messages in conversations
        if (samples := list(_answers_of(messages, tokenizer, length)))
    ]
    if not 0 <= held_out < len(found):
        raise RecipeError(
            f"{len(found)} conversations hold an answer of the assistant within {length} tokens, "
            f"{held_out} are to be held out: none would be trained on",
            where="speculator corpus",
            fix="give more conversations, or hold out fewer",
        )
    aside = sum(len(samples) for samples in found[len(found) - held_out :])
    return Corpus.from_samples([sample for samples in found for sample in samples], aside)


def _answers_of(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, answer) of every answer in a conversation, in tokens.

    The two are tokenised apart, since what is served is a prompt first. The answer ends with the
    end token; what templates write behind that is never generated.
    """
    end = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for place, message in enumerate(messages):
        if message.get("role") != "assistant" or place == 0:
            continue
        before = [dict(m) for m in messages[:place]]
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*before, dict(message)], tokenize=False)
        # Templates that rewrite earlier turns: then the bare answer.
        rest = whole[len(prompt) :] if whole.startswith(prompt) else message["content"]
        prompt_ids, answer = ids(prompt), ids(rest)
        if end is not None:
            answer = [*answer[: answer.index(end)], end] if end in answer else [*answer, end]
        answer = answer[: max(length - len(prompt_ids), 0)]
        if prompt_ids and answer:
            yield prompt_ids, answer
