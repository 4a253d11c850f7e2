"""Token windows for calibration and evaluation.

No special tokens are added: windows are cut out of running text, so a BOS token would stand only
before some of them. Every window of one source has the same length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from compressor.errors import RecipeError


def tokenise(texts: Iterable[str], tokenizer: Any, max_tokens: int | None = None) -> np.ndarray:
    """Documents as one run of int32 token ids, EOS between documents where there is one.

    With ``max_tokens``, the first that many: documents beyond them are not tokenised.
    """
    end = tokenizer.eos_token_id
    pieces: list[int] = []
    for number, text in enumerate(texts):
        if max_tokens is not None and len(pieces) >= max_tokens:
            break
        if number and end is not None:
            pieces.append(end)
        pieces.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return np.asarray(pieces[:max_tokens], dtype=np.int32)


def prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt as it is served: as a chat where the model has a template."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return tokenizer(text)["input_ids"]


def pack_tokens(
    texts: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int
) -> np.ndarray:
    """Calibration windows, int32 [samples, length]: a seeded choice without overlap.

    Raises:
        RecipeError: the text is too short for that many windows.
    """
    tokens = tokenise(texts, tokenizer)
    available = len(tokens) // length
    if available < samples:
        raise RecipeError(
            f"the calibration text has {len(tokens)} tokens, {samples} samples of {length} tokens "
            f"need {samples * length}",
            where="calibration",
            fix=f"lower samples to {available} or fewer, or give a longer text",
        )
    windows = tokens[: available * length].reshape(available, length)
    chosen = np.random.default_rng(seed).permutation(available)[:samples]
    return np.ascontiguousarray(windows[chosen])


def evaluation_windows(
    texts: Iterable[str], tokenizer: Any, length: int, max_tokens: int
) -> tuple[np.ndarray, int]:
    """Evaluation windows in the order of the text, and how many bytes they predict.

    Returns:
        int32 [n, length] with n = min(tokens, max_tokens) // length, and the UTF-8 bytes of the
        tokens 1..length-1 of every window, which are those that get predicted.

    Raises:
        RecipeError: the text is shorter than one window.
    """
    tokens = tokenise(texts, tokenizer, max_tokens)
    count = len(tokens) // length
    if not count:
        raise RecipeError(
            f"the text has {len(tokens)} tokens (max_tokens {max_tokens}), one window "
            f"takes {length}",
            where="evaluate",
            fix="give a longer text, a higher max_tokens or a smaller length",
        )
    windows = tokens[: count * length].reshape(count, length)
    predicted = tokenizer.batch_decode(windows[:, 1:].tolist(), clean_up_tokenization_spaces=False)
    return windows, sum(len(text.encode("utf-8", "replace")) for text in predicted)


def tokens_sha256(tokens: np.ndarray) -> str:
    """SHA-256 (hex) of token ids, with their shape."""
    digest = hashlib.sha256(str(tokens.shape).encode())
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.hexdigest()
