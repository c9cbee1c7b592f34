"""Decide whether MLX's own attention has fused kernels for forward and backward."""

import os
import platform
import re
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from mlx_edgelora.layers.grid import Band

# Head sizes (of q and k, of v) for which MLX's Metal kernels have a backward.
METAL_SIZES = {(size, size) for size in (64, 72, 80, 96, 128, 192, 256)} | {(96, 64)}
# Head sizes whose fused kernel MLX mostly does not use if no gradient is traced.
SCORED_SIZES = (192, 256)
# The variable that sets how many queries and keys MLX's gradient of attention on Metal takes at a
# time, and its default. MLX reads it at every call.
BLOCK_VARIABLE, BLOCK = "MLX_SDPA_VJP_BLOCK", 1024


class Backend(NamedTuple):
    """The properties that decide whether MLX has a fused kernel: device and versions."""

    name: str
    mlx: tuple[int, ...]
    compute_capability: int = 0  # CUDA's major one
    architecture: str = ""  # Metal's, as applegpu_g13s
    macos: tuple[int, ...] = ()
    tf32: bool = True  # whether MLX may multiply float32 in fewer bits

    @property
    def has_matrix_unit(self) -> bool:
        """Whether MLX multiplies by the matrix unit of an M5 or later (`is_nax_available`)."""
        found = re.search(r"_g(\d+)(\w*)", self.architecture)
        if found is None or self.macos < (26, 2):
            return False
        return int(found[1]) >= (18 if found[2].endswith("p") else 17)

    @classmethod
    def here(cls) -> "Backend":
        """The backend of the default device."""
        version = tuple(int(part) for part in mx.__version__.split(".")[:3] if part.isdigit())
        if mx.default_device() != mx.gpu:
            return cls("cpu", version)
        if mx.metal.is_available():
            architecture = str(mx.device_info().get("architecture", ""))
            tf32 = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
            return cls("metal", version, 0, architecture, _macos(), tf32)
        return cls("cuda", version, int(mx.device_info().get("compute_capability_major", 0)))


@cache
def _macos() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit())


# The value of `BLOCK_VARIABLE` before it was set here.
_before: list[str | None] = []


def set_attention_block(size: int | None) -> None:
    """Set how many queries and keys MLX's gradient of attention on Metal takes at a time.

    It holds three such blocks of scores for every head and row. None restores the original value.
    """
    if size is not None:
        if not _before:
            _before.append(os.environ.get(BLOCK_VARIABLE))
        os.environ[BLOCK_VARIABLE] = str(size)
    elif _before:
        value = _before.pop()
        os.environ.pop(BLOCK_VARIABLE, None)
        if value is not None:
            os.environ[BLOCK_VARIABLE] = value


def is_floating(mask: object) -> bool:
    """Whether a mask is added to the scores, so that a gradient may pass through it."""
    return isinstance(mask, mx.array) and mx.issubdtype(mask.dtype, mx.floating)


def use_fused(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    traced: bool,
    mask: str | mx.array | Band | None = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    backend: Backend | None = None,
) -> tuple[bool, str]:
    """Whether MLX's own attention avoids tokens x tokens scores for this call, and the reason.

    Arguments as in `tiled_attention`; only shapes and dtypes are used. If the result is False, MLX
    may silently build tokens x tokens scores, at least in its gradient.

    Args:
        traced: whether a gradient is being traced: MLX on Metal then uses fused kernels that it
            does not use for a forward alone.
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
            f"without a gradient MLX makes scores of heads of {sizes[0]}": not traced
            and sizes[0] in SCORED_SIZES
            and not _is_fused_untraced(backend, q, keys, causal),
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


def _is_fused_untraced(backend: Backend, q: mx.array, keys: int, causal: bool) -> bool:
    """Whether MLX 0.32.4 uses its Metal kernel for large heads if no gradient is traced."""
    rows, size = q.shape[2], q.shape[3]
    if size != 256 or not causal:
        return False
    in_16_bits = q.dtype != mx.float32
    if backend.has_matrix_unit and rows >= 1024 and (in_16_bits or backend.tf32):
        return True
    return in_16_bits and rows >= 2048 and rows == keys
