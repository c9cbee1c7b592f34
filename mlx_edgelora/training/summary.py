"""The header of a run: its model, data, adapters, optimizer, memory budget and plan."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.utils import get_total_parameters

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.config.losses import preference_loss
from mlx_edgelora.data import Dataset
from mlx_edgelora.data.batches import count_batches, padding_share
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH, PREFERENCES_PATH
from mlx_edgelora.losses.preferences import KTO, SIMPO
from mlx_edgelora.measure.text import named_rows
from mlx_edgelora.measure.units import duration, size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.planner.report import PlanReport
from mlx_edgelora.planner.run_plan import RunPlan

NAMES = 11
# Packing is recommended if it divides the number of batches of an epoch by at least this.
FEWER = 2
# Arrays of the optimizer's state for each trained one.
MOMENTS = {"adam": 2, "adamw": 2, "muon": 1}
# Adapters over experts are mentioned if they and their moments are this share of the model.
MANY_ADAPTERS = 0.1
EMBEDDED = "the tiny model of this package"


def facts(
    config: TrainConfig,
    lazy: LazyModel,
    sets: Sequence[Dataset | None],
    about_rows: Sequence[str] = (),
) -> dict[str, str]:
    """Descriptions of the model, the data, the adapters and the optimizer, by name.

    Args:
        config: options of the run.
        lazy: the adapted model.
        sets: training, validation and test set; None for a set that is not needed.
        about_rows: lines about the source of the rows.
    """
    rows = {"model": _model(lazy), "data": _data(config, sets)}
    if about_rows:
        rows["rows"] = "; ".join(about_rows)
    rows["tokens"] = _tokens(config, sets)
    if config.compares_answers:
        rows["loss"] = _loss(config)
    if config.train:
        rows |= {"batches": _batches(config, sets[0])}
        rows |= {"adapters": _adapters(config, lazy), "optimizer": _optimizer(config)}
    return rows


def run_record(config: TrainConfig, facts: Mapping[str, str]) -> dict[str, Any]:
    """The value of the log's record `run`, written when a run begins."""
    return {
        "model": EMBEDDED if config.model == str(MODEL_PATH) else config.model,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": _version(),
        "iters": config.iters if config.train else None,
        "facts": dict(facts),
        "options": config.to_dict(),
    }


def packing_advice(config: TrainConfig, train_set: Dataset) -> str | None:
    """A recommendation of packing; None if it is on, or if it would not halve the steps."""
    if config.packing or config.compares_answers:
        return None
    settings = train_set, config.batch_size, config.max_seq_length
    now, then = (count_batches(*settings, seed=config.seed, packing=p) for p in (False, True))
    if now < FEWER * then:
        return None
    shares = [padding_share(*settings, seed=config.seed, packing=p) for p in (False, True)]
    fewer = 1 - (1 - shares[0]) / (1 - shares[1])
    text = f"rows are short: with --packing an epoch has {then:,} batches instead of {now:,}"
    # A row of few rows may have more padding than they had apart.
    return text if fewer < 0.01 else f"{text}, and {100 * fewer:.0f} % fewer tokens are computed"


def line(name: str, text: str) -> str:
    """A single line in the format of the header."""
    return lines({name: text})


def memory(chosen: RunPlan) -> str:
    """Lines about the budget, the expected peak and step time, and the plan."""
    choice, most = chosen.choice, chosen.budget.bytes
    limit = "no limit" if most is None else size(most)
    measured = ", by formula" if chosen.measurements.is_empty else ""
    expected = f"{size(choice.peak)} and {duration(choice.seconds)} a step expected{measured}"
    return lines(
        {
            "memory": f"{limit} ({chosen.budget.why}); {expected}",
            "plan": chosen.plan.summary(chosen.shape.blocks),
        }
    )


def plan_record(chosen: RunPlan) -> dict[str, Any]:
    """The value of the log's record `plan`; sizes in bytes, times in seconds."""
    choice = chosen.choice
    return {
        "budget_bytes": chosen.budget.bytes,
        "budget_reason": chosen.budget.why,
        "expected_peak_bytes": choice.peak,
        "expected_seconds": choice.seconds,
        "phases": PlanReport(chosen, True).phases(),
        "rows": dict(chosen.plan.rows(chosen.shape.blocks)),
    }


def _version() -> str | None:
    try:
        return version("mlx-edgelora")
    except PackageNotFoundError:  # the package is not installed
        return None


def _model(lazy: LazyModel) -> str:
    path = lazy.checkpoint.path
    name = EMBEDDED if path == MODEL_PATH else _short(path)
    bits = (lazy.config.get("quantization") or {}).get("bits")
    packed = f", {bits}-bit" if bits else ""
    total = _count(get_total_parameters(lazy.model))
    return f"{name} ({len(lazy.model.layers)} blocks, {total} parameters{packed})"


