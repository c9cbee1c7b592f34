"""A whole run: model, adapters, data, engine, loop. What the command line and users call."""

import dataclasses
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.config.train_config import MOST_LAYERS
from mlx_edgelora.data import Dataset, load_datasets
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.engine.adapter_state import AdapterState
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.optimizer import build_optimizer
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.measure.meter import peak_memory, reset_peak
from mlx_edgelora.measure.profile import Profile, recording
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel, error_text, quantize_in_place
from mlx_edgelora.model.headers import headers_of
from mlx_edgelora.model.loading import DTYPES, can_stream, open_model
from mlx_edgelora.model.lora import add_lora, freeze
from mlx_edgelora.planner.machine import converts_dtype, default_budget, free_memory
from mlx_edgelora.planner.report import PlanReport, with_smallest_plan
from mlx_edgelora.planner.run_plan import RunPlan, plan_request
from mlx_edgelora.storage.files import make_folder, user_cache, write_atomically
from mlx_edgelora.storage.stores import spill_folder
from mlx_edgelora.training import summary
from mlx_edgelora.training.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from mlx_edgelora.training.awake import keep_awake
from mlx_edgelora.training.callbacks import TrainingCallback, reporting_callbacks
from mlx_edgelora.training.evaluate import evaluate
from mlx_edgelora.training.failures import explain_failures
from mlx_edgelora.training.limits import PressureWatch, limits
from mlx_edgelora.training.log import RunLog, recorded
from mlx_edgelora.training.loop import TrainResult, train
from mlx_edgelora.training.rehearsal import rehearse
from mlx_edgelora.training.sampling import first_plan, measure_and_replan
from mlx_edgelora.training.throttle import DutyCycle
from mlx_edgelora.training.training_loss import check_loss, training_loss
from mlx_edgelora.training.verdict import Verdict, refuse_wrong
from mlx_edgelora.training.verification import verify

# So many engines are made at most until the best plan is known.
ENGINES = 4
# The largest number that math.exp takes is a little above it.
MAX_EXPONENT = 700.0
BFLOAT16 = (
    "note: the GPUs of M1 and M2 have no bfloat16 and convert it; --dtype float16 is faster, but "
    "the run stops if a number exceeds 65504"
)
# One of these holds the words of any tokenizer; without one transformers makes up an empty one.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def finetune(
    config: TrainConfig,
    callbacks: Sequence[TrainingCallback] = (),
    notify: Callable[[str], None] = print,
    log: RunLog | None = None,
) -> TrainResult | None:
    """Fine-tune a model, test it, or both, as `config` says.

    Args:
        config: every option of the run.
        callbacks: called with every report, as in `mlx_lm.tuner`.
        notify: called with every line to show: choices, warnings and test results.
        log: gets the records of the run, as `recorded` gives it; by default this function opens
            what config.log and config.report name.

    Returns:
        How training ended; None without training.

    Raises:
        EdgeLoraError: something the user can mend, in one sentence; no file is damaged.
    """
    config = _with_embedded(config)
    if not config.train:
        config = _with_saved_layers(config)
    optimizer = build_optimizer(config)  # refuses what it cannot use before anything slow
    callbacks = [*callbacks, *reporting_callbacks(config)]
    opened = recorded(config) if log is None else nullcontext(log)
    with opened as records, _explained_failures(config), keep_awake(config.caffeinate):
        note = _discard_record if records is None else records.note
        lazy = _adapted_model(config)
        config = _with_layers(config, lazy, notify)
        if converts_dtype(_dtype(config) or lazy.blocks.hidden_dtype):
            notify(BFLOAT16)
        tokenizer = _tokenizer(lazy)
        train_set, valid_set, test_set = _data(config, tokenizer, lazy.vocabulary, notify)
        facts = summary.facts(config, lazy, (train_set, valid_set, test_set))
        notify(summary.lines(facts))
        note("run", summary.run_record(config, facts))
        sets = [dataset for dataset in (train_set, valid_set, test_set) if dataset is not None]
        place = _spill_place(config)
        with _open_run(config, lazy, sets, place, notify) as (engine, chosen):
            check_loss(config, engine.head)
            note("plan", summary.plan_record(chosen))
            result = None
            if config.train and config.verify == "on":
                notify(_verification_line(engine, chosen, config))
            if config.train:
                folder, tiles = _cache(config), chosen.plan.loss_bytes
                wanted = training_loss(config, engine.head, train_set, folder, notify, tiles)
                with wanted as loss, _memory_profile(config, notify, records) as first:
                    engine.training_loss = loss
                    planned = chosen.plan
                    rehearse(engine, chosen, notify)
                    if chosen.plan != planned:
                        note("plan", summary.plan_record(chosen))
                    reset_peak()
                    watches = _BudgetWatch(engine, chosen, notify, note), PressureWatch(notify)
                    callbacks = [*first, *callbacks, *watches]
                    both = train_set, valid_set
                    result = train(engine, optimizer, config, *both, callbacks, None, records)
            if config.test:
                loss, tokens = evaluate(engine, test_set, config, config.test_batches)
                notify(_test_result(loss, tokens))
                note("test", {"loss": loss, "tokens": tokens})
    return result


