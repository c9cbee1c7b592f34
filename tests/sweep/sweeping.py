"""Every architecture of mlx-lm, trained here and by plain MLX: are the gradients the same?

For each configuration of `configs.json` a random float32 model is quantized to 4 bits, written,
and loaded again with LoRA on all of mlx-lm's default keys. Plain `nn.value_and_grad` says what its
gradients are on 2 rows of 40 tokens, 40 % of them labelled. The runs are compared with it:

    whole       Plan(): whole blocks, streamed from disk, their inputs spilled
    tiles       the least memory: tiles of 8 tokens, MLPs by rows of 8 KiB, head tiles of 16 KiB
    kept        the weights resident, all blocks' activations kept
    long        a second step of whole, with attention by tiles, as long enough rows have it
    long tiles  one of tiles, with the same
    drop-in     mlx_edgelora.value_and_grad around an ordinary loss
    plan        the report of `python -m mlx_edgelora.plan`, which has to answer
"""

import copy
import importlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from harness import (
    Batch,
    norm,
    plain,
    plain_value_and_grad,
    random_batch,
    randomize,
    resolution,
)
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import load_model, save_config, save_model

from mlx_edgelora import EdgeLoraError, LoraParameters, TrainConfig, value_and_grad
from mlx_edgelora.blocks import attention
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.layers import attention as layers_attention
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.training.inspecting import plan_report

CONFIGS = Path(__file__).parent / "configs.json"
ROWS, TOKENS, WORDS = 2, 40, 90
LORA = {"rank": 4, "scale": 3.0}
QUANTIZATION = {"bits": 4, "group_size": 32}
# Processes at a time; each takes one core.
WORKERS = int(os.environ.get("SWEEP_WORKERS", "2"))
# Of the norm of an array; more is exact only where float32 leaves it open, and never the most.
EXACT, MOST = 1e-5, 1e-2

PLANS = {
    "whole": Plan(),
    "tiles": Plan(
        prefetch=False,
        adapters="paged",
        tile_tokens=8,
        mlp_bytes=32768,
        mlp_weights="rows",
        key_tokens=16,
        loss_bytes=16 * 1024,
    ),
    "kept": Plan(streamed_blocks=0, head="resident", kept_blocks=10**6, inputs="memory"),
}
RUNS = ("whole", "tiles", "kept", "long", "long tiles", "drop-in", "plan")

