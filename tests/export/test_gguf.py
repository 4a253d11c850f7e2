"""GGUF artifacts: what is written, read back by llama.cpp's own Python library and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from compressor.errors import RunError
from compressor.export import gguf
from compressor.export.gguf_model import Layout
from compressor.export.gguf_vocabulary import splitter
from compressor.models.architecture import CausalLM
from compressor.models.checkpoint import Checkpoint
from compressor.numerics import ggml
from compressor.numerics.ggml import round_to_q8_0, to_blocks
from compressor.numerics.quantized import QuantizedTensor
from compressor.numerics.scheme import Scheme, WeightScheme
from compressor.quantize import registry
from compressor.quantize.codes import iterate_quantized
from compressor.quantize.driver import quantize_model
from compressor.stages import quantized_model
from compressor.store import StoredStage
from tests import tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def quantize(source: Path, codes: Path, dtype: torch.dtype, **options: Any) -> None:
    cls = registry.get("rtn")
    algorithm = cls(cls.Options(**options), dtype)
    tokens = np.random.default_rng(0).integers(4, 300, (4, 32)).astype(np.int32)
    quantize_model(CausalLM.open(source), algorithm, codes, tokens=tokens)


def read(artifact: Path) -> dict[str, library.ReaderTensor]:
    return {t.name: t for t in library.GGUFReader(artifact / gguf.FILE).tensors}


def values(tensor: library.ReaderTensor) -> torch.Tensor:
    """What llama.cpp makes of a tensor: float32 in the order of the checkpoint's dimensions."""
    found = library.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(found.astype(np.float32))


def field(artifact: Path, key: str) -> Any:
    found = library.GGUFReader(artifact / gguf.FILE).fields.get(key)
    return None if found is None else found.contents()


GRIDS: list[tuple[dict[str, Any], Type]] = [
    ({"scheme": "W4A16", "group_size": 32}, Type.Q4_0),
    ({"scheme": "W4A16", "group_size": -1}, Type.Q4_0),
    ({"scheme": "W3A16", "group_size": 64}, Type.Q4_0),
    ({"scheme": "W4A16", "group_size": 32, "symmetric": False}, Type.Q4_1),
    ({"scheme": "W8A8"}, Type.Q8_0),
    ({"scheme": "W8A16", "group_size": 64}, Type.Q8_0),
    ({"scheme": "W6A16", "group_size": 32, "symmetric": False}, Type.Q8_0),
]


