"""Peaks of MLX's allocator, measured so that the machine's load does not decide.

MLX allocates ahead of the computation, on a CPU by up to a hundred operations. How far ahead it
is when the peak comes depends on what else the machine does, and on where among the ten operations
that its scheduler counts as one task a measurement begins; but it is bounded. So each sample
begins at another of the ten, and samples are drawn one after another until one keeps to the
bound: soon where the bound is true, never where something really is held. Bounds are not
widened for jitter.
"""

import gc

import mlx.core as mx
from mlx.utils import tree_flatten

ROUNDS = 8


def held() -> int:
    """Bytes that MLX holds when nothing runs, cycles of Python's collected."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def begin() -> None:
    """Start a peak, one operation later among the scheduler's ten."""
    mx.eval(mx.array(1) + 1)
    held()
    mx.reset_peak_memory()


def peak(function) -> int:
    """Peak of one call, its result and all that is held included."""
    begin()
    result = function()
    found = mx.get_peak_memory()
    del result
    return found


def above(function) -> int:
    """Peak of one call above what is held before it, its result included."""
    return -held() + peak(function)


def lowest(measure, below) -> float:
    """For what must stay below: the first sample that does, or the lowest of all."""
    samples = []
    for _ in range(ROUNDS):
        samples.append(measure())
        if samples[-1] < below:
            break
    return min(samples)


def highest(measure) -> float:
    """For what others are compared with: the sample that ran ahead farthest."""
    return max(measure() for _ in range(ROUNDS))


def growth(small, large, bound: float, rounds: int = ROUNDS) -> float:
    """Lowest sample of the measure `large` over the highest of `small`, until at most `bound`.

    What runs longer meets the farthest run ahead more often, and load drifts: hence three samples
    of the small for one of the large, in turn.
    """
    low, high = [], []
    for number in range(3 * rounds):
        low.append(small())
        if number % 3 == 0:
            high.append(large())
        if min(high) - max(low) <= bound:
            break
    return min(high) - max(low)


def nbytes(tree) -> int:
    return sum(value.nbytes for _, value in tree_flatten(tree))


class Stepped:
    """A model and one whole step of its training, measured beside others that are alive.

    Args:
        build: gives the model. What it holds when it is built, the trained parameters apart,
            is not counted: scalars of its modules too, which are no parameters.
        start: gives the step of that model, a function without arguments.
    """

    def __init__(self, build, start) -> None:
        before = held()
        model = build()
        mx.eval(model.parameters())
        self.trained = nbytes(model.trainable_parameters())
        frozen = held() - before - self.trained
        self.step = start(model)
        self.step()  # the first one makes the optimizer's state
        self.kept = held() - before - frozen  # from step to step

    def peak(self, everything: int) -> int:
        """Peak of a step above frozen weights; `everything` is what all models hold between."""
        return peak(self.step) - (everything - self.kept)


def growth_with_depth(shallow: Stepped, deep: Stepped, bound: int, rounds: int = ROUNDS) -> int:
    """`growth` of a step's peak; what a step leaves behind counts, as `everything` is fixed."""
    everything = held()
    return growth(lambda: shallow.peak(everything), lambda: deep.peak(everything), bound, rounds)
