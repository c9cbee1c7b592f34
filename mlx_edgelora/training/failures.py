"""Explain failures of the machine: memory, buffers or the GPU's time ran out."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_edgelora.errors import EdgeLoraError, is_killed
from mlx_edgelora.model.checkpoint import error_text


def explain(error: RuntimeError | MemoryError) -> str | None:
    """Explain an error and what to do about it; None for an error of another kind.

    MLX raises one type of exception for all of these, with messages as short as `[malloc]`.
    """
    text = str(error)
    if "Resource limit" in text:
        return (
            f"MLX holds more buffers than the system allows ({error_text(error)}); lower "
            "memory_budget, so that fewer blocks are in memory at once, or max_seq_length"
        )
    if isinstance(error, MemoryError) or "malloc" in text or "memory" in text.lower():
        return (
            f"out of memory ({error_text(error)}); lower batch_size or max_seq_length, or close "
            "other programs"
        )
    if is_killed(error):
        return (
            f"macOS ended a computation on the GPU, which kept the display waiting or took too "
            f"long ({error_text(error)}); let the display sleep while caffeinate keeps the Mac "
            "awake, lower max_seq_length or batch_size, or leave the GPU time for the display with "
            "--duty 0.5"
        )
    return None


@contextmanager
def explain_failures(on_disk: str) -> Iterator[None]:
    """Raise an `EdgeLoraError` in place of an error that `explain` knows.

    Args:
        on_disk: which files are on disk, for the end of the message.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (message := explain(error)) is None:
            raise
        raise EdgeLoraError(f"{message}; {on_disk}") from error