@contextmanager
def open_engine(
    config: TrainConfig, log: Callable[[str], None] = print
) -> Iterator[tuple[Engine, object, int]]:
    """Load and adapt the model that `config` names and settle where everything lives.

    Gives the engine, the tokenizer and the size of the model's vocabulary.
    """
    lazy = _adapted_model(config)
    place = _spill_place(config)
    with _open_run(config, lazy, (), place, log) as (engine, _):
        yield engine, _tokenizer(lazy), lazy.vocabulary


@contextmanager
def open_planned(
    config: TrainConfig, log: Callable[[str], None] = print
) -> Iterator[tuple[Engine, RunPlan]]:
    """As `open_engine`, of a run whose rows all have max_seq_length tokens; gives its plan too."""
    with _explained_failures(config):
        lazy = _adapted_model(config)
        with _open_run(config, lazy, (), _spill_place(config), log) as settled:
            yield settled


def verification(config: TrainConfig, log: Callable[[str], None] = print) -> list[Verdict]:
    """Compare the gradients of a run with those of plain MLX, at the run's own lengths.

    Args:
        config: the options of the run; without data every row has max_seq_length tokens.
        log: gets a line for every choice made, and where rows are compared shorter.

    Returns:
        A verdict for each kind of block and each way in which the plan computes it, for the
        calls of blocks, and for the head with the loss.

    Raises:
        EdgeLoraError: as `finetune`.
    """
    with_data = bool(config.data or config.hf_dataset or config.model is None)
    if with_data:
        config = _with_embedded(config)
    with _explained_failures(config):
        lazy = _adapted_model(config)
        sets: Sequence = ()
        if with_data:
            found = _data(config, _tokenizer(lazy), lazy.vocabulary, lambda line: None)
            sets = [dataset for dataset in found if dataset is not None]
        place = _spill_place(config)
        with _open_run(config, lazy, sets, place, log) as (engine, chosen):
            free, _ = default_budget()
            return verify(engine, *_batch(chosen), _dtype(config), memory=free, log=log)


def plan_report(config: TrainConfig, labelled: float = 1.0) -> PlanReport:
    """Whether a run fits and how, from the headers of its model's shards alone.

    Args:
        config: the options of the run; without data every row has max_seq_length tokens.
        labelled: share of them with labels, without data.

    Raises:
        EdgeLoraError: as `finetune`, but not where the budget is too small.
    """
    sets: Sequence = ()
    if config.data or config.hf_dataset or config.model is None:
        config = _with_embedded(config)
    with _explained_failures(config), headers_of(config.model) as path:
        lazy = open_model(str(path), streamed=False, quantize=None, cache=_cache(config))
        if config.quantize is not None:
            quantize_in_place(lazy, config.quantize)
        _adapt(lazy, config)
        if config.data or config.hf_dataset:
            found = _data(config, _tokenizer(lazy), lazy.vocabulary, lambda line: None)
            sets = [dataset for dataset in found if dataset is not None]
        folder = Path(_spill_place(config)[0])
        request = plan_request(config, lazy, sets, user_cache(), folder, labelled)
        fits = True
        if request.choice is None:
            try:
                request = request.with_choice(request.search())
            except EdgeLoraError:
                request, fits = with_smallest_plan(request), False
        if config.plan_out is not None and fits:
            _write_plan(config, request)
        return PlanReport(request, fits)


