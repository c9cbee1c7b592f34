"""The report of `python -m mlx_edgelora.plan`: the plan of a run, its cost and larger budgets."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import BinaryIO

from mlx_edgelora.data.batches import PAD_TO
from mlx_edgelora.measure.text import named_rows, wrapped
from mlx_edgelora.measure.units import duration, size
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.planner.search import Choice, largest_that, plan, smallest
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

GB = 10**9
# Upper limits of the search for the longest rows and the largest batch.
MOST_TOKENS, MOST_ROWS = 2**20, 4096
# Number of budgets in the plot of time against budget.
POINTS = 40


@dataclass(frozen=True)
class BudgetPoint:
    """A budget in bytes and the expected seconds of a step within it."""

    budget: int
    seconds: float


class PlanReport:
    """Facts about a planned run, from the planner's estimates; no step is run.

    Args:
        chosen: the plan of the run; the smallest plan if the budget is too small.
        fits: whether the budget is large enough.
    """

    def __init__(self, chosen: RunPlan, fits: bool) -> None:
        self._chosen, self.fits = chosen, fits
        self._arguments = chosen.shape, chosen.batch_shape, chosen.machine
        self._measurements = chosen.measurements

    @property
    def expected(self) -> Choice:
        """The plan with its expected peak in bytes and seconds of a step."""
        return self._chosen.choice

    @cached_property
    def smallest(self) -> Choice:
        """The plan with the lowest memory."""
        return self._chosen.smallest()

    @cached_property
    def context(self) -> int:
        """Tokens of the longest rows that fit the budget."""
        shape, batch_shape, machine = self._arguments

        def fits(tokens: int) -> bool:
            share = batch_shape.labelled / batch_shape.size
            labelled = max(1, round(share * batch_shape.rows * tokens))
            longer = replace(batch_shape, tokens=tokens, labelled=labelled)
            needs = smallest(shape, longer, machine, self._chosen.fixed, self._measurements).needs
            return needs <= self._budget

        return largest_that(fits, PAD_TO, MOST_TOKENS)

    @cached_property
    def batch(self) -> int:
        """Rows of the largest batch that fits the budget without micro-batches."""
        shape, batch_shape, machine = self._arguments
        fixed = self._chosen.fixed | {"micro_batches": 1}

        def fits(rows: int) -> bool:
            share = batch_shape.labelled / batch_shape.rows
            larger = replace(batch_shape, rows=rows, labelled=max(1, round(share * rows)))
            return smallest(shape, larger, machine, fixed, self._measurements).needs <= self._budget

        return largest_that(fits, 1, MOST_ROWS)

    @cached_property
    def next_gigabytes(self) -> list[BudgetPoint]:
        """Up to four budgets, each larger by 1 GB, as long as each makes steps faster."""
        found, before = [], self._chosen.choice.seconds
        for more in range(1, 5):
            budget = max(self._budget, self.smallest.needs) + more * GB
            spent = plan(*self._arguments, budget, self._chosen.fixed, self._measurements).seconds
            if spent > before * 0.995:
                break
            found.append(BudgetPoint(budget, spent))
            before = spent
        return found

    def curve(self) -> list[BudgetPoint]:
        """Seconds by budget, from the smallest budget to that of the fastest plan."""
        low = self.smallest.needs
        plenty = plan(*self._arguments, 2**50, self._chosen.fixed, self._measurements).needs
        ratio = (plenty / low) ** (1 / (POINTS - 1))
        budgets = [round(low * ratio**i) for i in range(POINTS - 1)] + [max(low, plenty)]
        return [
            BudgetPoint(
                size, plan(*self._arguments, size, self._chosen.fixed, self._measurements).seconds
            )
            for size in budgets
        ]

    def phases(self) -> dict[str, int]:
        """Expected peak of each phase in bytes."""
        shape, batch_shape, _ = self._arguments
        found: dict[str, int] = {}
        for phase in Memory(shape, batch_shape, self._chosen.plan, self._measurements).phases():
            found[phase.name] = max(found.get(phase.name, 0), phase.bytes)
        return found

    def table(self) -> str:
        """The report as text."""
        chosen, choice = self._chosen, self._chosen.choice
        batch = chosen.batch_shape
        budget = "the least memory" if self._unlimited else size(self._budget)
        verdict = "fits in" if self.fits else "does not fit in"
        lines = [
            f"{batch.rows} x {batch.tokens} tokens{_shared(batch)}, "
            f"{batch.labelled} of them labelled, {_trained(chosen.shape)} "
            f"{chosen.shape.adapted} of {chosen.shape.blocks} blocks",
            f"{verdict} {budget} ({chosen.budget.why})" if not self._unlimited else f"for {budget}",
            "",
            "plan" if self.fits else "smallest plan",
            *_rows(chosen.plan.rows(chosen.shape.blocks)),
            "",
            "expected",
            *_rows({"peak": size(choice.peak), "step": duration(choice.seconds)}),
            *_rows({f"peak of {name}": size(most) for name, most in self.phases().items()}),
            "",
            "smallest budget that works",
            *_rows({size(self.smallest.needs): f"{duration(self.smallest.seconds)} a step"}),
        ]
        if not self._unlimited:
            rows = {
                "longest rows": f"{_at_least(self.context, MOST_TOKENS)} tokens",
                "largest batch": f"{_at_least(self.batch, MOST_ROWS)} rows",
            }
            lines += ["", f"in {budget} there is room for", *_rows(rows)]
        if self.next_gigabytes:
            lines += ["", "a larger budget gives"]
            points = {size(b.budget): f"{duration(b.seconds)} a step" for b in self.next_gigabytes}
            lines += _rows(points)
        elif not self._unlimited and self.fits:
            lines += ["", "a larger budget buys nothing"]
        return wrapped("\n".join(lines))

    def json(self) -> str:
        """The report as JSON; sizes in bytes, times in seconds."""
        chosen, choice = self._chosen, self._chosen.choice
        answers = {
            "fits": self.fits,
            "budget_bytes": None if self._unlimited else self._budget,
            "budget_reason": chosen.budget.why,
            "batch": chosen.batch_shape.sizes(),
            "plan": json.loads(chosen.plan.json()),
            "expected_peak_bytes": choice.peak,
            "expected_step_seconds": choice.seconds,
            "expected_peak_bytes_by_phase": self.phases(),
            "smallest_budget_bytes": self.smallest.needs,
            "smallest_budget_step_seconds": self.smallest.seconds,
            "longest_context_tokens": None if self._unlimited else self.context,
            "largest_batch_rows": None if self._unlimited else self.batch,
            "larger_budgets": [asdict(point) for point in self.next_gigabytes],
        }
        return json.dumps(answers, indent=1)

    def plot(self, file: BinaryIO) -> None:
        """Draw memory over one step, and time against budget; needs matplotlib (`plot` extra)."""
        shape, batch_shape, _ = self._arguments
        phases = list(Memory(shape, batch_shape, self._chosen.plan, self._measurements).phases())
        curve = self.curve()
        with _figure(file) as (left, right):
            for number, name in enumerate(dict.fromkeys(phase.name for phase in phases)):
                places = [i for i, phase in enumerate(phases) if phase.name == name]
                held = [phases[i].held / GB for i in places]
                whole = [phases[i].bytes / GB for i in places]
                left.bar(places, whole, width=1.0, color=f"C{number}", label=name)
                left.bar(places, held, width=1.0, color="black", alpha=0.25)
            left.set(
                title="Expected memory over one step (dark: held throughout)",
                xlabel="phases of blocks, in order",
                ylabel="GB of MLX's allocator",
            )
            left.legend()
            right.step([b.budget / GB for b in curve], [b.seconds for b in curve], where="post")
            if not self._unlimited:
                right.axvline(self._budget / GB, color="black", linestyle="--", linewidth=0.8)
            right.set(
                title="Expected time of a step against the budget",
                xlabel="memory budget, GB",
                ylabel="seconds",
                xscale="log",
                ylim=(0, None),
            )

    @property
    def _unlimited(self) -> bool:
        return self._chosen.budget.bytes is None

    @property
    def _budget(self) -> int:
        return self._chosen.choice.needs if self._unlimited else self._chosen.budget.bytes


def _shared(batch_shape: BatchShape) -> str:
    return f" in rows of about {batch_shape.context}, packed" if batch_shape.context else ""


def _trained(shape: ModelShape) -> str:
    return "all weights of" if shape.full else f"adapters of rank {shape.rank} on"


def with_smallest_plan(chosen: RunPlan) -> RunPlan:
    """The run by the smallest plan, for a budget that is too small."""
    least = chosen.smallest()
    return chosen.with_choice(replace(least, plan=replace(least.plan, reason="the least memory")))


@contextmanager
def _figure(file: BinaryIO) -> Iterator[tuple]:
    import matplotlib  # noqa: PLC0415 - an optional dependency

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    yield axes
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def _at_least(count: int, most: int) -> str:
    """The result of a search up to `most` as text."""
    return f"at least {count:,}" if count >= most else f"{count:,}"


def _rows(values: dict[str, str]) -> list[str]:
    return named_rows(values, 22, indent=2)
