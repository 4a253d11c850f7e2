"""A tokenizer as GGUF's metadata, so that llama.cpp makes of a text the tokens that it makes here.

llama.cpp knows two kinds that Llama-layout models have: ``gpt2`` (byte-level BPE, with the name of
the splitter that runs before it) and ``llama`` (SentencePiece's BPE, whose scores say which merge
goes first). Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The rules are those of
llama.cpp's convert_hf_to_gguf.py (conversion/base.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from compressor.errors import RunError

# llama.cpp tells splitters apart by the tokens that this text becomes.
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
# SHA-256 of those tokens, of the families that are exported here (conversion/base.py,
# get_vocab_base_pre, llama.cpp 0.5.0).
_HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_LLAMA3 = f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = f"{_CONTRACTIONS}{_WORDS}\\p{{N}}|{_REST}"
_TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|"
    "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# The splitters themselves, for vocabularies that no hash names: the regular expressions that stand
# beside these names in llama.cpp (src/llama-vocab.cpp, llm_tokenizer_bpe), and whether words that
# are tokens as a whole skip the merges.
_SPLITTERS = {
    (("digits", "bytes"), False): "smollm",
    (("bytes",), False): "gpt-2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_UNUSED_SCORE = -10000.0  # of tokens that no text becomes, as llama.cpp writes it
_ADDED_SCORE = -1000.0


def add_vocabulary(writer: GGUFWriter, directory: Path, size: int) -> None:
    """Add the tokenizer's metadata: tokens, merges or scores, special tokens, chat template.

    Args:
        writer: of the file.
        directory: holds the tokenizer (tokenizer.json, or tokenizer.model).
        size: number of embeddings: tokens that the tokenizer lacks are filled in as unused.

    Raises:
        RunError: llama.cpp has no tokenizer of this kind.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    file = directory / "tokenizer.json"
    # As transformers runs it: for some families it puts its own splitter in the file's place.
    parsed = json.loads(tokenizer.backend_tokenizer.to_str()) if file.is_file() else {}
    model = parsed.get("model", {})
    merges = False
    if (directory / "tokenizer.model").is_file():
        _sentencepiece(writer, directory, tokenizer, size)
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        _json_pieces(writer, parsed, tokenizer, size, file)
    elif model.get("type") == "BPE":
        _byte_level(writer, parsed, tokenizer, size, file)
        merges = True
    else:
        raise _refusal(f"a tokenizer of type {model.get('type')!r}", file)
    with _quiet():
        special = SpecialVocab(directory, load_merges=merges, n_vocab=size)
        special.add_special_token = _added_tokens(tokenizer)
        special.add_to_gguf(writer, quiet=True)


def _byte_level(
    writer: GGUFWriter, parsed: dict[str, Any], tokenizer: Any, size: int, where: Path
) -> None:
    tokens, types, _ = _tokens(tokenizer, size, where)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(parsed, tokenizer, where))
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def splitter(parsed: dict[str, Any], tokenizer: Any, where: Path) -> str:
    """llama.cpp's name for what splits a text before byte-level BPE.

    Args:
        parsed: tokenizer.json.
        tokenizer: the same, loaded by transformers.
        where: the file, for errors.

    Raises:
        RunError: llama.cpp's name for it is not known here.
    """
    digest = sha256(str(tokenizer.encode(_PROBE)).encode()).hexdigest()
    if digest in _HASHES:
        return _HASHES[digest]
    parts = parsed.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts]) if parts.get("type") == "Sequence" else [parts]
    key = (tuple(_steps(steps)), bool(parsed["model"].get("ignore_merges")))
    if key not in _SPLITTERS:
        raise _refusal(f"the splitter of this tokenizer ({json.dumps(parts)[:200]})", where)
    return _SPLITTERS[key]


