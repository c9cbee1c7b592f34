"""A tokenizer as llama.cpp reads it from a GGUF file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.gguf_arch import gguf_library
from mlx_edgelora.model.checkpoint import error_text

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the regular expressions that split a text before BPE.
_BY_PATTERN = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}


def write_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Write a tokenizer, its special tokens and the chat template to a `GGUFWriter`.

    Args:
        writer: the writer.
        folder: the model's folder.
        size: number of rows of the embedding; ids without a token become unused ones.

    Raises:
        EdgeLoraError: llama.cpp has no tokenizer of this kind, or it is not known here.
    """
    gguf = gguf_library()
    if (folder / "tokenizer.model").exists():
        vocabulary = gguf.SentencePieceVocab(folder)
        tokens = list(vocabulary.all_tokens())
        scores = [score for _, score, _ in tokens]
        pairs = [(text, kind) for text, _, kind in tokens]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
    else:
        tokenizer = _read(folder / "tokenizer.json")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(folder, tokenizer))
        pairs, scores = list(_byte_level_tokens(tokenizer, size)), None
    if len(pairs) > size:
        raise EdgeLoraError(
            f"{folder}: the tokenizer has {len(pairs)} tokens, expected at most the {size} rows of "
            "the embedding; use the tokenizer of this model"
        )
    missing = range(len(pairs), size)
    pairs += [(f"[PAD{number}]", gguf.TokenType.UNUSED) for number in missing]
    writer.add_token_list([text for text, _ in pairs])
    writer.add_token_types([kind for _, kind in pairs])
    if scores is not None:
        writer.add_token_scores(scores + [-10000.0] * len(missing))
    special = gguf.SpecialVocab(folder, load_merges=scores is None, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        tokenizer = json.loads(path.read_bytes())
        if not isinstance(tokenizer["model"]["type"], str):
            raise ValueError("no type")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(
            f"{path}: is not a tokenizer ({error_text(error)}), expected tokenizer.json or "
            "tokenizer.model; download the model again"
        ) from error
    return tokenizer


def _splitter(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE tokenizer splits a text."""
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if tokenizer["model"]["type"] == "BPE" and kinds and kinds[-1] == "ByteLevel":
        whole = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and whole:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and whole and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not whole:
            name = _BY_PATTERN.get(steps[0].get("pattern", {}).get("Regex"))
            if name is not None:
                return name
    raise EdgeLoraError(
        f"{folder}: llama.cpp's name of this tokenizer is not known here "
        f"({tokenizer['model']['type']}, {kinds}), expected SentencePiece or a byte-level BPE as "
        "in GPT-2, Llama 3, Qwen or SmolLM; convert it with llama.cpp's converter"
    )


def _byte_level_tokens(tokenizer: dict[str, Any], size: int) -> Iterator[tuple[str, int]]:
    kinds = gguf_library().TokenType
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    for number in range(max([*texts, *added]) + 1):
        if number in added:
            special = added[number].get("special")
            yield added[number]["content"], kinds.CONTROL if special else kinds.USER_DEFINED
        elif number in texts:
            yield texts[number], kinds.NORMAL
        else:
            yield f"[PAD{number}]", kinds.UNUSED
