"""A loaded model as lm-eval sees it: the answers of its own `HFLM`, sooner.

Tokens, truncation, chat templates and stop sequences are the library's own code (Gao et al.,
lm-evaluation-harness). What is ours is how log-likelihoods are computed (`packed.py`: the context
of a document's choices once, no padding, logits only where they are needed) and that generated
answers are batched by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compressor.errors import RunError
from compressor.evaluate.packed import Scored, Scorer
from compressor.numerics.memory import suppress_out_of_memory

_ALL = 1 << 30  # HFLM hands rolling windows over so many at a time


class LoadedLM(HFLM):
    """A causal LM in this process.

    Args:
        model: a transformers causal LM in evaluation mode, with whatever linears.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a forward pass, at most (but for a longer single sequence); halved
            where memory does not suffice.
        advance: called with the number of requests done.
        lowered: called with each smaller number of tokens.

    Attributes:
        scorer: its counts of tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = 4096,
        advance: Callable[[int], None] = lambda n: None,
        lowered: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=_ALL)
        self.scorer = Scorer(model, batch_tokens, lowered)
        self._advance = advance

    @property
    def tokens(self) -> int:
        """That requests read, each by itself; those of generated answers are not counted."""
        return self.scorer.tokens

    @property
    def tokens_computed(self) -> int:
        """That were run for them."""
        return self.scorer.computed

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """lm-eval's interface; progress is reported by `advance`."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """lm-eval's interface; all windows of all texts are batched together."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[Scored]:
        """(log-likelihood, whether greedy decoding says the same) of tokenised requests.

        Like HFLM, a request longer than the model's context loses tokens from its start.

        Raises:
            RunError: a continuation has no token of its own, or is longer than the context.
        """
        cut = []
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise RunError(
                    f"a continuation has {len(continuation)} tokens; the model reads 1 to "
                    f"{self.max_length}",
                    where=repr(text)[:200],
                    fix="leave this task out, or shorten the text",
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            cut.append((whole[: -len(continuation)], continuation))
        results = self.scorer.score(cut, self._advance)
        for (text, _, _), result in zip(requests, results, strict=True):
            if text is not None:  # None: a window of a longer text
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """lm-eval's interface: greedy unless the task says otherwise; prompts of like length go
        together, as many as `batch_tokens` holds with the longest answer."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        answers: dict[int, str] = {}
        while order:
            room = max(r.args[1].get("max_gen_toks", self.max_gen_toks) for r in requests)
            many = max(1, self.scorer.batch_tokens // (lengths[order[0]] + room))
            batch, made = order[:many], []
            with suppress_out_of_memory():
                made = super().generate_until([requests[i] for i in batch], disable_tqdm=True)
            if not made:
                self.scorer.lower(len(batch))
                continue
            order = order[many:]
            answers |= zip(batch, made, strict=True)
            self._advance(len(batch))
        return [answers[i] for i in range(len(requests))]