@pytest.mark.parametrize(("options", "kind"), GRIDS, ids=str)
def test_codes_are_carried_over(tmp_path: Path, options: dict[str, Any], kind: Type) -> None:
    """Scales are float16 here, so that symmetric grids must come out exactly."""
    source = tiny.build("llama", tmp_path / "model")
    quantize(source, tmp_path / "codes", torch.float16, **options)
    found = gguf.export(
        source, iterate_quantized(tmp_path / "codes"), {"tool": "compressor"}, tmp_path / "out"
    )
    layout, written = Layout(CausalLM.open(source).config), read(tmp_path / "out")
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        wanted = tensor.dequantize()
        order = layout.row_order(f"{name}.weight")
        stored = written[layout.name(f"{name}.weight")]
        assert stored.tensor_type == kind
        difference = (values(stored) - (wanted if order is None else wanted[order])).abs()
        if kind == Type.Q4_1:  # the product of scale and zero point has 15 bits, float16 has 11
            assert float((difference / tensor.scale.max()).max()) < 15 * 2**-11
        else:
            assert float(difference.max()) == 0
    assert found.types == {kind.name: 14} and not found.in_16_bits
    assert bool(found.rounded) == (kind == Type.Q4_1)
    kept = json.loads((tmp_path / "out" / "compression.json").read_text(encoding="utf-8"))
    assert kept["tool"] == "compressor" and kept["gguf"]["types"] == found.types
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.gguf", "compression.json", "SHA256SUMS", "tokenizer.json"} <= names
    assert field(tmp_path / "out", "general.file_type") == gguf._FILE_TYPES[kind]
    assert field(tmp_path / "out", "general.quantized_by") == "compressor"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    blocks=st.integers(1, 3),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    exponent=st.integers(-14, 3),
    seed=st.integers(0, 1000),
)
def test_blocks_mean_what_the_codes_mean(
    rows: int, groups: int, blocks: int, bits: int, symmetric: bool, exponent: int, seed: int
) -> None:
    """bfloat16 scales from 2^-14 on are exact; only the product in Q4_1 may be rounded."""
    random = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    columns = 32 * blocks * groups
    codes = torch.randint(low, high + 1, (rows, columns), generator=random, dtype=torch.int8)
    scale = ((1 + torch.rand((rows, groups), generator=random)) * 2.0**exponent).bfloat16().float()
    zero = torch.randint(low, high + 1, (rows, groups), generator=random, dtype=torch.int8)
    scheme = WeightScheme(bits, symmetric, "group", columns // groups)
    tensor = QuantizedTensor(codes, scale, None if symmetric else zero, None, scheme)
    found = to_blocks(tensor)
    if isinstance(found, str):
        assert bits == 8 and not symmetric and "beyond 8 bits" in found
        return
    back = torch.from_numpy(library.quants.dequantize(found.data, found.type))
    error = (back - tensor.dequantize()).abs() / scale.repeat_interleave(32 * blocks, dim=1)
    assert float(error.max()) == pytest.approx(found.error, abs=1e-7)
    assert found.error == 0 or (found.type == Type.Q4_1 and found.error <= 15 * 2**-11)


def test_scales_too_small_for_float16_are_not_rounded_away(tmp_path: Path) -> None:
    codes = torch.tensor([[-8, 7] * 16], dtype=torch.int8)
    scheme = WeightScheme(4, True, "group", 32)
    for scale, fits in ((2.0**-17, True), (1.7 * 2.0**-24, False), (1e5, False)):
        found = to_blocks(QuantizedTensor(codes, torch.tensor([[scale]]), None, None, scheme))
        assert isinstance(found, str) != fits
        assert fits or "too far from float16" in str(found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "FP8"}, "8-bit floating point"),
        ({"scheme": "W4A16", "group_size": 16}, "groups of 16 columns"),
    ],
    ids=str,
)
def test_what_no_block_holds_is_written_in_16_bits(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    source = tiny.build("llama", tmp_path / "model", layers=1)
    quantize(source, tmp_path / "codes", torch.bfloat16, **options)
    found = gguf.export(source, iterate_quantized(tmp_path / "codes"), {}, tmp_path / "out")
    assert found.types == {"F16": 7} and len(found.in_16_bits) == 7
    assert all(reason in why for why in found.in_16_bits.values())
    layout, written = Layout(CausalLM.open(source).config), read(tmp_path / "out")
    for name, tensor, _ in iterate_quantized(tmp_path / "codes"):
        order = layout.row_order(f"{name}.weight")
        wanted = tensor.dequantize() if order is None else tensor.dequantize()[order]
        assert torch.equal(values(written[layout.name(f"{name}.weight")]), wanted.half().float())


def load_by_transformers(artifact: Path) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        artifact, gguf_file=gguf.FILE, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("scheme", [None, "W4A16"])
def test_transformers_computes_the_same_from_the_file(
    tmp_path: Path, arch: str, scheme: str | None
) -> None:
    # transformers reads no head size of qwen3 from a file, and takes 128.
    own = {"head_dim": 128} if arch == "qwen3" else {}
    source = tiny.build(arch, tmp_path / "model", max_position_embeddings=8, **own)
    codes = tmp_path / "codes"
    if scheme:
        quantize(source, codes, torch.float16, scheme=scheme, group_size=32)
        stored = StoredStage("", codes, {"result": {}})
        ours = quantized_model(source, stored, "cpu")
    else:
        ours = CausalLM.open(source).load_full(torch.float32)
    gguf.export(source, iterate_quantized(codes) if scheme else (), {}, tmp_path / "out")
    theirs = load_by_transformers(tmp_path / "out")
    ids = torch.arange(5, 13).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


def test_equal_inputs_give_equal_bytes_and_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    source = tiny.build("qwen2", tmp_path / "model")
    quantize(source, tmp_path / "codes", torch.bfloat16, scheme="W8A8")
    for name in ("one", "two"):
        gguf.export(source, iterate_quantized(tmp_path / "codes"), {}, tmp_path / name)
    assert len({(tmp_path / n / "SHA256SUMS").read_bytes() for n in ("one", "two")}) == 1
    schemes = {name: s.name for name, _, s in iterate_quantized(tmp_path / "codes")}
    ledger = gguf.compare_tensors(source, tmp_path / "one", schemes)
    assert not ledger.missing and not ledger.added
    assert set(ledger.bytes_by_scheme) == {"W8A8, Q8_0", "F32"}
    description = field(tmp_path / "one", "general.description")
    assert "llama.cpp rounds activations" in description


def test_dtypes_and_names_of_what_is_not_quantized(tmp_path: Path) -> None:
    source = tiny.build("qwen3", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    state = {k: v.bfloat16() for k, v in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    gguf.export(source, (), {}, tmp_path / "out")
    written, layout = read(tmp_path / "out"), Layout(CausalLM.open(source).config)
    for key in Checkpoint(source).names:
        tensor = written[layout.name(key)]
        assert tensor.tensor_type == (Type.F32 if state[key].ndim == 1 else Type.BF16)
        assert torch.equal(values(tensor), state[key].float())
    assert field(tmp_path / "out", "general.file_type") == library.LlamaFileType.MOSTLY_BF16
    assert field(tmp_path / "out", "qwen3.attention.key_length") == 32
    assert field(tmp_path / "out", "general.quantized_by") is None


def test_a_quantized_head_no_longer_shares_the_embeddings(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "model", layers=1)
    weight = torch.randn(tiny.VOCABULARY, tiny.HIDDEN)
    scale = (weight.abs().amax(1, keepdim=True) / 127).half().float()
    codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    tensor = QuantizedTensor(codes, scale, None, None, WeightScheme(8))
    found = [("lm_head", tensor, Scheme.parse("W8A16"))]
    gguf.export(source, found, {}, tmp_path / "out", head="lm_head")
    written = read(tmp_path / "out")
    assert torch.equal(values(written["output.weight"]), tensor.dequantize())
    assert written["token_embd.weight"].tensor_type == Type.F32
    ledger = gguf.compare_tensors(source, tmp_path / "out", {"lm_head": "W8A16"})
    assert not ledger.missing and not ledger.added


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5), blocks=st.integers(1, 3), exponent=st.integers(-8, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_rounding_to_q8_0_is_the_librarys_and_to_the_nearest_value(
    rows: int, blocks: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = (torch.randn((rows, 32 * blocks), generator=random) * 2.0**exponent).to(dtype)
    weight[0, :32] = 0  # a block without a scale
    found = round_to_q8_0(weight)
    assert not isinstance(found, str)
    data, error = found
    assert np.array_equal(data, library.quants.quantize(weight.float().numpy(), Type.Q8_0))
    back = torch.from_numpy(library.quants.dequantize(data, Type.Q8_0))
    steps = weight.float().view(rows, blocks, 32).abs().amax(-1, keepdim=True) / 127
    # Half of a step, and what float16 rounds off a scale: 2^-11 of 127 steps.
    off = (back - weight.float()).view(rows, blocks, 32).abs()
    assert bool((off <= steps * (0.5 + 127 * 2**-11) + 2.0**-24 * 127).all())
    size = float(weight.float().norm())
    assert error == pytest.approx(float((back - weight.float()).norm()) / size if size else 0.0)


def test_rounding_goes_by_parts_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 64)
    whole = round_to_q8_0(weight)
    monkeypatch.setattr(ggml, "_ROWS", 32)
    parts = round_to_q8_0(weight)
    assert not isinstance(whole, str) and not isinstance(parts, str)
    assert np.array_equal(whole[0], parts[0]) and whole[1] == pytest.approx(parts[1])
    assert "48 columns" in str(round_to_q8_0(torch.randn(2, 48)))
    assert "float16" in str(round_to_q8_0(torch.full((1, 32), 1e9)))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_embeddings_are_rounded_when_asked_and_nothing_else_changes(
    tmp_path: Path, arch: str
) -> None:
    """llama's output layer is its embeddings, qwen2's is a matrix of its own."""
    source, codes = tiny.build(arch, tmp_path / "model"), tmp_path / "codes"
    quantize(source, codes, torch.float16, scheme="W4A16", group_size=32)
    gguf.export(source, iterate_quantized(codes), {}, tmp_path / "plain")
    found = gguf.export(source, iterate_quantized(codes), {}, tmp_path / "out", embeddings="Q8_0")
    plain, made = read(tmp_path / "plain"), read(tmp_path / "out")
    assert set(plain) == set(made) and ("output.weight" in made) is (arch == "qwen2")
    for name, tensor in plain.items():
        if name == "token_embd.weight":
            assert made[name].tensor_type == Type.Q8_0
            wanted = library.quants.quantize(values(tensor).numpy(), Type.Q8_0)
            assert np.array_equal(made[name].data, wanted)
            off = values(made[name]) - values(tensor)
            error = float(off.norm() / values(tensor).norm())
            assert 0 < error < 0.01
        else:
            assert made[name].tensor_type == tensor.tensor_type
            assert np.array_equal(made[name].data, tensor.data)
    assert found.embeddings == {"type": "Q8_0", "error": pytest.approx(error, abs=1e-6)}
    kept = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert kept["gguf"]["embeddings"] == found.embeddings
    assert "no evaluation of the codes sees" in field(tmp_path / "out", "general.description")
    sizes = [(tmp_path / name / gguf.FILE).stat().st_size for name in ("plain", "out")]
    assert sizes[0] - sizes[1] == pytest.approx(tiny.VOCABULARY * tiny.HIDDEN * 94 / 32, abs=300)
    names = {name: "W4A16" for name, _, _ in iterate_quantized(codes)}
    ledger = gguf.compare_tensors(source, tmp_path / "out", names)
    assert not ledger.missing and not ledger.added
    assert ledger.bytes_by_scheme["Q8_0"] == tiny.VOCABULARY * tiny.HIDDEN * 34 / 32
    assert (
        "embeddings"
        not in json.loads((tmp_path / "plain" / "compression.json").read_text())["gguf"]
    )


def test_transformers_computes_with_the_rounded_embeddings(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "model", max_position_embeddings=8)
    gguf.export(source, (), {}, tmp_path / "out", embeddings="Q8_0")
    ours = CausalLM.open(source).load_full(torch.float32)
    ids = torch.arange(5, 13).unsqueeze(0)
    with torch.no_grad():
        before = ours(ids).logits
        ours.get_input_embeddings().weight.copy_(
            values(read(tmp_path / "out")["token_embd.weight"])
        )
        wanted = ours(ids).logits
        found = load_by_transformers(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((before - wanted).abs().max()) > 1e-3


def test_embeddings_that_blocks_cannot_hold_stay_and_a_note_says_so(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "model", layers=1, hidden_size=48)
    found = gguf.export(source, (), {}, tmp_path / "out", embeddings="Q8_0")
    assert read(tmp_path / "out")["token_embd.weight"].tensor_type == Type.F32
    assert found.embeddings is None and "48 columns are not whole blocks" in found.notes[0]


def test_columns_grouped_by_activation_order_are_refused(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "model", layers=1)
    scheme = Scheme.parse("W4A16", group_size=32)
    tensor = QuantizedTensor(
        torch.zeros(tiny.HIDDEN, tiny.HIDDEN, dtype=torch.int8), torch.ones(tiny.HIDDEN, 2), None,
        torch.arange(tiny.HIDDEN, dtype=torch.int32) % 2, scheme.weights,
    )  # fmt: skip
    with pytest.raises(RunError, match="static_groups"):
        gguf.export(
            source, [("model.layers.0.self_attn.q_proj", tensor, scheme)], {}, tmp_path / "out"
        )


@pytest.mark.parametrize(
    ("arch", "changes", "match"),
    [
        ("gemma2", {}, "models of type gemma2"),
        ("mixtral", {}, "models of type mixtral"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "type 'dynamic'"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
         "original_max_position_embeddings": 256, "attention_factor": 1.0}}, "attention_factor"),
    ],
    ids=str,
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, arch: str, changes: dict[str, Any], match: str
) -> None:
    source = tiny.build(arch, tmp_path / "model", layers=1, **changes)
    with pytest.raises(RunError, match=match):
        gguf.export(source, (), {}, tmp_path / "out")


def test_a_window_of_attention_limits_the_context(tmp_path: Path) -> None:
    source = tiny.build("mistral", tmp_path / "model", layers=1)
    assert Layout(CausalLM.open(source).config).context_length == 8


def test_llama3_frequencies_are_divided_as_transformers_divides_them(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = tiny.build("llama", tmp_path / "model", layers=1, rope_parameters=rope)
    gguf.export(source, (), {}, tmp_path / "out")
    factors = values(read(tmp_path / "out")["rope_freqs.weight"])
    model = CausalLM.open(source).load_full(torch.float32)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert len(set(factors.tolist())) > 2


def test_the_tokenizer_is_carried_over(tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "model", layers=1, vocab_size=tiny.VOCABULARY + 3)
    gguf.export(source, (), {}, tmp_path / "out")
    out = tmp_path / "out"
    tokens, types = field(out, "tokenizer.ggml.tokens"), field(out, "tokenizer.ggml.token_type")
    vocabulary = tiny.tokenizer().get_vocab()
    assert all(tokens[index] == token for token, index in vocabulary.items())
    assert tokens[-1] == f"[PAD{tiny.VOCABULARY + 2}]" and types[-1] == library.TokenType.UNUSED
    assert types[:4] == [3, 3, 3, 1]
    assert field(out, "tokenizer.ggml.model") == "gpt2"
    assert field(out, "tokenizer.ggml.pre") == "gpt-2"
    assert field(out, "tokenizer.ggml.eos_token_id") == 2
    assert field(out, "tokenizer.ggml.add_bos_token") is False
    assert field(out, "tokenizer.chat_template") == tiny.tokenizer().chat_template
    merges = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert field(out, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]


def split(*steps: Any) -> dict[str, Any]:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return json.loads(core.to_str())


def test_splitters_are_told_apart_by_their_steps(tmp_path: Path) -> None:
    tokenizer, where = tiny.tokenizer(), tmp_path / "tokenizer.json"
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert splitter(split(digits, level), tokenizer, where) == "smollm"
    assert splitter(split(level), tokenizer, where) == "gpt-2"
    from tokenizers import Regex

    from compressor.export.gguf_vocabulary import _QWEN2

    qwen = pre_tokenizers.Split(Regex(_QWEN2), "isolated", invert=False)
    assert splitter(split(qwen, bare), tokenizer, where) == "qwen2"
    with pytest.raises(RunError, match="no tokenizer"):
        splitter(split(pre_tokenizers.Whitespace()), tokenizer, where)


def test_sentencepiece_scores_follow_the_merges(tmp_path: Path) -> None:
    """A tokenizer.json of SentencePiece's kind: llama.cpp merges the pair of highest score."""
    from transformers import PreTrainedTokenizerFast

    source = tiny.build("llama", tmp_path / "model", layers=1)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "ab")]
    core = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(source)
    gguf.export(source, (), {}, tmp_path / "out")
    out = tmp_path / "out"
    assert field(out, "tokenizer.ggml.model") == "llama"
    assert field(out, "tokenizer.ggml.add_space_prefix") is True
    tokens, scores = field(out, "tokenizer.ggml.tokens"), field(out, "tokenizer.ggml.scores")
    types = field(out, "tokenizer.ggml.token_type")
    of = dict(zip(tokens, scores, strict=True))
    assert of["ab"] == 0 and of["▁ab"] == -1 and of["a"] < -1000
    assert types[0] == library.TokenType.UNKNOWN and types[3] == library.TokenType.BYTE
