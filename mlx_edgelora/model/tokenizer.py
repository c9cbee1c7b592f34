"""A model's tokenizer, loaded by mlx-lm; its own code is never run."""

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import LazyModel, error_text

# One of these holds the words of any tokenizer; without one transformers makes up an empty one.
FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def load_tokenizer_of(lazy: LazyModel) -> TokenizerWrapper:
    """The tokenizer in a model's folder.

    Raises:
        EdgeLoraError: there is none, or it cannot be loaded without code of its own.
    """
    path = lazy.source
    if not any(found for pattern in FILES for found in path.glob(pattern)):
        raise EdgeLoraError(
            f"{path}: has no tokenizer, expected a file such as tokenizer.json; "
            "download the model again"
        )
    # Without an explicit no, transformers would ask on standard input.
    extra = {"trust_remote_code": False}
    try:
        return load_tokenizer(path, extra, eos_token_ids=lazy.config.get("eos_token_id"))
    except Exception as error:  # bare ones are what the package tokenizers raises
        raise EdgeLoraError(
            f"{path}: the tokenizer cannot be loaded ({error_text(error)}); download the model "
            "again"
        ) from error