def _adapted_model(config: TrainConfig, streamed: bool = False) -> LazyModel:
    """The model with adapters; nothing of it is read, unless it has to be rewritten first."""
    lazy = open_model(
        config.model, streamed=streamed, quantize=config.quantize, cache=_cache(config)
    )
    lazy.streamable = can_stream(lazy)
    mx.random.seed(config.seed)
    _adapt(lazy, config)
    return lazy


@contextmanager
def _engine(
    config: TrainConfig,
    lazy: LazyModel,
    chosen: RunPlan,
    place: tuple[str | Path, str],
    log: Callable[[str], None],
) -> Iterator[Engine]:
    plan, free = chosen.plan, free_memory()
    if plan.streams and not lazy.streamable:
        lazy = _adapted_model(config, streamed=True)
    folder, why = place
    settings = Settings(
        folder,
        config.dtype,
        CrossEntropy(plan.loss_bytes),
        load=lambda trained: _resume(trained, lazy.model, config),
        pause=DutyCycle(config.duty).pause,
        file_cache=None if free is None else max(0, free - chosen.choice.peak),
    )
    details = log if config.verbose else _discard
    if plan.spills or plan.adapters == "paged":
        details(f"scratch files in {folder} ({why})")
    with build_engine(lazy, plan, settings, details) as engine:
        yield engine


def _discard(line: str) -> None:
    """Where details are not asked for."""


def _discard_record(kind: str, facts: Any) -> None:
    """Where there is no log."""


@contextmanager
def _open_run(
    config: TrainConfig,
    lazy: LazyModel,
    sets: Sequence,
    place: tuple[str | Path, str],
    log: Callable[[str], None],
) -> Iterator[tuple[Engine, RunPlan]]:
    """The engine and the plan of the run, measured, told and written down; MLX's limits set."""
    request = plan_request(config, lazy, sets, user_cache(), Path(place[0]))
    chosen: RunPlan | None = request if request.given else first_plan(request)
    left = ENGINES
    while chosen is not None:
        log(chosen.table() if config.verbose else summary.memory(chosen))
        with limits(chosen) as limit, _engine(config, lazy, chosen, place, log) as engine:
            left -= 1
            another = (
                measure_and_replan(engine, chosen, log, stays=not left) if config.train else None
            )
            if another is None:
                _reserve(config, engine, chosen)
                limit(chosen)
                engine.empties_cache = chosen.is_tight
                if config.plan_out is not None:
                    _write_plan(config, chosen)
                engine.plan_for = chosen.plan_for
                yield engine, chosen
        chosen = another
        if chosen is not None:
            del engine
            lazy.replace_with(_adapted_model(config))
            gc.collect()  # engines hold themselves; two would not fit


def _reserve(config: TrainConfig, engine: Engine, chosen: RunPlan) -> None:
    """Take the disk space of the largest batch at once, where there is a backward."""
    if not config.train:
        return
    batch_shape = chosen.batch_shape.part(chosen.plan.micro_batches)
    engine.walk.reserve(
        batch_shape.rows, batch_shape.tokens, chosen.shape.hidden * chosen.shape.itemsize
    )


def _write_plan(config: TrainConfig, chosen: RunPlan) -> None:
    text = chosen.plan.json().encode()
    write_atomically({Path(config.plan_out): lambda file: file.write(text)})


