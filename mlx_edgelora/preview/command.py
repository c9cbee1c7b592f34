"""`mlx-edgelora data`: preview the tokenized data of a run, without training."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlx_edgelora.command import command
from mlx_edgelora.config import TrainConfig, config_from_cli
from mlx_edgelora.config.kinds import path_argument
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.data import Dataset
from mlx_edgelora.embedded import DEFAULT_CONFIG, MODEL_PATH
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.units import duration, size
from mlx_edgelora.preview import facts, terminal
from mlx_edgelora.preview.page import page
from mlx_edgelora.storage.files import write_atomically
from mlx_edgelora.training.inspecting import plan_report, read_data

# Exit statuses in addition to those of every command.
TRAINS, REFUSED = 0, 1
PURPOSES = ("training", "validation", "test")


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns 1 if a run would refuse the data (`mlx_edgelora.command`)."""
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora data",
        usage="%(prog)s [options] [options of mlx-edgelora train]",
        description="Show the data as a training run will see it: rows, lengths, what is left out "
        "or cut, duplicates, and some rows with the tokens that are trained in colour (between "
        "marks where NO_COLOR is set or the output is no terminal). Takes every option of "
        "mlx-edgelora train. Without options it shows the data of the package. Exits with 1 if a "
        "run would refuse the data.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="Rows to show of each set. Default: 3."
    )
    parser.add_argument(
        "--html", type=path_argument, metavar="FILE", help="Write all of it to a web page as well."
    )
    own, rest = parser.parse_known_args(argv)
    if own.rows < 0:
        raise EdgeLoraError(f"--rows: got {own.rows}, expected a number of at least 0")
    config = config_from_cli(rest, preset=read_yaml(DEFAULT_CONFIG))
    return _show(config, own.rows, own.html)


def _show(config: TrainConfig, wanted: int, html: str | None) -> int:
    refused: list[str] = []
    found, tokenizer = read_data(dataclasses.replace(config, allow_lost_content=True), _print)
    sets = [(name, rows) for name, rows in zip(PURPOSES, found, strict=True) if rows is not None]
    for name, dataset in sets:
        print("\n".join(["", *terminal.overview(name, dataset)]))
    remarks = list(_remarks(config, sets))
    if not config.allow_lost_content:
        for _, dataset in sets:
            with _collected(refused):
                dataset.report.findings.refuse_lost(dataset.report.name)
    for remark in remarks:
        _print(f"- {remark}")
    rows = [
        (facts.title(dataset, number), facts.segments(*dataset[number], tokenizer))
        for _, dataset in sets
        for example in facts.sampled(dataset.examples, wanted)
        for number in dataset.rows_of(example)
    ]
    marks = _marks()
    for place, segments in rows:
        print("\n".join(["", *terminal.row(place, segments, marks)]))
    if html is not None:
        text = page(sets, [*remarks, *refused], rows).encode("utf-8", "backslashreplace")
        write_atomically({Path(html): lambda file: file.write(text)})
    for line in refused:
        _print(f"\na run would stop: {line}")
    return REFUSED if refused else TRAINS


@contextmanager
def _collected(errors: list[str]) -> Iterator[None]:
    try:
        yield
    except EdgeLoraError as error:
        errors.append(str(error))


def _print(text: str) -> None:
    print("\n".join(line for part in text.split("\n") for line in terminal.fitted(part)))


def _marks() -> tuple[str, str] | None:
    """The marks around labels; None if colours are used."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return None
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    return terminal.MARKS if encoding.startswith("utf") else terminal.ASCII_MARKS


def _remarks(config: TrainConfig, sets: Sequence[tuple[str, Dataset]]) -> Iterator[str]:
    """Lines about lost, repeated and truncated content."""
    longest = 0
    for name, dataset in sets:
        report = dataset.report
        if warning := report.warning():
            yield warning
        for line in report.findings.lines():
            yield f"{name}: {line}"
        if repeated := facts.duplicates(dataset):
            rows = f"{dataset.examples:,} rows"
            yield f"{name}: {repeated:,} of {rows} are the same as an earlier one"
        if report.labels_cut:
            longest = max(longest, report.longest)
    for name, dataset in sets[1:]:
        if sets[0][0] == PURPOSES[0] and (count := facts.shared(sets[0][1], dataset)):
            yield f"{name}: {count:,} of {dataset.examples:,} rows are in the training set as well"
    if longest:
        yield _longer(config, longest)


def _longer(config: TrainConfig, longest: int) -> str:
    """A line about the memory and time of a limit that truncates no row."""
    wanted = -(-longest // 32) * 32 + 1
    told = f"--max-seq-length {wanted} cuts nothing"
    model = config.model or str(MODEL_PATH)
    plain = dataclasses.replace(config, model=model, data=None, hf_dataset=None, plan_out=None)
    try:
        now, then = (
            plan_report(dataclasses.replace(plain, max_seq_length=tokens)).expected
            for tokens in (config.max_seq_length, wanted)
        )
    except EdgeLoraError as error:
        return f"{told}; what it takes is not known ({error})"
    return (
        f"{told} and takes up to {size(then.peak)} and {duration(then.seconds)} a step, in place "
        f"of {size(now.peak)} and {duration(now.seconds)}"
    )
