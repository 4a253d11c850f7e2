"""What a recipe says of each format. No torch here: the recipe is read without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

GPTQFormat = Literal["gptq", "gptq_v2"]
Engine = Literal["transformers", "gptqmodel", "vllm", "llama.cpp"]
DenseDtype = Literal["stored", "float32", "bfloat16", "float16"]
GPTQ_BITS = (2, 4, 8)
PACKED = ("gptq", "awq")  # formats of codes alone
# Formats whose artifacts are written and verified; what is measured is the compressed-tensors one.
NOT_MEASURED = ("gptq", "awq", "safetensors")

# Formats that are a whole model for engines which read Hugging Face's layout.
WHOLE = ("compressed-tensors", "gptq", "awq", "safetensors")
MEDUSA_TGI = "medusa-tgi"  # Medusa heads as TGI loads them
SPECULATORS = ("medusa", MEDUSA_TGI, "speculators", "draft-model")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GPTQ(_Options):
    """Options of the format gptq."""

    checkpoint_format: Literal["auto", "gptq", "gptq_v2"] = Field(
        "auto",
        description="gptq stores zero points less one, and is read everywhere; gptq_v2 stores them "
        "as they are, which asymmetric grids need (GPTQModel reads it). auto: gptq for symmetric "
        "grids, gptq_v2 for others.",
    )


class Safetensors(_Options):
    """Options of the format safetensors."""

    dtype: DenseDtype = Field(
        "stored",
        description="Of the quantized linears, dequantized: that of the source, or one of these. "
        "float32 holds codes times scales exactly.",
    )


class GGUF(_Options):
    """Options of the format gguf."""

    embeddings: Literal["stored", "Q8_0"] = Field(
        "stored",
        description="Of quantized variants: as stored, or rounded to nearest in Q8_0 (8.5 bits a "
        "weight), together with the output layer where it is the same matrix. llama.cpp's own "
        "quantizer (llama_cpp) rounds them too. Quality figures are those of the embeddings as "
        "stored.",
    )


class Import(_Options):
    """A model that another tool quantized."""

    source: str = Field(
        min_length=1,
        description="Directory, .gguf file, Hub id (org/name) or package:NAME/FILE.gguf of a "
        "quantized form of the recipe's model. Paths are relative to the recipe.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")


def _engines() -> list[Engine]:
    return ["transformers", "gptqmodel", "llama.cpp"]


class Verify(_Options):
    """How every artifact is tried in what will load it."""

    engines: list[Engine] = Field(
        default_factory=_engines,
        min_length=1,
        description="What may be used. Of those that read a format, the best that is there is. "
        "vllm takes a minute to start for each artifact.",
        json_schema_extra={"default": ["transformers", "gptqmodel", "llama.cpp"]},
    )
    prompts: int = Field(4, ge=1, description="Built-in prompts that are continued.")
    tokens: int = Field(16, ge=1, description="Greedy tokens behind each.")