# Of these no gradients are compared, for reasons that are not this package's.
EXCUSED = {
    "bitnet": "its layers are made for Metal alone",
    "deepseek_v41": "mlx-lm cannot differentiate it (gather_axis has no gradient of indices)",
    "muse_spark": "its layers are made for Metal alone",
    "olmo": "its module exits without the package ai2-olmo",
    "phi3small": "mlx-lm's gradients of it are not finite, and finding them ends the process",
    "prism_hadamard_qwen35": "its checkpoints are packed by a tool of their own",
    "recurrent_gemma": "mlx-lm cannot adapt it (its model has no _no_grad, so it does not freeze)",
}
# Of those, the ones whose plain gradients are not asked for: on a CPU that ends the process.
DEADLY = ("phi3small",)
# mlx-lm itself reads `.weight` of these, which its LoRA layer does not have.
NOT_ADAPTED = {"gemma3n": ("_coefs",), "kimi_k3": ("_res_proj",)}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: "exact", "wrong", "refused" (an EdgeLoraError), "crashed" (any other exception),
            or "answered" where nothing is computed.
        text: of the exception, or what else went wrong.
        error: the largest difference of an array, relative to its norm.
        where: that array.
        seconds: that the run took.
    """

    state: str
    text: str = ""
    error: float | None = None
    where: str = ""
    seconds: float = 0.0

    @property
    def fails(self) -> bool:
        """Whether it must never happen."""
        return self.state in ("wrong", "crashed")


@dataclass
class Result:
    """All runs of a configuration.

    Attributes:
        name: MODULE or MODULE:VARIANT.
        runs: by their names; without a reference there is the plan's alone.
        blocks: of the model.
        tiled: so many of them `tiles` computes by tiles; None where it did not get there.
        whole: why not the others.
        unbuilt: why there is no model, or none that computes anything on this machine.
        untrainable: why plain mlx-lm has no gradients of it.
        died: what is known of the end of the process that ran it.
    """

    name: str
    runs: dict[str, Outcome] = field(default_factory=dict)
    blocks: int = 0
    tiled: int | None = None
    whole: str = ""
    unbuilt: str = ""
    untrainable: str = ""
    died: str = ""

    @property
    def missing(self) -> str:
        """Why it was not compared, if it was not."""
        return self.unbuilt or self.untrainable or self.died

    def problems(self) -> list[str]:
        """What is wrong with it, a line each; none of a configuration that is as it has to be."""
        lines = [f"{self.name}: {self.died}"] if self.died else []
        for run, outcome in self.runs.items():
            if outcome.fails:
                lines.append(f"{self.name}: {run} is {outcome.state}: {outcome.text}")
        refusals = {run: o.text for run, o in self.runs.items() if o.state == "refused"}
        if self.missing or not refusals:
            return lines
        if others := [run for run in self.runs if run not in refusals]:
            texts = "; ".join(sorted(set(refusals.values())))
            lines.append(
                f"{self.name}: {', '.join(refusals)} refused, but not {', '.join(others)}: {texts}"
            )
        if len(set(refusals.values())) > 1:
            texts = "; ".join(f"{run}: {text}" for run, text in refusals.items())
            lines.append(f"{self.name}: refused for different reasons: {texts}")
        return lines


# ---- the model and what its gradients are


def configurations() -> dict[str, dict[str, Any]]:
    """All of `configs.json`, by name."""
    return json.loads(CONFIGS.read_text())


def write(name: str, config: Mapping[str, Any], folder: Path) -> int:
    """Write a random checkpoint; gives the number of its blocks."""
    module = importlib.import_module(f"mlx_lm.models.{name.partition(':')[0]}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    model.update(tree_map_with_path(_random, model.parameters()))
    skipped = NOT_ADAPTED.get(name, ())

    def packable(path: str, layer: nn.Module) -> bool:
        if not hasattr(layer, "to_quantized") or not hasattr(layer, "weight"):
            return False
        # nn.quantize names a mode, which afm7's FusedLinear does not know.
        known = "mode" in inspect.signature(layer.to_quantized).parameters
        fits = layer.weight.ndim > 1 and layer.weight.shape[-1] % QUANTIZATION["group_size"] == 0
        return known and fits and not path.endswith(skipped)

    nn.quantize(model, **QUANTIZATION, class_predicate=packable)
    save_model(folder, model)
    settings = json.loads(json.dumps(config)) | {"quantization": QUANTIZATION}
    save_config(settings, folder / "config.json")
    return len(model.layers)


def _random(name: str, value: mx.array) -> mx.array:
    """Every parameter random and float32, norms included."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    if value.ndim > 1:
        inputs = value.shape[-1] if value.shape[-1] > 1 else value.shape[-2]  # a convolution's
        return mx.random.normal(value.shape) * (0.5 / inputs**0.5)
    return value.astype(mx.float32) + 0.1 * mx.random.normal(value.shape)


def adaptable(name: str, model: nn.Module) -> list[str] | None:
    """The keys of what is adapted; None, mlx-lm's default, where it can be used."""
    if name not in NOT_ADAPTED:
        return None
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    found = {p for b in model.layers for p, m in b.named_modules() if isinstance(m, kinds)}
    return sorted(path for path in found if not path.endswith(NOT_ADAPTED[name]))


class Reference:
    """Plain MLX's loss and gradients of a batch, and how finely float32 defines them.

    Raises:
        ArithmeticError: they are not finite.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.loss, gradients = plain_value_and_grad(model, batch)
        self.gradients = dict(tree_flatten(gradients))
        self.sizes = {name: norm(value) for name, value in self.gradients.items()}
        if not all(map(math.isfinite, [self.loss, *self.sizes.values()])):
            raise ArithmeticError("loss or gradients are not finite")
        if not any(self.sizes.values()):
            raise ArithmeticError("all gradients are zero")
        self._moves = resolution(model, batch)

    def compare(self, loss: mx.array, gradients: Mapping[str, Any]) -> Outcome:
        """Whether a run found the same: exactly, or as exactly as float32 defines it."""
        got = dict(tree_flatten(gradients))
        if odd := sorted(got.keys() ^ self.gradients.keys()):
            return Outcome("wrong", f"gradients of {', '.join(odd[:3])} on one side only")
        errors = {"loss": abs(loss.item() - self.loss) / abs(self.loss)}
        for name, value in self.gradients.items():
            # Of an array that gets no gradient the difference itself.
            errors[name] = norm(got[name].astype(mx.float32) - value) / (self.sizes[name] or 1.0)
        where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        over = [name for name, error in errors.items() if not error <= self._most(name, error)]
        text = f"{len(over)} of {len(errors)} arrays are off" if over else ""
        return Outcome("wrong" if over else "exact", text, errors[where], where)

    def _most(self, name: str, error: float) -> float:
        if error <= EXACT or name == "loss" or not self.sizes[name]:
            return EXACT
        return min(MOST, max(EXACT, 10 * self._moves()[name] / self.sizes[name]))


# ---- the runs


@dataclass
class Case:
    """What the runs of a configuration are given; without a reference, the plan's run only."""

    folder: Path
    keys: list[str] | None
    batch: Batch
    reference: Reference | None = None


