"""Inspect a run without training: verify its gradients, report its plan, read its data."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import Dataset, load_datasets
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.text import say
from mlx_edgelora.model.checkpoint import quantize_in_place
from mlx_edgelora.model.headers import headers_of
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner.machine import default_budget
from mlx_edgelora.planner.report import PlanReport, with_smallest_plan
from mlx_edgelora.planner.run_plan import plan_request
from mlx_edgelora.storage.files import user_cache
from mlx_edgelora.training.opening import (
    adapt,
    adapted_model,
    adapter_to_start,
    cache_folder,
    dtype_of,
    explained_failures,
    has_data,
    largest_piece,
    open_run,
    read_sets,
    spill_place,
    with_embedded,
    write_plan,
)
from mlx_edgelora.training.verdict import Verdict
from mlx_edgelora.training.verification import verify


def verification(config: TrainConfig, log: Callable[[str], None] = say) -> list[Verdict]:
    """Compare the gradients of a run with those of plain MLX, at the run's own row lengths.

    Args:
        config: options of the run; without data every row has max_seq_length tokens.
        log: called with a line for every choice, and with a note if shorter rows are compared.

    Returns:
        One verdict for the calls of blocks, one for each kind of block and each way in which the
        plan computes it, and one for the head with the loss.

    Raises:
        EdgeLoraError: as in `finetune`.
    """
    with_data = has_data(config)
    if with_data:
        config = with_embedded(config)
    with explained_failures(config):
        lazy = adapted_model(config)
        sets: Sequence = ()
        if with_data:
            found = read_sets(config, load_tokenizer_of(lazy), lazy.vocabulary, lambda line: None)
            sets = [dataset for dataset in found if dataset is not None]
        place = spill_place(config)
        with open_run(config, lazy, sets, place, log, adapter_to_start(config)) as (engine, chosen):
            free, _ = default_budget()
            return verify(engine, *largest_piece(chosen), dtype_of(config), memory=free, log=log)


def plan_report(config: TrainConfig, labelled: float = 1.0) -> PlanReport:
    """Find the memory plan of a run; of the weights only the headers of the files are read.

    Args:
        config: options of the run; without data every row has max_seq_length tokens.
        labelled: share of tokens with labels; used without data.

    Returns:
        The plan and whether it fits the budget. If none fits, this is the smallest plan.

    Raises:
        EdgeLoraError: as in `finetune`, except for a budget that is too small.
    """
    sets: Sequence = ()
    if has_data(config):
        config = with_embedded(config)
    with explained_failures(config), headers_of(config.model) as path:
        lazy = open_model(str(path), streamed=False, quantize=None, cache=cache_folder(config))
        if config.quantize is not None:
            quantize_in_place(lazy, config.quantize)
        adapt(lazy, config)
        if config.data or config.hf_dataset:
            found = read_sets(config, load_tokenizer_of(lazy), lazy.vocabulary, lambda line: None)
            sets = [dataset for dataset in found if dataset is not None]
        folder = Path(spill_place(config)[0])
        request = plan_request(config, lazy, sets, user_cache(), folder, labelled)
        fits = True
        if request.choice is None:
            try:
                request = request.with_choice(request.search())
            except EdgeLoraError:
                request, fits = with_smallest_plan(request), False
        if config.plan_out is not None and fits:
            write_plan(config, request)
        return PlanReport(request, fits)


def read_data(
    config: TrainConfig, log: Callable[[str], None] = print
) -> tuple[tuple[Dataset | None, Dataset | None, Dataset | None], object]:
    """Read the data sets and the tokenizer of a run, without the weights of the model.

    Args:
        config: options of the run.
        log: called with lines about the source of the rows.

    Returns:
        The training, validation and test sets, None for a set that is not needed, and the
        tokenizer.

    Raises:
        EdgeLoraError: as in `finetune`.
    """
    config = with_embedded(config)
    with explained_failures(config), headers_of(config.model) as path:
        lazy = open_model(str(path), streamed=False, quantize=None, cache=cache_folder(config))
        tokenizer = load_tokenizer_of(lazy)
        sets = load_datasets(config, tokenizer, log)
        for dataset in sets:
            if dataset is not None:
                dataset.check_vocabulary(lazy.vocabulary)
        return sets, tokenizer
