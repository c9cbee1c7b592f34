"""Draw docs/time-and-peak.svg from a benchmark's results.json: peak memory against time.

    python dev/picture.py benchmarks/results/llama-3.2-3b-4-blocks-linux-cpu.json

The picture follows the reader's light or dark setting.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

TARGET = Path(__file__).parents[1] / "docs/time-and-peak.svg"
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 64, 56
# What the benchmark calls a contender, what the picture does, and where the text goes.
OTHERS = {
    "mlx-lm": ("mlx-lm", -14, 2, "end"),
    "mlx-lm, checkpointing": ("mlx-lm, gradient checkpointing", 0, 26, "middle"),
}
OURS = {
    "edgelora, plenty": ("no limit", 14, -2, "start"),
    "edgelora, half of it": ("half of mlx-lm's peak", 14, 2, "start"),
    "edgelora, a quarter": ("a quarter", 12, -9, "start"),
    "edgelora, min": ("minimum", 14, 2, "start"),
}
STYLE = """
    text { font: 15px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
    text { fill: #1f2328; }
    .small { font-size: 13px; fill: #57606a; }
    .page { fill: #ffffff; stroke: #d0d7de; }
    .grid { stroke: #e3e7ec; }
    .ours { fill: #1f6feb; } .line { stroke: #1f6feb; stroke-width: 2; fill: none; opacity: .45; }
    .theirs { fill: #bc4c00; }
    .name { font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .small { fill: #9da7b3; }
      .page { fill: #12161d; stroke: #30363d; } .grid { stroke: #272e38; }
      .ours { fill: #58a6ff; } .line { stroke: #58a6ff; } .theirs { fill: #f0883e; }
    }"""


class Point(NamedTuple):
    """One contender: time relative to mlx-lm's, and peak in GB."""

    time: float
    peak: float


def points(report: dict) -> dict[str, Point]:
    """The contenders of the longest context that were measured, by name."""
    context = max(report["contexts"], key=lambda one: one["tokens"])
    return {
        result["name"]: Point(median(result["ratios"] or [1.0]), result["peak"] / 1e9)
        for result in context["results"]
        if result.get("valid") and not result["kernels"]
    }


def drawn(report: dict) -> str:
    """The picture."""
    found, tokens = points(report), max(one["tokens"] for one in report["contexts"])
    last_time = 0.25 * -(-max(p.time for p in found.values()) * 1.08 // 0.25)
    last_peak = float(-(-max(p.peak for p in found.values()) * 1.05 // 1))

    def x(time: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * time / last_time, 1)

    def y(peak: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * peak / last_peak, 1)

    parts = [f'<rect class="page" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>']
    title = "Peak memory and time of a training step"
    about = f"{report['settings']['model']}, {tokens} tokens, Linux CPU"
    parts.append(f'<text class="name" x="20" y="30">{title}</text>')
    parts.append(f'<text class="small" x="{WIDTH - 20}" y="30" text-anchor="end">{about}</text>')
    for peak in range(int(last_peak) + 1):
        parts.append(
            f'<path class="grid" d="M{x(0)} {y(peak)} H{x(last_time)}"/>'
            f'<text class="small" x="{x(0) - 8}" y="{y(peak) + 4}" text-anchor="end">{peak}'
            f"{' GB' if peak == int(last_peak) else ''}</text>"
        )
    for quarter in range(int(last_time / 0.25) + 1):
        time = quarter / 4
        parts.append(
            f'<path class="grid" d="M{x(time)} {y(0)} V{y(last_peak)}"/>'
            f'<text class="small" x="{x(time)}" y="{y(0) + 19}" text-anchor="middle">'
            f"{time:g}</text>"
        )
    parts.append(
        f'<text class="small" x="{(x(0) + x(last_time)) / 2}" y="{HEIGHT - 12}" '
        f'text-anchor="middle">time, relative to mlx-lm</text>'
    )
    line = " L".join(f"{x(found[n].time)} {y(found[n].peak)}" for n in OURS if n in found)
    parts.append(f'<path class="line" d="M{line}"/>')
    for names, kind in ((OTHERS, "theirs"), (OURS, "ours")):
        for name, (label, right, down, anchor) in names.items():
            if name in found:
                time, peak = found[name]
                told = f"{peak:.1f} GB" if peak >= 1 else f"{peak:.2f} GB"
                parts.append(
                    f'<circle class="{kind}" cx="{x(time)}" cy="{y(peak)}" r="6.5"/>'
                    f'<text x="{x(time) + right}" y="{y(peak) + down + 4}" '
                    f'text-anchor="{anchor}">{label} <tspan class="small">{told}</tspan></text>'
                )
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"  <title>{title}</title>\n  <style>{STYLE}\n  </style>\n  {body}\n</svg>\n"
    )


if __name__ == "__main__":
    TARGET.write_text(drawn(json.loads(Path(sys.argv[1]).read_text())), "utf-8")
