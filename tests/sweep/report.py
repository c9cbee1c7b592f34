"""A table of all architectures of mlx-lm: how each run of the sweep ends, and why.

    python tests/sweep/report.py
    python tests/sweep/report.py -k llama,gemma4_text:moe -o results.jsonl
    python tests/sweep/report.py --page docs/architectures.md

`sweeping.py` says what is compared. A name without a variant stands for all its variants.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # of the helpers that are not tests

from sweeping import EXCUSED, RUNS, WORKERS, Outcome, Result, configurations, sweep

from mlx_edgelora.blocks.refusals import Refusal

# From the best to the worst.
VERDICTS = (
    "exact, all blocks by tiles",
    "exact, some blocks by tiles",
    "exact, no block by tiles",
    "refused",
    "not trainable by mlx-lm",
    "not built here",
    "crashed",
    "wrong",
)
LENGTH = 200


def verdict(result: Result) -> str:
    """What becomes of a configuration, in the words of `VERDICTS`."""
    states = {outcome.state for outcome in result.runs.values()}
    if "wrong" in states:
        return "wrong"
    if "crashed" in states or result.died:
        return "crashed"
    if result.missing:
        return "not built here" if result.unbuilt else "not trainable by mlx-lm"
    if "refused" in states:
        return "refused"
    part = "all blocks" if result.tiled == result.blocks else "some blocks"
    return f"exact, {part if result.tiled else 'no block'} by tiles"


def remark(result: Result) -> str:
    """Why it is not exact, or not by tiles; cut where it is long."""
    outcomes = result.runs.values()
    texts = [o.text for o in outcomes if o.fails]
    if result.missing:
        texts.append(EXCUSED.get(result.name, result.missing))
    texts = texts or [o.text for o in outcomes if o.state == "refused"] or [result.whole]
    found = "; ".join(dict.fromkeys(texts))
    found = found.replace("a block cannot be called for parts of its tokens: ", "")
    found = " ".join(found.split()).replace("|", "/")
    return found if len(found) <= LENGTH else found[: LENGTH - 1] + "…"


def row(result: Result) -> str:
    """A line of the table."""
    tiled = "" if result.tiled is None else f"{result.tiled}/{result.blocks}"
    cells = [cell(result.runs.get(run)) for run in RUNS]
    return f"| {' | '.join([result.name, *cells, tiled, remark(result)])} |"


def cell(outcome: Outcome | None) -> str:
    """A run in a word, and how far off it is."""
    if outcome is None:
        return "-"
    words = outcome.state if outcome.error is None else f"{outcome.state} {outcome.error:.0e}"
    return f"**{words}**" if outcome.fails else words


def table(results: Iterable[Result]) -> str:
    """All of them in Markdown, and how many there are of each verdict."""
    results = sorted(results, key=lambda result: result.name.lower())
    heads = ["architecture", *RUNS, "blocks by tiles", "remark"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *map(row, results)]
    lines += ["", "| verdict | architectures | configurations |", "|---|---|---|"]
    every = Counter(map(verdict, results))
    worst = Counter(architectures(results).values())
    lines += [f"| {v} | {worst[v]} | {every[v]} |" for v in VERDICTS]
    return "\n".join(lines)


def architectures(results: Iterable[Result]) -> dict[str, str]:
    """The verdict of each architecture: the worst one of its configurations."""
    found: dict[str, str] = {}
    for result in results:
        name = result.name.partition(":")[0]
        found[name] = max(verdict(result), found.get(name, VERDICTS[0]), key=VERDICTS.index)
    return found


PAGE = Path(__file__).parent / "page.md"


def page(results: Iterable[Result]) -> str:
    """The page of the docs about all architectures."""
    results = list(results)
    now = Counter(architectures(results).values())
    counts = ["| verdict | architectures |", "|---|---|"]
    counts += [f"| {v} | {now[v]} |" for v in VERDICTS]
    counts.append(f"| all | {sum(now.values())} |")
    return PAGE.read_text().format(
        version=version("mlx-lm"),
        counts="\n".join(counts),
        reasons="\n".join(reasons(results)),
        table=table(results).partition("\n\n")[0],
    )


def reasons(results: Iterable[Result]) -> list[str]:
    """Every reason of a refusal, and the configurations that it concerns."""
    texts = {
        result.name: outcome.text
        for result in results
        for outcome in result.runs.values()
        if outcome.state == "refused"
    }
    lines = []
    for reason in Refusal:
        pattern = re.sub(r"\\{\w+\\}", ".*", re.escape(reason.value))
        names = sorted(name for name, text in texts.items() if re.search(f": {pattern};", text))
        text = re.sub(r" \(?\{error\}\)?", "", reason.value)
        text = re.sub(r"\{(\w+)\}", r"*\1*", text)
        lines.append(f"- {text}" + (f": {', '.join(names)}" if names else ""))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="NAME", default="", help="only these, with commas between")
    parser.add_argument("-o", metavar="FILE", type=Path, help="a line of JSON for each result")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the page of the docs")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes at a time")
    options = parser.parse_args()
    wanted = {name for name in options.k.split(",") if name}
    configs = {
        name: config
        for name, config in configurations().items()
        if not wanted or wanted & {name, name.partition(":")[0]}
    }
    results = [
        Result(name, unbuilt=reason)
        for name, reason in EXCUSED.items()
        if name not in configurations() and (not wanted or name in wanted)
    ]
    for result in sweep(configs, options.workers):
        print(f"{len(results) + 1}: {result.name}: {verdict(result)}", file=sys.stderr, flush=True)
        results.append(result)
    if options.o:
        options.o.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    if options.page:
        options.page.write_text(page(results))
    print(table(results))


if __name__ == "__main__":
    main()