class _BudgetWatch(TrainingCallback):
    """Compares the peak with the budget, and has less used where that was too little."""

    def __init__(
        self,
        engine: Engine,
        chosen: RunPlan,
        log: Callable[[str], None],
        note: Callable[[str, Any], None],
    ) -> None:
        self._engine, self._chosen, self._log, self._note = engine, chosen, log, note

    def on_train_loss_report(self, train_info: dict) -> None:
        """Called at every report."""
        peak = peak_memory()
        message = f"the peak of {size(peak)} is higher than expected"
        try:
            plan = self._chosen.replan(peak, anew=False)
        except EdgeLoraError as error:
            self._log(f"{message}; the run continues, but {error}")
            return
        if plan is not None:
            self._engine.set_plan_and_residency(plan)
            self._log(f"{message}; new plan\n{summary.memory(self._chosen)}")
            self._note("plan", summary.plan_record(self._chosen))


def _with_embedded(config: TrainConfig) -> TrainConfig:
    data = config.data or (None if config.hf_dataset else str(DATA_PATH))
    return dataclasses.replace(config, model=config.model or str(MODEL_PATH), data=data)


def _verification_line(engine: Engine, chosen: RunPlan, config: TrainConfig) -> str:
    """One line about the light form of `verification`; raises where it does not agree."""
    start = time.perf_counter()
    verdicts = verify(engine, *_batch(chosen), _dtype(config), light=True)
    refuse_wrong(verdicts)
    error, spent = max(verdict.error for verdict in verdicts), time.perf_counter() - start
    message = f"{len(verdicts)} comparisons with plain MLX (error {error:.0e}, {spent:.1f} s)"
    return summary.line("gradients", f"equal in {message}")


