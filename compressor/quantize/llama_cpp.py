"""llama.cpp's own quantizer, ``llama-quantize``: K-quants and IQ-quants, in a GGUF file.

A ``library`` algorithm: it does the whole model by itself. What stands here is what a recipe says
of it; `compressor.stages` joins the converter, the importance matrix and the program.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compressor.errors import RunError
from compressor.quantize.registry import AlgorithmOptions, register

VARIABLE = "COMPRESSOR_LLAMA_QUANTIZE"
BINARY = "llama-quantize"
BUILT = ".llama-cpp/bin/llama-quantize"
Type = Literal[
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS",
    "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
]  # fmt: skip
# What it refuses to make without an importance matrix.
NEED_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ2_S")


def llama_quantize() -> Path:
    """The program: $COMPRESSOR_LLAMA_QUANTIZE, else what ``scripts/setup_llama_cpp.sh`` built below
    the working directory, else on the PATH; RunError where there is none."""
    named = os.environ.get(VARIABLE) or None
    found = shutil.which(named or BUILT) or shutil.which(named or BINARY)
    if found is None:
        raise RunError(
            f"llama.cpp's quantizer was not found: {named or BINARY + ' is not on the PATH'}",
            fix=f"bash scripts/setup_llama_cpp.sh, or put {BINARY} on the PATH, or set {VARIABLE} "
            "to its path",
        )
    return Path(found).absolute()


class LlamaCppOptions(AlgorithmOptions):
    """Options of llama.cpp's quantizer."""

    type: Type = Field("Q4_K_M", description="Mixture of block types, by llama.cpp's names.")
    imatrix: bool = Field(
        True,
        description="Weigh columns by an importance matrix: the mean squared input of every linear "
        "over the calibration text.",
    )

    @property
    def needs_calibration(self) -> bool:
        return self.imatrix

    @model_validator(mode="after")
    def _check_type(self) -> LlamaCppOptions:
        if self.type in NEED_IMATRIX and not self.imatrix:
            raise ValueError(f"llama-quantize makes {self.type} only with imatrix: true")
        return self


@register("llama_cpp")
class LlamaCpp:
    """llama.cpp's own quantizer (K-quants, IQ-quants), into a GGUF file."""

    Options: ClassVar[type[LlamaCppOptions]] = LlamaCppOptions
    kind: ClassVar[str] = "library"
    format: ClassVar[str] = "gguf"

    def __init__(self, options: LlamaCppOptions) -> None:
        self.options = options

    @classmethod
    def version(cls) -> str:
        """SHA-256 of the program; RunError when it is missing."""
        with open(llama_quantize(), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def scheme(self) -> dict[str, Any]:
        """How reports call it."""
        return {"name": self.options.type, "weights": {"group_size": None}}
