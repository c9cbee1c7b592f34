"""A model's tokenizer, loaded by mlx-lm; its own code is never run."""

from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_edgelora.errors import EdgeLoraError, shown
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel, error_text

# One of these holds the words of any tokenizer; without one transformers makes up an empty one.
FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
# Limit of these files, in bytes. The largest known have 35 MB.
SMALL_FILES, MOST_BYTES = ("tokenizer.json", "tokenizer_config.json"), 200_000_000
# Without an explicit no, transformers asks on standard input whether a tokenizer's code shall run.
NO_CODE = {"trust_remote_code": False}


def load_tokenizer_of(lazy: LazyModel) -> TokenizerWrapper:
    """The tokenizer in a model's folder.

    Raises:
        EdgeLoraError: there is none, or it cannot be loaded without code of its own.
    """
    return tokenizer_in(lazy.source, lazy.config.get("eos_token_id"))


def tokenizer_in(path: Path, eos_token_ids: int | list[int] | None = None) -> TokenizerWrapper:
    """The tokenizer in a folder; arguments and errors as in `load_tokenizer_of`."""
    if not any(found for pattern in FILES for found in path.glob(pattern)):
        raise EdgeLoraError(
            f"{path}: has no tokenizer, expected a file such as tokenizer.json; "
            "download the model again"
        )
    for name in SMALL_FILES:
        file = path / name
        if file.exists() and (not file.is_file() or file.stat().st_size > MOST_BYTES):
            raise EdgeLoraError(
                f"{file}: is no file of at most {size(MOST_BYTES)}; download the model again"
            )
    try:
        ids = _checked_ids(path, eos_token_ids)
        found = load_tokenizer(path, dict(NO_CODE), eos_token_ids=ids)
        # Some damage only shows in use, such as an unknown token that is unknown itself.
        found.decode(found.encode("a b"))
        for name in ("eos", "unk", "bos", "pad"):
            getattr(found, f"{name}_token_id", None)
        return found
    except (EdgeLoraError, KeyboardInterrupt):
        raise
    # The package tokenizers raises bare exceptions, and panics of Rust are BaseExceptions.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EdgeLoraError(
            f"{path}: the tokenizer cannot be loaded ({error_text(error)}); download the model "
            "again"
        ) from error


def _checked_ids(path: Path, ids: object) -> object:
    """The ids of the tokens that end a text, as config.json gives them."""
    numbers = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise EdgeLoraError(
            f"{path / 'config.json'}: eos_token_id is {shown(ids)}, expected a token's number or a "
            "list of them; download the model again"
        )
    return ids
