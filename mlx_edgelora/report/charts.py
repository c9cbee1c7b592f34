"""Charts as HTML: curves in an SVG that stretches with the page, labels as unstretched text."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mlx_edgelora.measure.profile import PhasePeak

# Width and height of the SVG in its own units; the page stretches it.
SIDE = 1000
# A limit higher than this multiple of the curves is not drawn, because it would flatten them.
MOST_HEADROOM = 4
# Number of bars that a phone can show; of more bars, the highest of each group is kept.
MOST_BARS = 300
# Classes of `page.css` for phases, in order.
COLOURS = ("c0", "c1", "c3", "c4", "c5", "c6", "c2")


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        name: name in the legend.
        style: class of `page.css` with the colour.
        points: (x, y) pairs in order of x.
        dotted: whether points are marked.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    dotted: bool = False


def curves(
    title: str,
    lines: Sequence[Line],
    shown: Callable[[float], str],
    from_zero: bool = False,
    limit: tuple[str, float] | None = None,
    above: str | None = None,
) -> str:
    """A chart of curves over steps.

    Args:
        title: title above the chart.
        lines: the curves; curves without points are left out.
        shown: formats a value with its unit.
        from_zero: whether the axis begins at 0.
        limit: name and value of a horizontal line across the chart.
        above: description of a curve that is too high to be drawn, for the legend.

    Returns:
        A `figure` element; empty if no curve has points.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points]
    across = limit is not None and limit[1] <= MOST_HEADROOM * max(values)
    held = [*values, *([0] if from_zero else []), *([limit[1]] if across else [])]
    ticks = _ticks(min(held), max(held))
    x, y = _Scale(min(steps), max(steps)), _Scale(ticks[0], ticks[-1])
    paths = []
    for line in lines:
        places = [(x(step), SIDE - y(value)) for step, value in line.points]
        if len(places) > 1:
            paths.append(_path(f"line {line.style}", f"M{'L'.join(map(_pair, places))}"))
        if line.dotted or len(places) == 1:
            paths.append(_path(f"dots {line.style}", "".join(f"M{_pair(p)}h0" for p in places)))
    legend = {line.name: line.style for line in lines if len(lines) > 1 or limit}
    if across:
        paths.append(_path("limit", f"M0 {SIDE - y(limit[1]):.4g}H{SIDE}"))
    if limit is not None:
        legend[limit[0] if across else f"{limit[0]}, above this chart"] = "limit"
    if above is not None:
        legend[f"{above}, above this chart"] = "c2"
    described = "; ".join(
        f"{line.name}: {shown(line.points[0][1])} at step {line.points[0][0]:g}, "
        f"{shown(line.points[-1][1])} at step {line.points[-1][0]:g}"
        for line in lines
    )
    bottom = [(x(tick) / SIDE, f"{tick:g}") for tick in _ticks(x.low, x.high, inside=True)]
    left = [(y(tick) / SIDE, shown(tick)) for tick in ticks]
    area = _area("".join(paths), _hints(lines, x, shown), left)
    return _figure(title, legend, described, area, bottom)


def phases(title: str, entries: Sequence[PhasePeak], shown: Callable[[float], str]) -> str:
    """A chart of one step, with a bar for the peak of each phase of each block in order.

    The memory in use when the phase began is darker.

    Args:
        title: title above the chart.
        entries: peaks of the phases; at least one.
        shown: formats a number of bytes.

    Returns:
        A `figure` element.
    """
    entries = _few(entries)
    names = list(dict.fromkeys(entry.phase for entry in entries))
    styles = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    ticks = _ticks(0, max(entry.peak_bytes for entry in entries))
    y, width = _Scale(0, ticks[-1]), SIDE / len(entries)
    bars: dict[str, list[str]] = {f"bars {style}": [] for style in styles.values()}
    bars["held"] = []
    hints = []
    for place, entry in enumerate(entries):
        left, right = place * width, (place + 1) * width
        for style, top in (
            (f"bars {styles[entry.phase]}", entry.peak_bytes),
            ("held", min(entry.start_bytes, entry.peak_bytes)),
        ):
            height = SIDE - y(top)
            bars[style].append(f"M{left:.5g} {SIDE}V{height:.4g}H{right:.5g}V{SIDE}Z")
        where = "" if entry.block is None else f", block {entry.block}"
        words = f"{entry.phase}{where}: {shown(entry.peak_bytes)}"
        held = f", {shown(entry.start_bytes)} held before" * (entry.start_bytes > 0)
        hints.append(((left + right) / 2 / SIDE, words + held))
    paths = "".join(_path(style, "".join(path)) for style, path in bars.items() if path)
    peaks = {n: max(e.peak_bytes for e in entries if e.phase == n) for n in names}
    legend = {f"{name} {shown(peak)}": styles[name] for name, peak in peaks.items()}
    legend |= {"darker: held before": "held"} if any(e.start_bytes for e in entries) else {}
    described = "; ".join(f"{name}: {shown(peak)}" for name, peak in peaks.items())
    left_ticks = [(y(tick) / SIDE, shown(tick)) for tick in ticks]
    return _figure(title, legend, described, _area(paths, hints, left_ticks), [])


