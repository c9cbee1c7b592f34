"""The one place where attention of mlx-lm's models is exchanged: for a while, and undone.

Every architecture of mlx-lm that has standard attention calls one function,
`mlx_lm.models.base.scaled_dot_product_attention`, which it imported by name. So it is
replaced wherever a loaded module holds it. An architecture with attention of its own
never calls it and is not touched: who relies on the replacement must see that it is called.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.models import base

# (queries [B, H, Tq, D], keys [B, Hkv, Tk, D], values [B, Hkv, Tk, Dv], cache, scale, mask,
# sinks=None) -> [B, H, Tq, Dv]; the last four by position or by name.
Attention = Callable[..., mx.array]
PACKAGE = "mlx_lm.models."


@contextmanager
def attention_replaced(function: Callable[..., mx.array]) -> Iterator[None]:
    """Let mlx-lm's architectures call `function` as their attention; undone on exit, on error too.

    Contexts nest: the inner function is given the outer one as what it replaces. They are
    for one thread: every model of the process sees the replacement.

    Args:
        function: called as `function(original, queries, keys, values, ...)`, with whatever
            mlx-lm gives `scaled_dot_product_attention` behind `original`, which is the
            function that stood there before.
    """
    original = base.scaled_dot_product_attention

    def replacement(*args: object, **kwargs: object) -> mx.array:
        return function(original, *args, **kwargs)

    _exchange(original, replacement)
    try:
        yield
    finally:
        # Looked for again: a module that was imported meanwhile took the replacement.
        _exchange(replacement, original)


def _exchange(old: Attention, new: Attention) -> None:
    """Put `new` wherever a module of the package holds `old`, under whatever name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)