@contextmanager
def _opened(case: Case, plan: Plan, notify: Callable[[str], None]) -> Iterator[Engine]:
    lazy = open_model(
        str(case.folder), streamed=plan.streams, quantize=None, cache=case.folder / "cache"
    )
    add_lora(lazy.model, -1, **LORA, keys=case.keys)
    randomize(lazy.model)
    with build_engine(lazy, plan, Settings(str(case.folder)), notify) as engine:
        yield engine


def _walked(case: Case, engine: Engine) -> Outcome:
    (loss, _), gradients = engine.value_and_grad(case.batch)
    return case.reference.compare(loss, gradients)


def _dropped_in(case: Case) -> Outcome:
    model = plain(case.folder, keys=case.keys)
    inputs, targets = mx.array(case.batch.inputs()), mx.array(case.batch.labels())
    labelled = mx.array(case.batch.mask)

    def loss() -> mx.array:
        logits = model(inputs).astype(mx.float32)
        return (nn.losses.cross_entropy(logits, targets) * labelled).sum() / labelled.sum()

    return case.reference.compare(*value_and_grad(model, loss)())


def _planned(case: Case) -> Outcome:
    config = TrainConfig(
        model=str(case.folder),
        max_seq_length=TOKENS + 1,
        batch_size=ROWS,
        num_layers=-1,
        lora_parameters=LoraParameters(**LORA, keys=case.keys),
        memory_budget=10**9,
        spill_dir=tempfile.gettempdir(),  # whose disk is measured once
        cache_dir=str(case.folder / "cache"),
    )
    report = plan_report(config, labelled=0.4)
    return Outcome("answered", f"{report.smallest.needs} bytes at least")


@contextmanager
def _long_rows() -> Iterator[None]:
    """Let 40 tokens be as many for attention as 2048 are: some tiles of scores."""
    with (
        patch.object(attention, "TILE_BYTES", 1024),
        patch.object(layers_attention, "TILE_BYTES", 4096),
    ):
        yield


def _runs(
    case: Case, notify: Callable[[str], None], engines: ExitStack
) -> dict[str, Callable[[], Outcome]]:
    """All runs by name, those of one engine after one another.

    Args:
        case: the case.
        notify: gets the lines of `tiles`.
        engines: closes the one that is open.
    """
    opened: dict[str, Engine] = {}

    def engine(name: str) -> Engine:
        if name not in opened:
            close()
            tell = notify if name == "tiles" else _ignore
            opened[name] = engines.enter_context(_opened(case, PLANS[name], tell))
        return opened[name]

    def close() -> None:
        opened.clear()
        engines.close()

    def long(name: str) -> Outcome:
        # What prepares an engine computes a few tokens, however long rows are.
        prepared = engine(name)
        with _long_rows():
            return _walked(case, prepared)

    def drop_in() -> Outcome:
        close()
        return _dropped_in(case)

    return {
        "whole": lambda: _walked(case, engine("whole")),
        "long": lambda: long("whole"),
        "tiles": lambda: _walked(case, engine("tiles")),
        "long tiles": lambda: long("tiles"),
        "kept": lambda: _walked(case, engine("kept")),
        "drop-in": drop_in,
        "plan": lambda: _planned(case),
    }


def _ignore(line: str) -> None:
    pass