def _batch(chosen: RunPlan) -> tuple[int, int]:
    """Rows and tokens of the largest piece of a batch that is computed at once."""
    return -(-chosen.batch_shape.rows // chosen.plan.micro_batches), chosen.batch_shape.tokens


def _dtype(config: TrainConfig) -> mx.Dtype | None:
    return DTYPES[config.dtype] if config.dtype else None


def _with_saved_layers(config: TrainConfig) -> TrainConfig:
    """For a test alone: the adapter in `adapter_path` says what its layers look like."""
    if config.resume_adapter_file is not None:
        raise EdgeLoraError(
            f"resume_adapter_file: got {config.resume_adapter_file!r} without training, but a test "
            "evaluates the adapter in adapter_path; leave it out, or train"
        )
    if not config.adapter_path:  # the base model, as in mlx-lm
        return config
    path = Path(config.adapter_path) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
        layers = {key: saved[key] for key in ("num_layers", "lora_parameters")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(
            f"{path}: not the configuration of an adapter ({error_text(error)}); name the folder "
            "of a trained adapter, or test the base model with --adapter-path ''"
        ) from error
    like = TrainConfig.from_dict(layers, str(path))
    return dataclasses.replace(
        config,
        num_layers=like.num_layers,
        lora_parameters=like.lora_parameters,
        resume_adapter_file=str(Path(config.adapter_path) / WEIGHTS_FILE),
    )


def _tokenizer(lazy: LazyModel) -> object:
    path = lazy.source
    if not any(found for pattern in TOKENIZER_FILES for found in path.glob(pattern)):
        raise EdgeLoraError(
            f"{path}: has no tokenizer, expected a file such as tokenizer.json; "
            "download the model again"
        )
    try:
        return load_tokenizer(path, eos_token_ids=lazy.config.get("eos_token_id"))
    except Exception as error:  # bare ones are what the package tokenizers raises
        raise EdgeLoraError(
            f"{path}: the tokenizer cannot be loaded ({error_text(error)}); download the model "
            "again"
        ) from error


def _adapt(lazy: LazyModel, config: TrainConfig) -> None:
    """Add what is trained; then, before anything else looks at it, see that it can be walked."""
    lora, model = config.lora_parameters, lazy.model
    if config.train or config.resume_adapter_file is not None:
        count = _default_layers(model) if config.num_layers is None else config.num_layers
        add_lora(model, count, lora.rank, lora.scale, lora.dropout, lora.keys)
    else:
        freeze(model)
    lazy.blocks = checked_blocks(model)


def _default_layers(model: nn.Module) -> int:
    return min(MOST_LAYERS, len(model.layers))


def _with_layers(config: TrainConfig, lazy: LazyModel, log: Callable[[str], None]) -> TrainConfig:
    """The number of adapted blocks as a number, which the adapter's configuration holds."""
    if config.num_layers is not None or not config.train:
        return config
    count = _default_layers(lazy.model)
    if count < MOST_LAYERS:
        log(f"num_layers: all {count} blocks are adapted (by default the last {MOST_LAYERS})")
    return dataclasses.replace(config, num_layers=count)


def _resume(trained: AdapterState, model: nn.Module, config: TrainConfig) -> None:
    if config.resume_adapter_file is not None:
        shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
        trained.load(read_adapter_weights(config.resume_adapter_file, shapes))


def _data(
    config: TrainConfig, tokenizer: object, vocabulary: int, log: Callable[[str], None]
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    sets = load_datasets(config, tokenizer)
    if config.train and config.val_batches and sets[1] is None:
        log("note: the data has no valid set, so no validation runs")
    for dataset in sets:
        if dataset is None:
            continue
        dataset.check_vocabulary(vocabulary)
        if warning := dataset.report.warning():
            log(f"warning: {warning}")
    return sets


def _test_result(loss: float, tokens: int) -> str:
    if not math.isfinite(loss):
        raise EdgeLoraError(
            f"test loss is {loss} on {tokens} tokens, expected a finite number; test another "
            "adapter, or the base model with --adapter-path ''"
        )
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return f"test loss {loss:.3f}, perplexity {perplexity:.3f} on {tokens} tokens"


def _spill_place(config: TrainConfig) -> tuple[str | Path, str]:
    """The folder of scratch files, and why it is this one."""
    if config.spill_dir:
        return config.spill_dir, "set by --spill-dir"
    return spill_folder([tempfile.gettempdir(), user_cache()])


def _cache(config: TrainConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else user_cache()


def _explained_failures(config: TrainConfig) -> AbstractContextManager:
    """For what comes before and after training, which knows itself what is on disk."""
    return explain_failures(
        f"an adapter saved before is unchanged in {config.adapter_path or 'its folder'}"
    )


@contextmanager
def _memory_profile(
    config: TrainConfig, notify: Callable[[str], None], log: RunLog | None
) -> Iterator[list[TrainingCallback]]:
    """Record where the memory of a step goes, for the log and the files that are asked for.

    Gives the callbacks that this takes: of a run that does not end well the first step is logged.
    """
    if config.memory_profile is None and log is None:
        yield []
        return
    if config.memory_profile is not None:
        make_folder(Path(config.memory_profile))
    with recording() as profile:
        yield [] if log is None else [_FirstStep(profile, log)]
    if log is not None:
        log.note("step_memory", profile.rows())
    if config.memory_profile is not None:
        _write_profile(Path(config.memory_profile), profile, notify)


class _FirstStep(TrainingCallback):
    """Logs the memory of the step before the first report."""

    def __init__(self, profile: Profile, log: RunLog) -> None:
        self._profile, self._log = profile, log
        self._done = False

    def on_train_loss_report(self, train_info: dict) -> None:
        """Called at every report."""
        if not self._done:
            self._done = True
            self._log.note("step_memory", self._profile.rows())


def _write_profile(folder: Path, profile: Profile, notify: Callable[[str], None]) -> None:
    """Write down where the memory of the last step went, and print it."""
    writers = {folder / "memory.json": lambda file: file.write(profile.json().encode())}
    if find_spec("matplotlib") is not None:
        writers[folder / "memory.png"] = profile.plot
    write_atomically(writers)
    notify(f"memory of the last step ({', '.join(map(str, writers))}):\n{profile.table()}")
