"""Compare gradients with those of plain MLX, and decide whether rounding explains the difference.

Each array is compared in float32 by two numbers: the relative error ||g - r|| / ||r||, and the
slope <g, r> / <r, r> - 1, which rounding hardly changes. The limit is 1e-5. If it is exceeded, the
limit becomes ten times the change caused by a change of the parameters by one unit in the last
place. If the backend multiplies float32 with fewer bits (TF32: CUDA, and Metal on an M5, unless
MLX_ENABLE_TF32=0), the relative error of such a product replaces that unit, and limits are wider
accordingly. A run in 16 bits is compared twice, in float32 and in its own dtype. In 16 bits
rounding hides a factor of 1.01, so only grossly wrong gradients are found there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.errors import EdgeLoraError, is_killed
from mlx_edgelora.measure.text import wrapped

Arrays = dict[str, mx.array]
# Limits of the relative error and of |slope - 1| in float32: without a measurement of plain MLX's
# own rounding, and at most after one.
BOUND, MOST = 1e-5, 5e-3
UNIT = 2**-23  # relative distance of neighbouring float32 numbers
# A float32 product with a larger relative error was computed with fewer bits.
EXACT = 1e-5
# The same limits of the relative error in 16 bits.
BOUNDS_16, MOST_16 = {mx.float16: 1e-2, mx.bfloat16: 6e-2}, 0.3
OFF, SCALED = "{} is {:.1e} of its norm off", "{} is scaled by 1 plus or minus {:.1e}"


@dataclass(frozen=True)
class Verdict:
    """Result of comparing one kind of block, or the head with the loss, with plain MLX.

    Attributes:
        kind: class of the block, or a name for another comparison.
        blocks: indices of the blocks of this kind; empty for another comparison.
        way: how the plan computes it.
        error: largest relative error of an array, in float32.
        problem: a difference that rounding does not explain; empty if there is none.
    """

    kind: str
    blocks: str
    way: str
    error: float
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{f' {self.blocks}' if self.blocks else ''}, {self.way}"


def refuse_wrong(verdicts: Sequence[Verdict]) -> None:
    """Check that all gradients agree with plain MLX.

    Raises:
        EdgeLoraError: a verdict has a problem; the message names the one with the largest error.
    """
    wrong = [verdict for verdict in verdicts if verdict.problem]
    if wrong:
        worst = max(wrong, key=lambda verdict: verdict.error)
        raise EdgeLoraError(
            f"verify: {worst}: {worst.problem}; expected the gradients of plain MLX. Nothing was "
            "trained. Train this model with mlx_lm.lora, or continue at your own risk with "
            "--verify off; please report it"
        )


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a table; a problem is on the line after its row."""
    rows = [("kind", "blocks", "computed", "error", "")]
    rows += [
        (v.kind, v.blocks, v.way, f"{v.error:.1e}", "WRONG" if v.problem else "ok")
        for v in verdicts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, problem in zip(rows, ["", *(v.problem for v in verdicts)], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if problem:
            lines.append(f"  {problem}")
    return wrapped("\n".join(lines))


def compare_gradients(
    walked: Callable[[mx.Dtype], Arrays],
    plain: Callable[[mx.Dtype, int | None], Arrays],
    dtype: mx.Dtype,
    kind: str,
    blocks: str,
    way: str,
) -> Verdict:
    """Compare gradients of the engine with those of plain MLX.

    Args:
        walked: computes the engine's gradients in a dtype.
        plain: computes plain MLX's gradients in a dtype; with a seed, float32 parameters are
            changed at random by `unit`.
        dtype: dtype of the run.
        kind: `kind` of the verdict.
        blocks: `blocks` of the verdict.
        way: `way` of the verdict.
    """
    try:
        expected = plain(mx.float32, None)
    except MODEL_ERRORS as error:
        if is_killed(error):
            raise
        return Verdict(kind, blocks, way, np.inf, f"plain MLX cannot differentiate it ({error})")
    errors, slopes = _differences(walked(mx.float32), expected)
    limits = dict.fromkeys(expected, _bound()), dict.fromkeys(expected, _bound())
    if _worst(errors, limits[0], OFF) or _worst(slopes, limits[1], SCALED):
        nudged = [_differences(plain(mx.float32, seed), expected) for seed in range(2)]
        limits = tuple(
            {
                n: min(_most(), max(_bound(), 10 * max(found[part][n] for found in nudged)))
                for n in own
            }
            for part, own in enumerate(limits)
        )
    problem = _worst(errors, limits[0], OFF) or _worst(slopes, limits[1], SCALED)
    if not problem and dtype != mx.float32:
        problem = _problem_16(walked(dtype), expected, plain, dtype)
    return Verdict(kind, blocks, way, max(errors.values()), problem)


def _problem_16(
    got: Arrays,
    expected: Arrays,
    plain: Callable[[mx.Dtype, int | None], Arrays],
    dtype: mx.Dtype,
) -> str:
    """The problem of gradients in 16 bits, compared with plain float32; empty without one."""
    errors, _ = _differences(got, expected)
    limits = dict.fromkeys(expected, BOUNDS_16[dtype])
    if _worst(errors, limits, OFF):
        own, _ = _differences(plain(dtype, None), expected)
        limits = {name: min(MOST_16, max(limits[name], 2 * own[name])) for name in expected}
    problem = _worst(errors, limits, OFF)
    return problem and f"in {str(dtype).rpartition('.')[2]} {problem}"


def _worst(found: dict[str, float], limits: dict[str, float], text: str) -> str:
    """Describe the array that exceeds its limit most; empty if none does."""
    # `not <=`, so that NaN exceeds every limit.
    beyond = {name: value for name, value in found.items() if not value <= limits[name]}
    if not beyond:
        return ""
    name = max(beyond, key=lambda name: np.nan_to_num(beyond[name] / limits[name], nan=np.inf))
    return text.format(name, beyond[name])


def _differences(got: Arrays, expected: Arrays) -> tuple[dict[str, float], dict[str, float]]:
    """Relative error and |slope - 1| of each array; infinite for a missing array."""
    errors, slopes = {}, {}
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            errors[name] = slopes[name] = np.inf
            continue
        r, g = value.astype(mx.float32).reshape(-1), got[name].astype(mx.float32).reshape(-1)
        size, off = mx.linalg.norm(r).item(), mx.linalg.norm(g - r).item()
        slope = ((g - r) @ r).item() / size**2 if size else 0.0
        errors[name], slopes[name] = (off / size if size else off), abs(slope)
    return errors, slopes


def unit() -> float:
    """Relative error of a float32 number in a product on this machine."""
    return UNIT if _rounding() <= EXACT else _rounding()


def _bound() -> float:
    """`BOUND`, or a wider limit if the backend multiplies float32 with fewer bits (TF32)."""
    return BOUND if _rounding() <= EXACT else max(BOUND, 10 * _rounding())


def _most() -> float:
    """`MOST`, or `MOST_16` if the backend multiplies float32 with fewer bits (TF32)."""
    return MOST if _rounding() <= EXACT else MOST_16


@cache
def _rounding() -> float:
    """The relative error of a product of float32 matrices on this machine."""
    x = np.random.RandomState(0).randn(256, 256).astype(np.float32)
    product = np.array(mx.array(x) @ mx.array(x)).astype(np.float64)
    exact = x.astype(np.float64) @ x.astype(np.float64)
    return float(np.linalg.norm(product - exact) / np.linalg.norm(exact))
