"""A model behind /v1/completions as vLLM serves it: token ids in, log-probabilities of the prompt
back, greedy answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0
        )
        choice: dict[str, Any] = {"index": index, "finish_reason": "length"}
        if body.get("echo"):
            log_p = model(made).logits[0].double().log_softmax(-1)
            rows = made[0, 1:]
            values = log_p[:-1].gather(1, rows[:, None])[:, 0].tolist()
            best = log_p[:-1].max(-1)
            tops = zip(
                best.indices.tolist(), best.values.tolist(), rows.tolist(), values, strict=True
            )
            choice["logprobs"] = {
                "token_logprobs": [None, *values],
                "top_logprobs": [None, *({str(i): b, str(t): v} for i, b, t, v in tops)],
            }
            choice["text"] = tokenizer.decode(made[0])
        else:
            text = tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
            stops = [text.find(stop) for stop in body.get("stop") or [] if stop in text]
            choice["text"] = text[: min(stops)] if stops else text
        choices.append(choice)
    return choices


@contextmanager
def serving(model: Any, tokenizer: Any, key: str | None = None) -> Iterator[str]:
    """The base address; with a key, requests without it are refused."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            if self.path != "/v1/completions" or not allowed:
                self.send_error(404 if allowed else 401)
                return
            with lock:
                answer = {"choices": _answer(model, tokenizer, body)}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
