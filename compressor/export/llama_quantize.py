"""llama.cpp's quantizer on a GGUF file, and the importance matrix that it reads.

The matrix is a GGUF file of its own (llama.cpp, tools/imatrix and common/imatrix-loader): for each
weight X float32 ``X.in_sum2`` [matrices, in], sums of squared inputs, and ``X.counts`` [matrices,
1], over how many rows; the keys ``imatrix.datasets``, ``imatrix.chunk_count`` and
``imatrix.chunk_size`` must be there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter

from compressor.errors import RunError
from compressor.export.gguf_model import Layout


def write_imatrix(
    path: Path,
    layout: Layout,
    sums: Mapping[str, tuple[torch.Tensor, int]],
    *,
    dataset: str,
    chunks: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix.

    Args:
        path: receives it.
        layout: of the model, for names.
        sums: sum of squared inputs [in] and number of rows, of every linear, by its name.
        dataset: name of the text.
        chunks, chunk_size: calibration samples, and tokens in each.
    """
    writer = GGUFWriter(path, layout.arch)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    named = {layout.name(f"{name}.weight"): value for name, value in sums.items()}
    for name in sorted(key for key in named if key is not None):
        total, count = named[name]
        writer.add_tensor(f"{name}.in_sum2", total.float().numpy().reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_file(
    binary: Path,
    source: Path,
    target: Path,
    kind: str,
    *,
    imatrix: Path | None = None,
    kept: Sequence[str] = (),
    kept_type: str = "f16",
    threads: int = 1,
) -> None:
    """Run ``llama-quantize``.

    Args:
        binary: the program.
        source: GGUF file in 16 or 32 bits.
        target: receives the quantized file.
        kind: such as ``Q4_K_M``.
        imatrix: importance matrix, in the same directory as the source.
        kept: names of tensors (without ``.weight``) that stay in ``kept_type``.
        threads: of its work; the result does not depend on it.

    Raises:
        RunError: the program fails; with the last line that it printed.
    """
    # Names without directories: it writes them into the file.
    command = [str(binary)]
    if imatrix is not None:
        command += ["--imatrix", imatrix.name]
    for name in kept:
        command += ["--tensor-type", f"{name}={kept_type}"]
    command += [source.name, str(target.resolve()), kind, str(threads)]
    done = subprocess.run(
        command,
        cwd=source.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode or not target.is_file():
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or ["no output"]
        raise RunError(
            f"llama-quantize could not make {kind} ({lines[-1].strip()})",
            where=str(binary),
            fix="choose another type, such as Q4_K_M, or build llama.cpp anew: "
            "bash scripts/setup_llama_cpp.sh",
        )
