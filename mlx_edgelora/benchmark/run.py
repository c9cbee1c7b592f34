"""Run the benchmark: prepare model, rows and initial matrices, then measure all contenders."""

import argparse
import datetime
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_edgelora.benchmark.contenders import config_of, contenders
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.ladder import LADDER, RANK, PublishedTable
from mlx_edgelora.benchmark.machine import (
    commit,
    kernels_differ,
    machine,
    on_cpu,
    slow_blas,
    versions,
)
from mlx_edgelora.benchmark.report import BenchmarkReport, ContextResults
from mlx_edgelora.benchmark.results import movement, tolerance_of
from mlx_edgelora.benchmark.rounds import Comparison, ContenderExited, ContenderProcess, Log
from mlx_edgelora.benchmark.rows import (
    BATCHES,
    batches,
    given_rows,
    sort_rows,
    synthetic_rows,
    tokenizer_of,
    words_for,
    write_rows,
)
from mlx_edgelora.benchmark.shapes import SHAPES, add_tokenizer, checkpoint
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.linear import resolve_kernel
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import this_machine
from mlx_edgelora.training.inspecting import plan_report

SCALE = 20.0
# Approximate change of a layer's output by the initial adapters.
CHANGE = 0.1
# Tokens of a row with a slow BLAS.
SLOW_CONTEXT = 64
# A loss that changes by fewer tolerances than this does not show whether a contender trains.
TELLING = 3


def run(
    options: argparse.Namespace, command: str, log: Log, keep: Callable[[BenchmarkReport], None]
) -> tuple[BenchmarkReport, bytes | None]:
    """Run the benchmark.

    Args:
        options: options from `options_from_cli`.
        command: the command line, for the report.
        log: called with progress messages.
        keep: called with the report so far after each context and each row.

    Returns:
        The report, and a plot of the memory of one step as PNG if the `plot` extra is installed.

    Raises:
        EdgeLoraError: an error that the user can correct.
    """
    report = BenchmarkReport(
        command=command,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine(),
        versions=versions(),
        commit=commit(),
        settings={},
    )
    slow = slow_blas()
    if slow:
        if options.may_shorten:
            options.contexts = [SLOW_CONTEXT]  # the default would take an hour
        log(f"warning: {slow}")
        report.notes.append(slow)
    with tempfile.TemporaryDirectory(prefix="edgelora-benchmark-") as folder:
        if options.ladder:
            _run_ladder(options, report, Path(folder), log, keep)
            return report, None
        bench = _Bench(options, report, Path(folder), log)
        for tokens in options.contexts:
            report.contexts.append(bench.context(tokens))
            keep(report)
        return report, bench.step_memory() if options.output else None


class _Bench:
    def __init__(
        self, options: argparse.Namespace, report: BenchmarkReport, folder: Path, log: Log
    ) -> None:
        self._options, self._report, self._folder, self._log_line = options, report, folder, log
        lazy = _opened(options, log)
        self._model, self._dtype = (
            lazy.source,
            str(checked_blocks(lazy.model).hidden_dtype).rpartition(".")[2],
        )
        self._tokenizer = tokenizer_of(lazy.source)
        self._packed = "quantization" in lazy.config
        self._kernel = "auto"
        if options.kernel == "same" and self._packed:
            self._kernel = "fused"
        self._start = folder / "start.safetensors"
        write_start(lazy, options.rank, self._start)
        self._rivals = contenders(options.budgets, options.also, variants=not options.is_demo)
        self._last: tuple[TrainingJob, list] | None = None
        report.settings |= {
            "model": _name(options),
            "dtype": self._dtype,
            "quantized": self._packed,
            "kernel": resolve_kernel(self._kernel)[0] if self._packed else "of unpacked matrices",
            "batch": options.batch,
            "rank": options.rank,
            "adapted": "all linear layers of all blocks",
            "optimizer": f"AdamW, {options.learning_rate:g}",
            "rows": _rows_named(options),
            "timed steps": options.steps,
            "contexts": options.contexts,
        }
        if self._packed and self._kernel == "fused" and on_cpu():
            report.notes.append(
                "Both packages multiply with packed matrices, so that times compare the packages "
                "and not kernels; left to itself (--kernel auto) this one unpacks them on a CPU."
            )

    def context(self, tokens: int) -> ContextResults:
        """Measure all contenders at one context."""
        options = self._options
        job = self._job(tokens)
        config = config_of(job.with_(output=str(self._folder)))
        sort_rows(config, self._tokenizer)
        steps = batches(config, self._tokenizer, job.steps)
        plan_report(config)  # measures the machine's rates once for all contenders
        size = round(statistics.median(tokens for _, tokens, _ in steps))
        share = sum(labelled for *_, labelled in steps) / sum(tokens for _, tokens, _ in steps)
        found = ContextResults(tokens, size, share)
        self._log_line(f"{_name(options)}, {tokens} tokens")
        tolerance = tolerance_of(self._dtype)
        try:
            found.results = Comparison(job, self._folder, tolerance, self._log_line).run(
                self._rivals
            )
        except EdgeLoraError as error:
            found.failed = str(error)
            return found
        for result in found.results:
            if result.plan is not None:
                sliced = result.plan["mlp_bytes"] is not None
                result.kernels = kernels_differ(self._packed, self._kernel, sliced)
        found.movement = movement(found.results[0].losses, [rows for rows, *_ in steps])
        if found.movement is not None and found.movement < TELLING * tolerance.loss:
            self._report.notes.append(
                f"{tokens} tokens: mlx-lm's own loss moved by a share of {found.movement:.1e} "
                f"only, which is not {TELLING} times the tolerance of {tolerance.loss:g}: "
                "equal losses say little there, the comparison of the trained adapters decides."
            )
        self._last = job, found.results
        return found

    def step_memory(self) -> bytes | None:
        """A plot of the memory of one step within the last measured budget as PNG, or None."""
        if self._last is None:
            return None
        job, results = self._last
        own = [result for result in results if result.plan and isinstance(result.budget, int)]
        if not own:
            return None
        tightest = own[-1]
        folder = self._folder / "profile"
        options = job.options | {"memory_budget": tightest.budget, "memory_profile": str(folder)}
        rival = next(rival for rival in self._rivals if rival.name == tightest.name)
        running = ContenderProcess(
            rival, job.with_(options=options, steps=2, last=2), self._folder / "profiled"
        )
        try:
            running.start()
            running.step()
            running.finish()
            self._report.settings["step-memory.png"] = f"a step of {tightest.name}"
            return (folder / "memory.png").read_bytes()
        except (ContenderExited, OSError):
            return None
        finally:
            running.close()

    def _job(self, tokens: int) -> TrainingJob:
        options = self._options
        count = BATCHES * options.batch
        if options.data:
            rows = given_rows(options.data, count)
        else:
            words = words_for(self._model)
            rows = synthetic_rows(self._tokenizer, count, tokens, options.labelled, words)
        data = self._folder / f"data-{tokens}"
        masked = write_rows(data, rows)
        return TrainingJob(
            model=str(self._model),
            data=str(data),
            start=str(self._start),
            context=tokens,
            batch=options.batch,
            steps=1 + options.steps,
            last=1 + options.steps,
            rank=options.rank,
            scale=SCALE,
            learning_rate=options.learning_rate,
            mask_prompt=masked,
            options={"kernel": self._kernel, "spill_dir": str(options.cache)},
        )


