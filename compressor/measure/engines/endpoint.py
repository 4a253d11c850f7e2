"""Any OpenAI-compatible address as an engine: a provider, or a server that somebody else runs.

It takes text, may stop where it likes, and counts tokens with its own tokenizer; so figures of it
stand beside those of other engines only where the report says so.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from compressor.errors import RunError
from compressor.measure.client import HttpClient

_HEALTH_SECONDS = 10.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key to wherever it is sent."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


class Endpoint:
    """A served model at an address, with nothing of its own to start or stop.

    The key is read from the environment each time it is needed and appears in no message, sample
    or metadata.

    Args:
        url: base of the interface as in OpenAI's clients, such as ``https://api.example.com/v1``;
            without a path, ``/v1`` is added.
        model: the model's name there.
        decode: makes text of token ids.
        key_variable: environment variable that holds the bearer key; None for none.
        chat: send each prompt as the message of a chat, for models without plain completions. The
            server's template then adds tokens, which its ``usage`` counts.
        knows_ignore_eos: whether the server takes ``ignore_eos``, as vLLM and SGLang do. Elsewhere
            answers may be shorter than asked for.
        length_field: name of the field with the most tokens to make; some models of OpenAI know
            only ``max_completion_tokens``.
        fields: further fields of every request; None takes one out, as in
            ``{"temperature": None}``.
        stall_s, total_s: limits of a request [s].

    Raises:
        RunError: the address is not one, or holds a name, password or query.
    """

    name = "endpoint"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        decode: Callable[[Sequence[int]], str],
        key_variable: str | None = None,
        chat: bool = False,
        knows_ignore_eos: bool = False,
        length_field: str = "max_tokens",
        fields: Mapping[str, Any] | None = None,
        stall_s: float = 60.0,
        total_s: float = 600.0,
    ) -> None:
        self.url = _base(url)
        self.model = model
        self.key_variable = key_variable
        self.chat = chat
        self._decode, self._fields = decode, dict(fields or {})
        self._knows_ignore_eos, self._length_field = knows_ignore_eos, length_field
        self.stall_s, self.total_s = stall_s, total_s

    def _headers(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise RunError(
                f"the environment variable {self.key_variable} is not set",
                where=self.url,
                fix=f"export {self.key_variable}=... with the key of this address",
            )
        return {"Authorization": f"Bearer {key}"}

    def start(self) -> None:
        """Check that it answers; RunError, with its status, when it does not."""
        if fault := self._fault():
            raise RunError(
                f"the address does not answer GET /models: {fault}",
                where=self.url,
                fix="check the address, the key and the network",
            )

    def healthy(self) -> bool:
        """Whether it lists its models now; RunError when the key is not set."""
        return not self._fault()

    def _fault(self) -> str:
        request = urllib.request.Request(f"{self.url}/models", headers=self._headers())
        try:
            opener = urllib.request.build_opener(_NoRedirect)
            with opener.open(request, timeout=_HEALTH_SECONDS) as answer:
                return "" if answer.status == 200 else f"HTTP {answer.status}"
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}"
        except urllib.error.URLError as error:
            return str(error.reason)
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__

    def client(self) -> HttpClient:
        """A new client, for the event loop that is running; RunError when the key is not set."""
        return HttpClient(
            f"{self.url}/{'chat/completions' if self.chat else 'completions'}",
            model=self.model,
            fields=self._fields,
            headers=self._headers(),
            decode=self._decode,
            chat=self.chat,
            knows_ignore_eos=self._knows_ignore_eos,
            length_field=self._length_field,
            trust_env=True,
            stall_s=self.stall_s,
            total_s=self.total_s,
        )

    def metadata(self) -> dict[str, Any]:
        """What is known of it; what runs behind an address is not."""
        return {
            "engine": self.name,
            "engine_version": None,
            "address": self.url,
            "model": self.model,
            "key_variable": self.key_variable,
            "interface": "chat completions" if self.chat else "completions",
            "fields": self._fields,
            "kernel": "unknown",
            "dtype": "unknown",
            "decoding": "temperature 0"
            + (", full length" if self._knows_ignore_eos else ", may end before the full length"),
            "stall_s": self.stall_s,
            "total_s": self.total_s,
        }

    def stop(self) -> None:
        """Nothing of it is ours."""


def _base(url: str) -> str:
    """The base without a slash at its end; RunError when it is none or could hold a secret."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RunError(
            "not an address of an HTTP interface",
            where=parts.hostname or "the address of the endpoint",
            fix="write it as https://host/v1",
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RunError(
            "the address holds more than host, port and path",
            where=parts.hostname,
            fix="give the key by the name of an environment variable, and leave out the rest",
        )
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"