def _data(config: TrainConfig, sets: Sequence[Dataset | None]) -> str:
    found = []
    for name, rows in zip(("training", "validation", "test"), sets, strict=False):
        if rows is not None:
            found.append(f"{rows.examples:,} {_unit(config)} for {name}")
    own = (str(DATA_PATH), str(PREFERENCES_PATH))
    place = config.data if config.data and config.data not in own else None
    where = f"{_short(Path(place))}: " if place else ""
    return f"{where}{', '.join(found)}"


def _unit(config: TrainConfig) -> str:
    return "pairs" if config.compares_pairs else "rows"


def _loss(config: TrainConfig) -> str:
    """The loss of preferences with its options."""
    loss = preference_loss(config)
    words = [loss.name, f"beta {loss.beta:g}"]
    if loss.name == SIMPO:
        words.append(f"gamma {loss.gamma:g}")
    if loss.name == KTO:
        words.append(
            f"weights {loss.desirable_weight:g} of desirable and {loss.undesirable_weight:g} of "
            "undesirable answers"
        )
    reference = "; reference: the model without its adapter" if loss.has_reference else ""
    return f"{', '.join(words)}{reference}"


def _tokens(config: TrainConfig, sets: Sequence[Dataset | None]) -> str:
    """Of the first set; the longest row is that of all sets."""
    first = next(rows for rows in sets if rows is not None)
    tokens, labels = first.count_tokens()
    longest = max(rows.report.longest for rows in sets if rows is not None)
    return (
        f"{tokens:,}, {100 * labels / tokens:.0f} % of them labels; longest row "
        f"{min(longest, config.max_seq_length):,} tokens"
    )


def _batches(config: TrainConfig, train_set: Dataset) -> str:
    settings = train_set, config.batch_size, config.max_seq_length
    options = {"seed": config.seed, "packing": config.packing}
    count, share = count_batches(*settings, **options), padding_share(*settings, **options)
    rows = f"{config.batch_size} {_unit(config)}"
    if config.packing:
        rows = f"{rows} of {config.max_seq_length:,} tokens that short rows share"
    return f"{count:,} an epoch, of {rows}; {100 * share:.0f} % of their tokens are padding"


def _adapters(config: TrainConfig, lazy: LazyModel) -> str:
    trained = sum(value.size for _, value in tree_flatten(lazy.model.trainable_parameters()))
    total, blocks = get_total_parameters(lazy.model), len(lazy.model.layers)
    count = blocks if config.num_layers == -1 else min(config.num_layers or 0, blocks)
    kind = "" if config.fine_tune_type == "lora" else f"{config.fine_tune_type}, "
    what = f"{kind}rank {config.lora_parameters.rank} on"
    if config.fine_tune_type == "full":
        what = "none: full, all weights of"
    where = f"all {blocks} blocks" if count == blocks else f"the last {count} blocks"
    return (
        f"{what} {where}; trainable "
        f"{100 * trained / total:.2g} % ({_count(trained)} of {_count(total)})"
        f"{_about_experts(config, lazy)}"
    )


def _about_experts(config: TrainConfig, lazy: LazyModel) -> str:
    """The bytes of adapters over experts, if they are many beside those of the model."""
    layers = [m for m in lazy.model.modules() if isinstance(m, LoRASwitchLinear)]
    experts = sum(m.lora_a.nbytes + m.lora_b.nbytes for m in layers)
    held = experts * (1 + MOMENTS.get(config.optimizer, 0))
    stored = sum(info.stop - info.start for _, info in lazy.checkpoint.tensors.values())
    if not experts or held < MANY_ADAPTERS * stored:
        return ""
    trained = tree_flatten(lazy.model.trainable_parameters())
    others = (sum(value.nbytes for _, value in trained) - experts) * (held // experts)
    moments = "" if held == experts else f", with moments {size(held)}"
    return (
        f"; adapters over all experts: {size(experts)}{moments} (all other adapters: "
        f"{size(others)}; --lora-preset attention leaves experts out)"
    )


def _optimizer(config: TrainConfig) -> str:
    rate = "scheduled" if config.lr_schedule else f"{config.learning_rate:g}"
    if config.loraplus_lr_ratio is not None:
        rate = f"{rate} ({config.loraplus_lr_ratio:g} times that for B)"
    parts = "" if config.grad_accumulation_steps == 1 else f" x {config.grad_accumulation_steps}"
    return (
        f"{config.optimizer}, learning rate {rate}; {config.iters} steps of "
        f"{config.batch_size}{parts} {_unit(config)}"
    )


def _count(number: int) -> str:
    """A number of parameters as text, such as 83,968, 1.15 M or 3.21 B."""
    for unit, one in (("B", 10**9), ("M", 10**6)):
        if number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number:,}"


def _short(path: Path) -> str:
    """A path as text, with `~` for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def lines(rows: Mapping[str, str]) -> str:
    """The header's lines for some descriptions by name."""
    return "\n".join(named_rows(rows, NAMES))
