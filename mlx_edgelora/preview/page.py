"""The preview as one self-contained HTML page."""

from collections.abc import Iterator, Sequence
from html import escape

from mlx_edgelora.data import Dataset
from mlx_edgelora.preview import facts
from mlx_edgelora.preview.facts import Segment

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #1f2328; background: #fff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8em;
      border-radius: 6px; }
mark { background: #c8f0d0; color: inherit; }
table { border-collapse: collapse; } td, th { padding: .15em .8em .15em 0; text-align: left; }
td.bar div { background: #6aa9e9; height: .9em; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; } pre { background: #161b22; }
  mark { background: #1d572d; }
}
"""


def page(
    sets: Sequence[tuple[str, Dataset]],
    remarks: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Segment]]],
) -> str:
    """The HTML page.

    Args:
        sets: data sets with their purposes.
        remarks: lines about the data sets.
        rows: places and segments of some rows; labelled segments are marked.
    """
    body = [f"<h1>{escape('Data as the run will see it')}</h1>"]
    for name, dataset in sets:
        body += _overview(name, dataset)
    if remarks:
        body.append("<h2>Remarks</h2><ul>")
        body += [f"<li>{escape(remark)}</li>" for remark in remarks]
        body.append("</ul>")
    body.append("<h2>Rows</h2><p>Marked text is trained.</p>")
    for place, segments in rows:
        text = "".join(_segment(part) for part in segments)
        body.append(f"<h3>{escape(place)}</h3><pre>{text}</pre>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _overview(name: str, dataset: Dataset) -> Iterator[str]:
    report, lengths = dataset.report, facts.lengths_of(dataset)
    share = 100 * facts.labelled_share(dataset)
    yield f"<h2>{escape(name)}: {escape(report.name)}</h2>"
    yield (
        f"<p>{report.rows:,} rows read, {dataset.examples:,} to train on, {report.dropped:,} left "
        f"out, {report.truncated:,} truncated to {report.max_seq_length:,} tokens. "
        f"{report.tokens:,} tokens, {share:.3g} % of them labels. Longest row: "
        f"{report.longest:,} tokens.</p><table>"
    )
    bins = facts.histogram(lengths)
    most = max(part.rows for part in bins)
    for part in bins:
        yield (
            f"<tr><td>{part.first:,}-{part.last:,}</td><td class='bar'>"
            f"<div style='width:{20 * part.rows / most:.1f}em'></div></td>"
            f"<td>{part.rows:,}</td></tr>"
        )
    yield "</table>"


def _segment(part: Segment) -> str:
    text = escape(part.text)
    return f"<mark>{text}</mark>" if part.is_labelled else text