class _Scale:
    """Converts values to units of the SVG."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        return SIDE * ((value - self.low) / (self.high - self.low or 1))


def _ticks(low: float, high: float, count: int = 5, inside: bool = False) -> list[float]:
    """Round numbers from below `low` to above `high`, or from `low` to `high`."""
    span = max(high - low, 1e-12) if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * by for by in (1, 2, 2.5, 5, 10) if span <= count * power * by * (1 + 1e-9))
    if inside:  # steps are whole numbers
        step = max(1.0, float(round(step)))
    near = 1e-9
    first = math.ceil(low / step - near) if inside else math.floor(low / step + near)
    last = math.floor(high / step + near) if inside else math.ceil(high / step - near)
    return [step * number for number in range(first, max(last, first + (not inside)) + 1)]


def _few(entries: Sequence[PhasePeak]) -> list[PhasePeak]:
    group = -(-len(entries) // MOST_BARS)
    groups = (entries[i : i + group] for i in range(0, len(entries), group))
    return [max(some, key=lambda entry: entry.peak_bytes) for some in groups]


def _hints(
    lines: Iterable[Line], x: _Scale, shown: Callable[[float], str]
) -> list[tuple[float, str]]:
    """Texts to show under the pointer, with their horizontal position from 0 to 1."""
    words: dict[float, list[str]] = {}
    for line in lines:
        for step, value in line.points:
            words.setdefault(step, []).append(f"{line.name} {shown(value)}")
    return [(x(step) / SIDE, f"step {step:g}: {', '.join(words[step])}") for step in sorted(words)]


def _pair(place: tuple[float, float]) -> str:
    return f"{place[0]:.5g} {place[1]:.5g}"


def _path(style: str, path: str) -> str:
    return f'<path class="{style}" d="{path}"/>'


def _area(
    paths: str,
    hints: Sequence[tuple[float, str]],
    left: Sequence[tuple[float, str]],
) -> str:
    grid = _path("grid", "".join(f"M0 {SIDE - SIDE * at:.4g}H{SIDE}" for at, _ in left))
    points = escape(json.dumps([[round(at, 4), text] for at, text in hints]))
    ticks = "".join(f'<span style="bottom:{at:.2%}">{escape(text)}</span>' for at, text in left)
    return (
        f'<div class="left">{ticks}</div><div class="area" data-points="{points}">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f"{grid}{paths}</svg></div>"
    )


def _figure(
    title: str,
    legend: Mapping[str, str],
    described: str,
    area: str,
    bottom: Sequence[tuple[float, str]],
) -> str:
    keys = "".join(f'<li class="{style}">{escape(name)}</li>' for name, style in legend.items())
    ticks = "".join(f'<span style="left:{at:.2%}">{escape(text)}</span>' for at, text in bottom)
    axis = f'<div class="bottom">{ticks}</div>' if bottom else ""
    return (
        f'<figure class="card"><figcaption><h2>{escape(title)}</h2><ul class="legend">{keys}</ul>'
        f'</figcaption><div class="plot" role="img" aria-label="{escape(f"{title}. {described}")}">'
        f"{area}{axis}</div></figure>"
    )
