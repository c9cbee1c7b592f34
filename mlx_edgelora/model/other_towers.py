"""Find the tensors of a checkpoint that mlx-lm leaves out: those of vision and audio towers.

mlx-lm's models are language models. Their `sanitize` drops what other parts of a checkpoint need,
so a run never reads these tensors. A merged model keeps them.
"""

from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx

from mlx_edgelora.blocks.checks import MODEL_ERRORS

Arrays = Mapping[str, mx.array]
Sanitize = Callable[[dict[str, mx.array]], dict[str, mx.array]]
# A tower is a module of the model, or of its `model`.
DEPTH = 2


def unchanged(weights: Arrays, sanitized: Arrays) -> set[str]:
    """The names of the tensors that `sanitize` passed on as they are."""
    kept = {id(array) for array in sanitized.values()}
    return {name for name, array in weights.items() if id(array) in kept}


def other_towers(
    weights: Arrays, used: set[str], parameters: set[str], sanitize: Sanitize
) -> list[str]:
    """The names of the tensors of whole modules that `sanitize` drops; nothing is evaluated.

    Args:
        weights: the tensors of a checkpoint.
        used: see `unchanged`.
        parameters: the names that `sanitize` gave them.
        sanitize: the model's method.
    """
    modules: dict[str, list[str]] = {}
    for name in weights:
        if name not in used and (module := _module(name, used)):
            modules.setdefault(module, []).append(name)
    found: list[str] = []
    for names in modules.values():
        left = {name: array for name, array in weights.items() if name not in names}
        try:
            is_dropped = sanitize(left).keys() == parameters
        except MODEL_ERRORS:  # it is computed with
            is_dropped = False
        if is_dropped:
            found += names
    return found


def _module(name: str, used: Iterable[str]) -> str | None:
    """The shortest path above a tensor that no tensor in use has; None if it is too long."""
    parts = name.split(".")
    for count in range(1, min(DEPTH, len(parts) - 1) + 1):
        path = ".".join(parts[:count]) + "."
        if not any(other.startswith(path) for other in used):
            return path
    return None
