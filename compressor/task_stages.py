"""The stages of evaluation by tasks: on the model in this process, and on a served artifact."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import RunError

if TYPE_CHECKING:
    from compressor.evaluate.tasks import LoadedTask
    from compressor.stages import Context


def tasks(context: Context) -> dict[str, Any]:
    """Run the recipe's tasks on the baseline or a variant."""
    import torch
    from transformers import GenerationConfig

    from compressor import stages
    from compressor.evaluate.lm import LoadedLM
    from compressor.evaluate.tasks import counter, quiet
    from compressor.models.architecture import CausalLM
    from compressor.progress import telling_lowered
    from compressor.quantize.stream import calibration_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = _loaded(context)  # before the model: data that is missing is found sooner
    dtype = getattr(torch, context.config["dtype"], None)
    if dtype is None:
        dtype = calibration_dtype(CausalLM.open(context.model_dir).config.dtype, device)
    model = stages.quantized_model(context.model_dir, context.quantized, device, dtype)
    if (context.model_dir / "generation_config.json").is_file():
        # As a served model has it: some repeat less by it.
        model.generation_config = GenerationConfig.from_pretrained(context.model_dir)
    tokenizer = context.tokenizer()
    title = f"tasks {context.stage.variant}"
    with context.progress.task(title, None) as task, quiet():
        lm = LoadedLM(
            model,
            tokenizer,
            batch_tokens=context.config["batch_tokens"],
            advance=counter(lambda note: task.update(note=note)),
            lowered=telling_lowered(context.progress, title),
        )
        result = _run(context, lm, loaded, tokenizer)
    return result | {
        "tokens": lm.tokens,
        "tokens_computed": lm.tokens_computed,
        "dtype": str(dtype).removeprefix("torch."),
    }


def served(context: Context) -> dict[str, Any]:
    """Run the tasks on a variant's artifact in vLLM, or on the address that serves it."""
    from compressor.measure.engines.vllm import SERVED_NAME, VllmServer
    from compressor.measure.fleet import vllm_interpreter

    title, c = f"tasks {context.stage.variant}, served", context.config["server"]
    loaded = _loaded(context)
    if context.config["engine"] == "endpoint":
        with context.progress.task(title, None):
            return _ask(context, _Served(c["url"], c["model"], c["key_variable"]), loaded)
    export = context.need("export")
    logs = context.directory / "logs"
    logs.mkdir(exist_ok=True)
    flags = c["flags"]
    if c["dtype"] != "auto" and not any(flag.split("=")[0] == "--dtype" for flag in flags):
        flags = [*flags, "--dtype", c["dtype"]]
    server = VllmServer(
        vllm_interpreter(c["program"]),
        export.path / "artifact",
        logs / "server.log",
        flags,
        c["start_timeout_s"],
        c["variables"],
    )
    with context.progress.task(title, None), server:
        facts = server.metadata()
        served = _Served(f"{server.url}/v1", SERVED_NAME, None)
        return _ask(context, served, loaded, facts["max_model_len"]) | {"engine": facts}


class _Served:
    """Where a served model answers.

    Args:
        url: base of the interface, with ``/v1``.
        model: its name there.
        key_variable: environment variable that holds the bearer key, if one is needed.
    """

    def __init__(self, url: str, model: str, key_variable: str | None) -> None:
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable

    def lm(self, tokenizer_dir: Path, longest: int, tokenizer: Any) -> Any:
        """lm-eval's own client: token ids are sent, log-probabilities of the prompt come back.

        Raises:
            RunError: the key is not set.
        """
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        header = None
        if self.key_variable is not None:
            if not (key := os.environ.get(self.key_variable, "").strip()):
                raise RunError(
                    f"the environment variable {self.key_variable} is not set",
                    where=self.url,
                    fix=f"export {self.key_variable}=... with the key of this address",
                )
            header = {"Authorization": f"Bearer {key}"}
        first = tokenizer("a").input_ids[:1]
        begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        return LocalCompletionsAPI(
            model=self.model,
            base_url=f"{self.url}/completions",
            tokenizer=str(tokenizer_dir),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            add_bos_token=begins,  # as the model in this process is asked
            num_concurrent=8,
            max_length=longest,
            max_retries=3,
            timeout=600,
            header=header,
        )


def _ask(
    context: Context, served: _Served, loaded: list[LoadedTask], most: str | None = None
) -> dict[str, Any]:
    """The tasks' results; ``most`` is the server's longest sequence [tokens], where it said it."""
    from transformers import AutoConfig

    tokenizer = context.tokenizer()
    text = AutoConfig.from_pretrained(context.model_dir).get_text_config(decoder=True)
    longest = int(most or getattr(text, "max_position_embeddings", None) or 2048)
    lm = served.lm(context.model_dir, longest, tokenizer)
    try:
        return _run(context, lm, loaded, tokenizer)
    except RunError as error:
        raise RunError(
            error.what,
            where=served.url,
            fix="the address must offer /completions with `echo` and `logprobs`, which vLLM does "
            "and most providers do not; remove evaluate.tasks_served otherwise",
        ) from error


def _loaded(context: Context) -> list[LoadedTask]:
    from compressor.evaluate.task_options import TaskChoice
    from compressor.evaluate.tasks import load_tasks

    choices = [TaskChoice(**choice) for choice in context.config["tasks"]]
    places = context.stage.local["places"]
    return load_tasks(choices, context.stage.local["base_dir"], places, context.config["seed"])


def _run(context: Context, lm: Any, loaded: list[LoadedTask], tokenizer: Any) -> dict[str, Any]:
    from compressor.evaluate.tasks import run_tasks

    started = time.perf_counter()
    rows = run_tasks(
        lm,
        loaded,
        context.directory,
        limit=context.config["limit"],
        seed=context.config["seed"],
        has_template=bool(getattr(tokenizer, "chat_template", None)),
    )
    return {"tasks": rows, "seconds": time.perf_counter() - started}
