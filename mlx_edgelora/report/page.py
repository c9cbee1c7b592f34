"""The report page: one self-contained HTML file for any width, light and dark."""

import base64
import hashlib
import statistics
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.profile import PhasePeak
from mlx_edgelora.measure.units import clock, duration, size
from mlx_edgelora.report.charts import MOST_HEADROOM, Line, curves, phases
from mlx_edgelora.report.run import Run, number, read_run
from mlx_edgelora.storage.files import make_folder, write_atomically

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
# Only this script may run and nothing is loaded, so the content of a log cannot run code.
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def write_report(lines: Iterable[bytes], place: str, target: Path) -> None:
    """Read the last run of a log and write its report page.

    Args:
        lines: lines of the log.
        place: name of the log in error messages.
        target: the HTML file; an existing file is replaced.

    Raises:
        EdgeLoraError: the log contains no run, or the file cannot be written.
    """
    text = page(read_run(lines, place)).encode()
    write_atomically({target: lambda file: file.write(text)})


def check_target(target: Path) -> None:
    """Check before a run that its report can be written to a file.

    Raises:
        EdgeLoraError: the file is a folder, or its folder does not exist or cannot be written.
    """
    if target.is_dir():
        raise EdgeLoraError(f"{target}: is a folder, expected the report's file; name one in it")
    if not target.parent.is_dir():
        raise EdgeLoraError(f"{target.parent} is not a folder; choose a file in an existing folder")
    make_folder(target.parent)


def page(run: Run) -> str:
    """The HTML page of a run; parts without records in the log are left out."""
    name = _name(run)
    budget = number(run.event("plan").get("budget_bytes"))
    loss = Line("training", "c0", run.train_loss.points)
    validation = Line("validation", "c1", run.val_loss.points, dotted=True)
    rewards = _rewards(run)
    pair = curves("Tokens per second", [Line("training", "c0", run.speed.points)], _speed, True)
    pair += _memory(run, budget)
    parts = [
        _head(run, name),
        _tiles(run, budget),
        _facts("Run", run.event("run").get("facts")),
        curves("Loss", [loss, validation], _loss),
        f'<div class="pair">{rewards}</div>' if rewards else "",
        f'<div class="pair">{pair}</div>' if pair else "",
        _step_memory(run),
        _plan(run),
        _samples(run.event("samples")),
        _answers(run.event("answers")),
        _foot(run),
    ]
    title = escape(f"{name}: report of a training run")
    body = "\n".join(filter(None, parts))
    return PAGE.format(policy=POLICY, title=title, style=STYLE, body=body, script=SCRIPT)


def _name(run: Run) -> str:
    """Name of the model without its folder."""
    model = str(run.event("run").get("model") or "a training run").rstrip("/").rpartition("/")[2]
    return model[:1].upper() + model[1:] if " " in model else model


def _head(run: Run, name: str) -> str:
    end, steps = run.event("end"), number(run.event("run").get("iters"))
    where = f"step {max(run.step, 0):,.0f}" + (f" of {steps:,.0f}" if steps else "")
    words, style = {
        "finished": (f"finished, {where}", "good"),
        "interrupted": (f"interrupted after {where}", "poor"),
        "failed": (f"ended by an error after {where}", "poor"),
    }.get(str(end.get("status")), (f"no end in the log; last report at {where}", "poor"))
    if not run.event("run"):  # a log of mlx-lm's callbacks, which have no end
        words, style = f"last report at {where}", "plain"
    reason = f'<p class="reason">{escape(str(end["reason"]))}</p>' if end.get("reason") else ""
    started = str(run.event("run").get("started") or "").replace("T", " ")[:16]
    over = " · ".join(filter(None, ("mlx-edgelora training run", started)))
    return (
        f'<header><p class="over">{escape(over)}</p><h1>{escape(name)}</h1>'
        f'<p class="status {style}">{escape(words)}</p>{reason}</header>'
    )


def _tiles(run: Run, budget: float | None) -> str:
    """The main figures, as large tiles."""
    tiles, speed = [], 0.0
    for name, curve in (("Validation loss", run.val_loss), ("Training loss", run.train_loss)):
        if curve:
            tiles.append((name, f"{curve.last:.3f}", f"from {curve.first:.3f}", None))
    for name, curve in (("Accuracy", run.accuracy), ("Validation accuracy", run.val_accuracy)):
        if curve:
            tiles.append((name, f"{curve.last:.1%}", f"from {curve.first:.1%}", None))
    if (loss := number(run.event("test").get("loss"))) is not None:
        tokens = number(run.event("test").get("tokens")) or 0
        tiles.append(("Test loss", f"{loss:.3f}", f"on {tokens:,.0f} tokens", None))
    if run.peak:
        of = "" if budget is None else f"budget {_size(budget)}"
        tiles.append(("Peak memory", size(run.peak.high), of, budget and run.peak.high / budget))
    if run.speed:
        speed = statistics.median(value for _, value in run.speed.points)
        more = f"{run.tokens:,.0f} tokens" if run.tokens else "median"
        tiles.append(("Tokens/s", f"{speed:,.0f}", more, None))
    if run.seconds:
        steps = run.step if speed > 0 and run.tokens > 0 else 0
        more = f"{duration(run.tokens / steps / speed)} a step" if steps > 0 else ""
        tiles.append(("Time", clock(run.seconds), more, None))
    return f'<section class="tiles">{"".join(map(_tile, tiles))}</section>' if tiles else ""


