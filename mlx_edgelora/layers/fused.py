"""Where MLX's own attention has a fused kernel forward *and* backward."""

from typing import NamedTuple

import mlx.core as mx

from mlx_edgelora.layers.grid import Band

# Head sizes (of q and k, of v) for which MLX's Metal kernels have a backward.
METAL_SIZES = {(size, size) for size in (64, 72, 80, 96, 128, 192, 256)} | {(96, 64)}


class Backend(NamedTuple):
    """What decides whether MLX has a fused kernel: "cpu", "metal" or "cuda", and versions."""

    name: str
    mlx: tuple[int, ...]
    compute_capability: int = 0  # CUDA's major one

    @classmethod
    def here(cls) -> "Backend":
        """That of the default device."""
        version = tuple(int(part) for part in mx.__version__.split(".")[:3] if part.isdigit())
        if mx.default_device() != mx.gpu:
            return cls("cpu", version)
        if mx.metal.is_available():
            return cls("metal", version)
        return cls("cuda", version, int(mx.device_info().get("compute_capability_major", 0)))


def is_floating(mask: object) -> bool:
    """Whether a mask is added to the scores, so that a gradient may pass through it."""
    return isinstance(mask, mx.array) and mx.issubdtype(mask.dtype, mx.floating)


def use_fused(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: str | mx.array | Band | None = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    backend: Backend | None = None,
) -> tuple[bool, str]:
    """Whether MLX's own attention has a fused forward *and* backward here, and why (not).

    Arguments as of `tiled_attention`; only shapes and dtypes are looked at. Where this is
    False MLX's gradient may build tokens x tokens scores without a word.
    """
    backend = backend or Backend.here()
    if backend.name not in ("metal", "cuda"):
        return False, f"MLX has no fused attention gradient on {backend.name}"
    rows, keys, sizes = q.shape[2], k.shape[2], (q.shape[3], v.shape[3])
    causal = isinstance(mask, str)
    refusals = {
        "the fused backward gives no gradient to sinks": sinks is not None,
        "a window is an array mask to MLX": window is not None,
        "a band is an array mask to MLX": isinstance(mask, Band),
        f"causal with {rows} queries and {keys} keys": causal and rows > keys,
    }
    if backend.name == "metal":
        refusals |= {
            f"mlx {'.'.join(map(str, backend.mlx))} is before 0.32.4": backend.mlx < (0, 32, 4),
            "the fused backward takes no array mask": mask is not None and not causal,
            f"head sizes {sizes}": sizes not in METAL_SIZES,
            f"{rows} queries, not more than 8": rows <= 8,
        }
    else:
        refusals |= {
            "the fused backward gives no gradient to a floating mask": is_floating(mask),
            f"compute capability {backend.compute_capability}": backend.compute_capability < 8,
            f"{q.dtype}, not 16 bits": q.dtype not in (mx.float16, mx.bfloat16),
            f"head sizes {sizes}": max(sizes) > 128 or any(size % 8 for size in sizes),
            f"{rows} queries, no multiple of 128": rows % 128 != 0,
        }
    for reason, refused in refusals.items():
        if refused:
            return False, reason
    return True, f"MLX's fused attention on {backend.name} has this gradient"