def outcome(run: Callable[[], Outcome]) -> Outcome:
    """How a run ends, however it does."""
    start = time.perf_counter()
    try:
        found = run()
    except EdgeLoraError as error:
        found = Outcome("refused", str(error))
    except Exception as error:  # noqa: BLE001 - whatever comes out of a run is its outcome
        found = Outcome("crashed", _one_line(error))
    return replace(found, seconds=round(time.perf_counter() - start, 3))


def _one_line(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


# ---- configurations


@contextmanager
def uncompiled() -> Iterator[None]:
    """Without mx.compile, which takes two thirds of the time of models this small."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


@contextmanager
def modules_forgotten() -> Iterator[None]:
    """Unload what was imported of mlx-lm's architectures.

    With all of them every search for whoever holds mlx-lm's attention (`blocks/attention.py`)
    takes a millisecond.
    """
    known = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - known:
            package, _, own = name.rpartition(".")
            if package == mlx_lm.models.__name__:
                del sys.modules[name]
                delattr(mlx_lm.models, own)


def examine(name: str, config: Mapping[str, Any], runs: Sequence[str] = RUNS) -> Result:
    """Build, write and run a configuration."""
    result = Result(name)
    with (
        uncompiled(),
        modules_forgotten(),
        tempfile.TemporaryDirectory(prefix="sweep-") as folder,
    ):
        try:
            result.blocks = write(name, config, Path(folder))
            keys = adaptable(name, load_model(Path(folder), lazy=True)[0])
        except (Exception, SystemExit) as error:  # noqa: BLE001 - olmo exits without its package
            result.unbuilt = _one_line(error)
            return result
        case = Case(Path(folder), keys, random_batch(ROWS, TOKENS, WORDS))
        _refer(case, result)
        notes: list[str] = []
        with ExitStack() as engines:
            for run, function in _runs(case, notes.append, engines).items():
                if run == "plan" or (case.reference and run in runs):
                    result.runs[run] = outcome(function)
        result.tiled, result.whole = tiled_blocks(notes)
    mx.clear_cache()
    return result


def _refer(case: Case, result: Result) -> None:
    """Find the reference of a case, or why it has none."""
    if result.name in DEADLY:
        result.untrainable = EXCUSED[result.name]
        return
    try:
        mx.eval(load_model(case.folder)[0](mx.zeros((1, 4), mx.int32)))
    except Exception as error:  # noqa: BLE001 - mlx-lm's own, of any type
        result.unbuilt = _one_line(error)
        return
    try:
        case.reference = Reference(plain(case.folder, keys=case.keys), case.batch)
    except Exception as error:  # noqa: BLE001 - mlx-lm's own, of any type
        result.untrainable = _one_line(error)


def tiled_blocks(notes: Sequence[str]) -> tuple[int | None, str]:
    """How many blocks are computed by tiles, and why not the others, from what a run tells."""
    for note in notes:
        if found := re.match(r"tiles: .* in (\d+) of \d+ blocks(?: \((.*)\))?$", note, re.DOTALL):
            return int(found[1]), " ".join((found[2] or "").split())
    return None, ""


Examine = Callable[[str, Mapping[str, Any]], Result]


def sweep(
    configs: Mapping[str, Mapping[str, Any]], workers: int = WORKERS, examine: Examine = examine
) -> Iterator[Result]:
    """Examine configurations in other processes; results come as they are ready.

    Where a process dies, what was not done yet is done again, each in a process of its own: the
    one that dies again is a result as well.
    """
    left = dict(configs)
    with _surroundings(), _processes(workers) as pool:
        futures = [pool.submit(examine, name, config) for name, config in configs.items()]
        for future in as_completed(futures):
            with suppress(BrokenProcessPool):
                result = future.result()
                del left[result.name]
                yield result
    for name, config in left.items():
        yield alone(name, config, examine)


def alone(name: str, config: Mapping[str, Any], examine: Examine = examine) -> Result:
    """Examine a configuration in a process of its own, whose death is a result."""
    with _surroundings(), _processes(1) as pool:
        try:
            return pool.submit(examine, name, config).result()
        except BrokenProcessPool:
            return Result(name, died="its process ended without a word")


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


@contextmanager
def _surroundings() -> Iterator[None]:
    """Of new processes: one thread each for products this small, and a cache that is not kept."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as cache:
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with patch.dict(os.environ, threads | {"XDG_CACHE_HOME": cache}):
            yield
