"""Raw samples on disk: gzipped JSON lines, byte-identical for equal samples."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import RunError
from compressor.measure.engines.base import RequestSample


def write_samples(path: Path, samples: Iterable[RequestSample]) -> str:
    """Write one JSON object a line; returns the file's SHA-256 (hex)."""
    text = "".join(json.dumps(sample.to_dict(), sort_keys=True) + "\n" for sample in samples)
    data = gzip.compress(text.encode(), mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_samples(path: Path) -> list[RequestSample]:
    """The inverse of `write_samples`; RunError when the file is not what it wrote."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [RequestSample.from_dict(json.loads(line)) for line in file]
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"the raw samples cannot be read: {error}",
            where=str(path),
            fix="run the measurement again",
        ) from error


def request_ids(workload: Mapping[str, Any], variant: str) -> list[str]:
    """The ids of every request that a variant was to serve, from the ledger's ``workload``.

    At each point (``c4`` in flight, ``q2.5`` per second) and in each round they are numbered.
    """
    rounds = workload["rounds"]
    return [
        f"{variant}/{point}/r{turn}/{number}"
        for point, requests in workload["requests"].items()
        for turn in range(rounds)
        for number in range(requests // rounds)
    ]