def _steps(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    for step in steps:
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits"):
            yield "digits"
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            yield step.get("pattern", {}).get("Regex", "")
        elif kind != "ByteLevel" or step.get("add_prefix_space"):
            yield f"{kind}"
        elif step.get("use_regex", True):
            yield "bytes"


def _json_pieces(
    writer: GGUFWriter, parsed: dict[str, Any], tokenizer: Any, size: int, where: Path
) -> None:
    """SentencePiece's BPE that is there as tokenizer.json only: scores from the order of merges."""
    scores: dict[str, float] = {}
    last = None
    for rank, pair in enumerate(parsed["model"]["merges"]):
        piece = "".join(pair.split(" ") if isinstance(pair, str) else pair)
        if piece != last and piece in scores:
            raise _refusal("merges in an order that no scores give", where)
        scores.setdefault(piece, -float(rank))
        last = piece
    tokens, types, ids = _tokens(tokenizer, size, where)
    for name, index in ids.items():
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            types[index] = TokenType.BYTE
    unknown = ids.get(parsed["model"].get("unk_token") or "")
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    normalizer = json.dumps(parsed.get("normalizer"))
    pre_tokenizer = parsed.get("pre_tokenizer") or {}
    prefix = '"Prepend"' in normalizer or (
        pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") != "never"
    )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, _UNUSED_SCORE) for token in tokens])
    writer.add_token_types(types)


def _sentencepiece(writer: GGUFWriter, directory: Path, tokenizer: Any, size: int) -> None:
    """SentencePiece's own file, which holds pieces with their scores and kinds."""
    from sentencepiece import SentencePieceProcessor

    path = directory / "tokenizer.model"
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise _refusal("a tokenizer.model that is not SentencePiece's", path) from error
    tokens = [f"[PAD{i}]" for i in range(size)]
    scores = [_UNUSED_SCORE] * size
    types = [int(TokenType.UNUSED)] * size
    for index in range(min(size, pieces.GetPieceSize())):
        tokens[index], scores[index] = pieces.IdToPiece(index), pieces.GetScore(index)
        types[index] = (
            TokenType.UNKNOWN if pieces.IsUnknown(index)
            else TokenType.CONTROL if pieces.IsControl(index)
            else TokenType.UNUSED if pieces.IsUnused(index)
            else TokenType.BYTE if pieces.IsByte(index)
            else TokenType.NORMAL
        )  # fmt: skip
    for index, token in tokenizer.added_tokens_decoder.items():
        if index >= size:
            continue
        if types[index] not in (TokenType.UNKNOWN, TokenType.CONTROL):
            types[index], tokens[index] = _added(token)
            scores[index] = _ADDED_SCORE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    prefix = getattr(tokenizer, "add_prefix_space", None)
    if isinstance(prefix, bool):
        writer.add_add_space_prefix(prefix)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)


def _tokens(tokenizer: Any, size: int, where: Path) -> tuple[list[str], list[int], dict[str, int]]:
    """Text and kind of every token by its id, and the tokenizer's own ids by text."""
    known = _names(json.loads(where.read_text(encoding="utf-8")))
    # transformers adds tokens of its own that the file lacks: those without an embedding are none.
    ids = {t: i for t, i in tokenizer.get_vocab().items() if i < size or t in known}
    if max(ids.values()) >= size:
        raise RunError(
            f"the tokenizer has token {max(ids.values())}, the model only {size} embeddings",
            where=str(where),
            fix="tokenizer and weights do not belong together: download both again",
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    added = tokenizer.added_tokens_decoder
    for token, index in ids.items():
        tokens[index], types[index] = token, TokenType.NORMAL
        if index in added:
            types[index], tokens[index] = _added(added[index])
    return tokens, types, ids


def _names(parsed: dict[str, Any]) -> set[str]:
    """Every token of a tokenizer.json whose model has a vocabulary by name."""
    return set(parsed["model"]["vocab"]) | {one["content"] for one in parsed["added_tokens"]}


def _added(token: Any) -> tuple[int, str]:
    """Kind and text of a token that is cut out of a text before all else."""
    text = token.content
    looks_special = (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or text in ("<pad>", "<mask>")
    )
    if token.special or looks_special:
        return TokenType.CONTROL, text
    return TokenType.USER_DEFINED, text.replace(_SPACE, " ")


def _added_tokens(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last special token around a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else whole
    return {
        "bos": tokenizer.bos_token_id is not None and start[:1] == [tokenizer.bos_token_id]
        and len(whole) > len(plain),
        "eos": tokenizer.eos_token_id is not None and len(whole) > len(plain)
        and whole[-1] == tokenizer.eos_token_id,
    }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's notes on files that are not there."""
    logger = logging.getLogger("gguf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refusal(what: str, where: Path) -> RunError:
    return RunError(
        f"llama.cpp has no tokenizer for {what}",
        where=str(where),
        fix="remove gguf from `export:`",
    )
