"""Every option of a fine-tuning run: its name, default, help text and check.

Names and defaults are those of `mlx_lm.lora`, so that its configuration files run here. The
command line and the reading of files are made from the fields below.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_edgelora.config.kinds import (
    BUDGET,
    FLAG,
    SIZE,
    SWITCH,
    Kind,
    about,
    check_options,
    number,
    one_of,
    option,
    read_options,
    text,
    whole,
)
from mlx_edgelora.config.nested import (
    HUB,
    LORA,
    OPTIMIZER_CONFIG,
    OPTIMIZERS,
    SCHEDULE,
    HubDataset,
    LoraParameters,
)
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.errors import EdgeLoraError

REPORTERS = ("wandb", "swanlab")

_NAME = text("text that is not empty", bool)
_REPORT_TO = text(
    f"{' or '.join(REPORTERS)}, or both with a comma",
    lambda value: all(name.strip().lower() in ("", *REPORTERS) for name in value.split(",")),
)
_FINE_TUNE_TYPE = dataclasses.replace(
    one_of("lora"),
    expected="lora; dora and full fine-tuning are not done here, use mlx_lm.lora for them",
)
_NUM_LAYERS = dataclasses.replace(
    whole(1, also=-1),
    expected="a whole number of at least 1, or -1 for all blocks (0, all in mlx-lm, is not taken)",
)


def _read_no(value: Any) -> bool:
    if value is not False:
        raise ValueError
    return value


_NO_REMOTE_CODE = Kind("false: code that comes with a checkpoint is never run here", _read_no, bool)


@dataclass(frozen=True)
class TrainConfig:
    """A fine-tuning run, checked when it is made.

    Raises:
        EdgeLoraError: naming the option, the value it got and what it expects.
    """

    config: str | None = option(
        None, "YAML file of options; the command line wins over it.", text()
    )
    model: str | None = option(
        None, "Folder or Hugging Face name of the model; the embedded one if absent.", _NAME
    )
    data: str | None = option(
        None,
        "Folder with {train,valid,test}.jsonl or name of a Hugging Face data set; the embedded "
        "one if absent.",
        _NAME,
    )
    hf_dataset: tuple[HubDataset, ...] | None = option(
        None, "Hugging Face data sets with splits and features, in place of data.", HUB
    )
    prompt_feature: str = option("prompt", "Key of the prompt in a row.", text())
    completion_feature: str = option("completion", "Key of the completion in a row.", text())
    text_feature: str = option("text", "Key of the text in a row.", text())
    chat_feature: str = option("messages", "Key of the messages in a row.", text())
    mask_prompt: bool = option(False, "Train on completions only, not on prompts.", FLAG)
    max_seq_length: int = option(2048, "Longer rows are truncated to so many tokens.", whole(2))

    train: bool | None = option(None, "Train; the default unless test is given.", FLAG)
    test: bool = option(False, "Evaluate on the test set, after training if any.", FLAG)
    seed: int = option(0, "Seed of all random numbers.", whole(0, 2**32 - 1))

    fine_tune_type: str = option("lora", "Only lora is done here.", _FINE_TUNE_TYPE)
    num_layers: int = option(16, "Number of last blocks to adapt, -1 for all.", _NUM_LAYERS)
    lora_parameters: LoraParameters = field(
        default_factory=LoraParameters, metadata=about("Rank, scale, ... of adapters.", LORA)
    )
    resume_adapter_file: str | None = option(None, "Adapter file to start from.", _NAME)
    adapter_path: str = option("adapters", "Folder of the adapter, to write or to test.", text())

    batch_size: int = option(4, "Rows per step.", whole(1))
    iters: int = option(1000, "Steps to train for.", whole(1))
    grad_accumulation_steps: int = option(1, "Steps per update of the adapters.", whole(1))
    max_grad_norm: float | None = option(
        None,
        "Clip the gradients of an update to this global norm; not if absent.",
        number("a number above 0", lambda x: x > 0),
    )
    optimizer: str = option("adam", "The optimizer.", one_of(*OPTIMIZERS))
    optimizer_config: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: {} for name in OPTIMIZERS},
        metadata=about("Arguments by optimizer.", OPTIMIZER_CONFIG),
    )
    learning_rate: float = option(
        1e-5, "Learning rate, without lr_schedule.", number("a number above 0", lambda x: x > 0)
    )
    lr_schedule: dict[str, Any] | None = field(
        default=None, metadata=about("Schedule of the learning rate, in its place.", SCHEDULE)
    )

    loss: str = option(
        "exact",
        "Cross-entropy over the whole vocabulary, or over the tokens near the labels.",
        one_of("exact", "approximate"),
    )
    loss_k: int | None = option(
        None, "Nearest tokens per label, for approximate; 1000 if absent.", whole(1)
    )
    loss_max_subset: int | None = option(
        None, "Most tokens in the loss, for approximate; no limit if absent.", whole(1)
    )
    loss_tail_correction: bool | None = option(
        None, "Add what the tokens left out weigh, for approximate; on if absent.", FLAG
    )
    label_smoothing: float = option(
        0.0,
        "Share of the target spread over the whole vocabulary, for exact.",
        number("a number from 0 to below 1", lambda x: 0 <= x < 1),
    )

    val_batches: int = option(
        25, "Batches per validation; -1 for all, 0 for no validation.", whole(0, also=-1)
    )
    test_batches: int = option(500, "Batches to test on, -1 for all.", whole(1, also=-1))
    steps_per_report: int = option(10, "Steps between reports of the loss.", whole(1))
    steps_per_eval: int = option(200, "Steps between validations.", whole(1))
    save_every: int = option(100, "Steps between saves of the adapter.", whole(1))
    report_to: str | None = option(None, "Services to report to: wandb, swanlab.", _REPORT_TO)
    project_name: str | None = option(None, "Name of the project at these services.", text())
    log: str | None = option(None, "JSONL file that gets one record per report.", _NAME)

    weights: str | None = option(
        None,
        "Where frozen weights stay: on disk, read block by block, or in memory; as the plan says "
        "if absent.",
        one_of("streamed", "resident"),
    )
    quantize: int | None = option(
        None, "Bits to quantize an unquantized model to, once.", one_of(2, 3, 4, 5, 6, 8)
    )
    dtype: str | None = option(
        None,
        "Computing dtype; the checkpoint's own if absent.",
        one_of("float32", "bfloat16", "float16"),
    )
    kernel: str = option(
        "auto",
        "How quantized weights multiply; auto: as the plan says.",
        one_of("auto", "fused", "dequantize"),
    )
    activations: str | None = option(
        None,
        "Where the inputs of blocks wait: in a file or in memory; as the plan says if absent.",
        one_of("spill", "ram"),
    )
    adapters: str | None = option(
        None,
        "Where adapters, their gradients and the optimizer's state wait: in memory or in a file; "
        "as the plan says if absent.",
        one_of("resident", "paged"),
    )
    memory_budget: str | int | None = option(
        None,
        "Most memory for MLX (4GB, 800MB), kept by the fastest plan that fits; min for the least "
        "there is. What the machine has to give, less a margin, if absent.",
        BUDGET,
    )
    plan: str | None = option(
        None, "File of a plan to follow, as plan_out wrote it; in place of a budget.", _NAME
    )
    plan_out: str | None = option(None, "File that the plan is written to.", _NAME)
    duty: float = option(
        1.0,
        "Share of the time to compute in: 0.5 rests as long as it computes, block by block.",
        number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    )
    caffeinate: bool = option(
        True, "On macOS, keep the system awake while the run lasts; the display may sleep.", FLAG
    )
    verify: str = option(
        "on",
        "Compare the gradients of each kind of block with plain MLX's before the first step.",
        SWITCH,
    )
    memory_profile: str | None = option(
        None,
        "Folder that gets where the memory of the last step went: memory.json, and memory.png with "
        "the plot extra.",
        _NAME,
    )
    spill_dir: str | None = option(
        None, "Folder of these files; the system's temporary one if absent.", _NAME
    )
    cache_dir: str | None = option(
        None, "Folder of converted models; the user's cache if absent.", _NAME
    )
    clear_cache_threshold: int = option(
        0, "Empty MLX's cache after a step if it holds more (500MB, 4GB).", SIZE
    )
    grad_checkpoint: bool = option(
        False, "Taken for mlx-lm's sake: blocks are always checkpointed, results agree.", FLAG
    )
    trust_remote_code: bool = option(False, "Only false is accepted.", _NO_REMOTE_CODE)

    def __post_init__(self) -> None:
        check_options(self)
        if self.train is None:
            object.__setattr__(self, "train", not self.test)
        _check_together(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], place: str | None = None) -> "TrainConfig":
        """The run that a mapping with mlx-lm's keys describes; null means the default.

        Args:
            mapping: as YAML or JSON gives it.
            place: where it came from, to begin error texts with.

        Raises:
            EdgeLoraError: an unknown key, or a value that is not accepted.
        """
        return cls.from_layers((mapping, place))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """The run that a YAML file describes, as `from_dict`."""
        return cls.from_layers((read_yaml(path), str(path)), ({"config": str(path)}, None))

    @classmethod
    def from_layers(cls, *layers: tuple[Mapping[str, Any], str | None]) -> "TrainConfig":
        """The run that (mapping, place) layers describe together; later ones win."""
        values: dict[str, Any] = {}
        for mapping, place in layers:
            try:
                values |= read_options(cls, mapping)
            except EdgeLoraError as error:
                raise EdgeLoraError(f"{place}: {error}" if place else str(error)) from None
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values under mlx-lm's names: what `adapter_config.json` holds."""
        result = dataclasses.asdict(self)
        _drop_none(result["lora_parameters"])
        if self.hf_dataset is not None:
            result["hf_dataset"] = list(map(_drop_none, result["hf_dataset"]))
        if self.lora_parameters.keys is not None:
            result["lora_parameters"]["keys"] = list(self.lora_parameters.keys)
        return result


