"""What a recipe says of each format. No torch here: the recipe is read without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GPTQFormat = Literal["gptq", "gptq_v2"]
# What llama-quantize makes of a model, by its own names; `codes` carries ours over.
GGUFType = Literal[
    "codes", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS",
    "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
]  # fmt: skip
# llama-quantize refuses to make these without an importance matrix.
NEED_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ2_S")
Engine = Literal["transformers", "gptqmodel", "vllm", "llama.cpp", "onnxruntime"]
DenseDtype = Literal["stored", "float32", "bfloat16", "float16"]
GPTQ_BITS = (2, 4, 8)
# Formats whose artifacts are written and verified; what is measured is the compressed-tensors one.
NOT_MEASURED = ("gptq", "awq", "safetensors", "onnx")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GPTQ(_Options):
    """Options of the format gptq."""

    checkpoint_format: GPTQFormat = Field(
        "gptq",
        description="gptq stores zero points less one, and is read everywhere; gptq_v2 stores them "
        "as they are, which some asymmetric grids need (GPTQModel reads it).",
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

    type: GGUFType = Field(
        "codes",
        description="codes: the variant's own codes, exactly, in Q4_0, Q4_1 or Q8_0. Others: the "
        "variant's weights, dequantized, are quantized anew by llama.cpp's own quantizer "
        "(llama-quantize); quality figures are those of the codes. K-quants and finer ones.",
    )
    imatrix: bool = Field(
        False,
        description="With a type of llama-quantize: weigh columns by an importance matrix, the "
        "mean squared input of every linear over the calibration text.",
    )
    embeddings: Literal["stored", "Q8_0"] = Field(
        "stored",
        description="Of quantized variants, with type codes: as stored, or rounded to nearest in "
        "Q8_0 (8.5 bits a weight), together with the output layer where it is the same matrix. "
        "llama.cpp's own quantizer rounds them too. Quality figures are those of the embeddings as "
        "stored.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> GGUF:
        if self.type == "codes" and self.imatrix:
            raise ValueError("`imatrix` needs a type of llama-quantize, such as Q4_K_M")
        if self.type != "codes" and self.embeddings != "stored":
            raise ValueError("`embeddings` goes with type codes: llama-quantize chooses by itself")
        if self.type in NEED_IMATRIX and not self.imatrix:
            raise ValueError(f"llama-quantize makes {self.type} only with `imatrix: true`")
        return self


class Import(_Options):
    """A model that another tool quantized."""

    source: str = Field(
        min_length=1,
        description="Directory, .gguf file, Hub id (org/name) or package:NAME/FILE.gguf of a "
        "quantized form of the recipe's model. Paths are relative to the recipe.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")


class Verify(_Options):
    """How every artifact is tried in what will load it."""

    engines: list[Engine] = Field(
        default_factory=lambda: ["transformers", "gptqmodel", "llama.cpp", "onnxruntime"],
        min_length=1,
        description="Which may be used; the first of these that reads the format and is there "
        "is. vllm takes a minute to start for each artifact.",
        json_schema_extra={"default": ["transformers", "gptqmodel", "llama.cpp", "onnxruntime"]},
    )
    prompts: int = Field(4, ge=1, description="Built-in prompts that are continued.")
    tokens: int = Field(16, ge=1, description="Greedy tokens behind each.")