def _tile(tile: tuple[str, str, str, float | None]) -> str:
    name, value, more, share = tile
    bar = "" if share is None else f'<i class="bar"><b style="width:{min(share, 1):.1%}"></b></i>'
    return (
        f'<div class="card tile"><h3>{escape(name)}</h3><strong>{escape(value)}</strong>'
        f"<span>{escape(more)}</span>{bar}</div>"
    )


def _rewards(run: Run) -> str:
    """Charts of the answers that are compared; empty for other losses."""
    charts = (
        ("Accuracy of comparisons", run.accuracy, run.val_accuracy, _share),
        ("Reward margin", run.margin, run.val_margin, _loss),
    )
    return "".join(
        curves(
            title,
            [Line("training", "c0", train.points), Line("validation", "c1", val.points, True)],
            shown,
        )
        for title, train, val, shown in charts
    )


def _memory(run: Run, budget: float | None) -> str:
    """A chart of memory over the run.

    The process's curve is only mentioned in the legend if it would flatten the other curves.
    """
    peak = Line("peak of MLX", "c0", run.peak.points)
    process = Line("whole process", "c2", run.process.points)
    limit = None if budget is None else (f"MLX budget {_size(budget)}", budget)
    if run.peak and run.process and run.process.high > MOST_HEADROOM * run.peak.high:
        above = f"whole process {_size(run.process.high)}"
        return curves("Memory", [peak], _size, True, limit, above)
    return curves("Memory", [peak, process], _size, True, limit)


def _facts(title: str, facts: Any, more: str = "") -> str:
    """A titled list of names and values."""
    if not isinstance(facts, Mapping) or not facts:
        return ""
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
    )
    return f'<section class="card"><h2>{escape(title)}</h2>{more}<dl>{rows}</dl></section>'


def _step_memory(run: Run) -> str:
    """A chart of the memory of a step, measured or else as expected by the planner."""
    found = run.events.get("step_memory")
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
    title = "Memory of one step, by phase and block"
    if not rows:
        title = "Memory of one step by phase, as expected"
        expected = run.event("plan").get("phases")
        pairs = expected.items() if isinstance(expected, Mapping) else ()
        rows = [{"phase": phase, "peak_bytes": peak} for phase, peak in pairs]
    entries = [
        PhasePeak(
            str(row.get("phase")),
            None if number(row.get("block")) is None else int(row["block"]),
            number(row.get("start_bytes")) or 0,
            number(row.get("peak_bytes")) or 0,
        )
        for row in rows
    ]
    # Phases that allocated nothing are left out.
    entries = [e for e in entries if e.peak_bytes > e.start_bytes]
    return phases(title, entries, _size) if entries else ""


def _plan(run: Run) -> str:
    plan = run.event("plan")
    peak, seconds = number(plan.get("expected_peak_bytes")), number(plan.get("expected_seconds"))
    words = []
    if peak is not None and seconds is not None:
        words.append(f"Expected: {size(peak)} and {duration(seconds)} a step.")
    if plan.get("budget_reason"):
        budget = number(plan.get("budget_bytes"))
        most = "no limit" if budget is None else size(budget)
        words.append(f"Budget: {most}, {plan['budget_reason']}.")
    return _facts("Plan", plan.get("rows"), f"<p>{escape(' '.join(words))}</p>" if words else "")


def _samples(samples: Mapping[str, Any]) -> str:
    """The last answers to fixed prompts during training, and those before it."""
    rows = samples.get("answers")
    known = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    step = number(samples.get("step"))
    if not known or step is None:
        return ""
    names = {"prompt": "prompt", "before": "before", "now": f"step {step:,.0f}"}
    text = "".join(
        f'<dt>{title}</dt><dd class="plain">{escape(str(row[name]))}</dd>'
        for row in known
        for name, title in names.items()
        if name in row
    )
    return (
        f'<section class="card"><h2>Answers during training</h2><dl class="answer">{text}</dl>'
        "</section>"
    )


def _answers(answers: Mapping[str, Any]) -> str:
    """The model's answers before and after training."""
    if "after" not in answers:
        return ""
    cells = {name: str(answers.get(name, "")) for name in ("prompt", "expected", "before", "after")}
    rows = "".join(
        f'<dt>{name}</dt><dd class="{_verdict(name, cells)}">{escape(text)}</dd>'
        for name, text in cells.items()
    )
    shares = [number(answers.get(f"exact_match_{when}")) for when in ("before", "after")]
    words = ""
    if None not in shares:
        before, after = shares
        words = f"<p>Held-out rows answered exactly: {before:.0%} before, {after:.0%} after.</p>"
    return (
        f'<section class="card"><h2>An answer before and after training</h2>{words}'
        f'<dl class="answer">{rows}</dl></section>'
    )


def _verdict(name: str, cells: Mapping[str, str]) -> str:
    """CSS class of a text: plain, right or wrong."""
    if name not in ("before", "after"):
        return "plain"
    return "right" if cells[name].strip() == cells["expected"].strip() else "wrong"


def _foot(run: Run) -> str:
    notes = []
    if run.count > 1:
        notes.append(f"The last of {run.count} runs in this log.")
    if run.unread:
        notes.append(f"Lines of the log that hold no record: {run.unread:,}.")
    version = run.event("run").get("version")
    if version:
        notes.append(f"mlx-edgelora {version}")
    return f"<footer>{escape(' '.join(notes))}</footer>" if notes else ""


def _loss(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _size(value: float) -> str:
    digits, unit = size(value).split()
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {unit}"