def _drop_none(mapping: dict[str, Any]) -> dict[str, Any]:
    for key in [key for key, value in mapping.items() if value is None]:
        del mapping[key]
    return mapping


def _check_together(config: TrainConfig) -> None:
    """Refuse options that contradict each other."""
    if not config.train and not config.test:
        raise EdgeLoraError("train: got false without test, expected one of the two to be true")
    if config.train and not config.adapter_path:
        raise EdgeLoraError("adapter_path: got no name, expected a folder to write the adapter to")
    if config.loss == "exact":
        for name in ("loss_k", "loss_max_subset", "loss_tail_correction"):
            if getattr(config, name) is not None:
                raise EdgeLoraError(
                    f"{name}: got {getattr(config, name)!r} with the exact loss, which has no use "
                    "for it; leave it out, or set loss to approximate"
                )
    elif config.label_smoothing:
        raise EdgeLoraError(
            f"label_smoothing: got {config.label_smoothing} with the approximate loss, expected "
            "0: a target over the whole vocabulary needs the exact one"
        )
    _check_memory(config)
    if config.memory_profile is not None and not config.train:
        raise EdgeLoraError(
            f"memory_profile: got {config.memory_profile!r} for a test alone, expected nothing: a "
            "step of training is profiled"
        )
    if config.spill_dir is not None and (config.activations, config.adapters) == (
        "ram",
        "resident",
    ):
        raise EdgeLoraError(
            f"spill_dir: got {config.spill_dir!r} with activations {config.activations} and "
            f"adapters {config.adapters}, which write no file; leave it out"
        )


def _check_memory(config: TrainConfig) -> None:
    """Refuse a budget or plan beside options that say otherwise."""
    if config.memory_budget == "min":
        keeps = {"weights": "resident", "activations": "ram", "adapters": "resident"}
        for name, value in keeps.items():
            if getattr(config, name) == value:
                raise EdgeLoraError(
                    f"{name}: got {value!r} with the least memory_budget, which keeps nothing in "
                    "memory that can wait on disk; leave one of them out"
                )
    if config.plan is not None:
        for name in ("memory_budget", "weights", "activations", "adapters", "kernel"):
            if getattr(config, name) not in (None, "auto"):
                raise EdgeLoraError(
                    f"{name}: got {getattr(config, name)!r} with plan {config.plan!r}, which "
                    "says it already; leave one of them out"
                )