def write_start(lazy: LazyModel, rank: int, file: Path) -> None:
    """Write initial LoRA matrices for all linear layers; B is not zero, so no gradient is zero.

    Args:
        lazy: the model; LoRA layers are added to it, and only their shapes are used.
        rank: rank of the matrices.
        file: file to write.
    """
    add_lora(lazy.model, -1, rank, SCALE)
    arrays = {}
    for number, (name, value) in enumerate(tree_flatten(lazy.model.trainable_parameters())):
        noise = mx.random.normal(value.shape, key=mx.random.key(number))
        if name.endswith("lora_a"):
            size = value.shape[-2] ** -0.5
        else:
            size = CHANGE / (SCALE * rank**0.5)
        arrays[name] = size * noise
    mx.save_safetensors(str(file), arrays)


def _opened(options: argparse.Namespace, log: Log) -> LazyModel:
    """The model, without reading its weights."""
    name = options.model
    if options.shape is not None:
        log(f"weights of {_name(options)} in {options.weights}")
        folder = checkpoint(options.cache, options.shape, options.blocks, options.weights)
        add_tokenizer(folder, SHAPES[options.shape][-1])
        name = str(folder)
    return open_model(name, streamed=False, quantize=None, cache=options.cache)


def _run_ladder(
    options: argparse.Namespace,
    report: BenchmarkReport,
    folder: Path,
    log: Log,
    keep: Callable[[BenchmarkReport], None],
) -> None:
    """Measure or estimate every row of the ladder at every context."""
    here = this_machine(options.cache, options.cache, mx.float32)
    table = PublishedTable(options.shape, options.blocks, here, folder, options.row_seconds, log)
    report.settings |= {"model": _name(options), "rank": RANK, "contexts": options.contexts}
    for tokens in options.contexts:
        for number, technique in enumerate(LADDER):
            job = None
            if table.too_much(technique, tokens) is None:
                job = _ladder_job(options, technique, tokens, folder / f"{tokens}-{number}", log)
            report.ladder.append(table.table_row(technique, tokens, job))
            keep(report)


def _ladder_job(
    options: argparse.Namespace, technique: object, tokens: int, folder: Path, log: Log
) -> TrainingJob:
    own_options = argparse.Namespace(**vars(options) | {"weights": technique.weights})
    lazy = _opened(own_options, lambda line: None)
    words, tokenizer = words_for(lazy.source), tokenizer_of(lazy.source)
    masked = write_rows(folder, synthetic_rows(tokenizer, 1, tokens, technique.labelled, words))
    start = folder / "start.safetensors"
    write_start(lazy, RANK, start)
    job = TrainingJob(
        model=str(lazy.source),
        data=str(folder),
        output=str(folder),
        start=str(start),
        context=tokens,
        batch=1,
        steps=2,
        last=2,
        rank=RANK,
        scale=SCALE,
        learning_rate=options.learning_rate,
        mask_prompt=masked,
        options={"spill_dir": str(options.cache), "dtype": "float32"},
    )
    plan_report(config_of(job))  # as in the comparison
    return job


def _name(options: argparse.Namespace) -> str:
    if options.shape is not None:
        return f"random {options.shape}, {options.blocks} of {SHAPES[options.shape][1]} blocks"
    return Path(options.model).name


def _rows_named(options: argparse.Namespace) -> str:
    if options.labelled is not None:
        return f"random words, {options.labelled:.0%} of the tokens labelled"
    return "of --data"
