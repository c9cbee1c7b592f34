"""All options of a fine-tuning run: names, defaults, help texts and checks.

Names and defaults are those of `mlx_lm.lora`, so that its configuration files can be used. The
command line and the reader of config files are built from the fields below.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlx_edgelora.config import hints
from mlx_edgelora.config.full import check_full
from mlx_edgelora.config.kinds import (
    BUDGET,
    DURATION,
    FLAG,
    FULL_PATH,
    NAMES,
    PATH,
    PROMPTS,
    RESUME,
    SIZE,
    SWITCH,
    Kind,
    check_options,
    integer,
    number,
    one_of,
    option,
    option_metadata,
    read_options,
    text,
)
from mlx_edgelora.config.losses import check_loss_options
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
from mlx_edgelora.losses.preferences import KTO, PREFERENCE_LOSSES

REPORTERS = ("wandb", "swanlab", "tensorboard")
DEFAULT_ITERS = 1000
# Options that exclude each other: one in a later layer replaces the other in an earlier layer.
EITHER = {
    "iters": "epochs",
    "epochs": "iters",
    "train_on": "mask_prompt",
    "mask_prompt": "train_on",
}
# Default number of last blocks to adapt, as in mlx-lm; all blocks of a model that has fewer.
MOST_LAYERS = 16

_NAME = text("text that is not empty", bool)
_REPORT_TO = text(
    f"some of {', '.join(REPORTERS)}, separated by a comma",
    lambda value: all(name.strip().lower() in ("", *REPORTERS) for name in value.split(",")),
)
_NUM_LAYERS = dataclasses.replace(
    integer(1, also=-1),
    expected="a whole number of at least 1, or -1 for all blocks (0 is not accepted)",
)


def _read_no(value: Any) -> bool:
    if value is not False:
        raise ValueError
    return value


_NO_REMOTE_CODE = Kind("false: code from a checkpoint is never run", _read_no, bool)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a fine-tuning run, checked on creation.

    Raises:
        EdgeLoraError: an invalid value; the message names the option, the value and what was
            expected.
    """

    HINTS: ClassVar[dict[str, str]] = hints.HINTS

    config: str | None = option(
        None, "YAML file with options; the command line takes precedence.", PATH
    )
    model: str | None = option(
        None,
        "Model to fine-tune: a local folder or a Hugging Face name. Default: the tiny model that "
        "comes with the package.",
        FULL_PATH,
    )
    data: str | None = option(
        None,
        "Folder with train.jsonl, valid.jsonl and test.jsonl, a file of training rows (.jsonl, "
        ".json, .csv, .tsv, .parquet, .txt), or the name of a Hugging Face data set. Default: the "
        "example data of the tiny model.",
        _NAME,
    )
    hf_dataset: tuple[HubDataset, ...] | None = option(
        None, "Hugging Face data sets with splits and features, in place of data.", HUB
    )
    data_format: str | None = option(
        None,
        "Kind of the rows. Default: found from their columns.",
        one_of("chat", "completions", "text", "alpaca", "sharegpt", "qa"),
    )
    val_split: float | None = option(
        None,
        "Share of the training rows that is split off for validation, such as 0.05; drawn by the "
        "seed. Default: none.",
        number("a number above 0 and below 1", lambda x: 0 < x < 1),
    )
    system_prompt: str | None = option(
        None, "System message for conversations that have none. Default: none.", _NAME
    )
    prompt_feature: str = option("prompt", "Name of the prompt column.", text())
    completion_feature: str = option("completion", "Name of the completion column.", text())
    text_feature: str = option("text", "Name of the text column.", text())
    chat_feature: str = option("messages", "Name of the column with chat messages.", text())
    mask_prompt: bool = option(
        False,
        "Train on the last answer of each row only, as mlx-lm does; the same as --train-on "
        "last-answer.",
        FLAG,
    )
    train_on: str | None = option(
        None,
        "Which tokens are trained: all answers of a conversation, its last answer, or everything. "
        "Default: everything, or last-answer with --mask-prompt.",
        one_of("answers", "last-answer", "everything"),
    )
    allow_lost_content: bool = option(
        False,
        "Go on if the chat template leaves out reasoning, tool calls or messages of a tenth of "
        "the rows that have them, or more.",
        FLAG,
    )
    max_seq_length: int = option(
        2048, "Maximum number of tokens in a row; longer rows are truncated.", integer(2)
    )
    packing: bool = option(
        False,
        "Let short rows share a row of max_seq_length tokens, each attending only to itself; "
        "batch_size then counts shared rows.",
        FLAG,
    )

    train: bool | None = option(None, "Train. Default: yes, unless --test is given.", FLAG)
    test: bool = option(False, "Evaluate on the test set, after training if any.", FLAG)
    seed: int = option(0, "Random seed.", integer(0, 2**32 - 1))

    fine_tune_type: str = option(
        "lora",
        "What is trained: adapters (lora, or dora, which trains the norm of each row of a matrix "
        "too), or all weights of the last num_layers blocks (full).",
        one_of("lora", "dora", "full"),
    )
    num_layers: int | None = option(
        None,
        f"Number of blocks to adapt, counted from the last; -1 for all. Default: {MOST_LAYERS}, or "
        "all blocks of a smaller model.",
        _NUM_LAYERS,
    )
    lora_parameters: LoraParameters = field(
        default_factory=LoraParameters,
        metadata=option_metadata("Rank, scale, ... of adapters.", LORA),
    )
    lora_preset: str | None = option(
        None,
        "Which layers of a block get adapters, in place of lora_parameters.keys: attention (with "
        "recurrent layers), mlp (with experts) or all. Default: all.",
        one_of("attention", "mlp", "all"),
    )
    resume_adapter_file: str | None = option(
        None, "Adapter to start from: an adapters.safetensors file.", FULL_PATH
    )
    adapter_path: str = option(
        "adapters", "Folder of the adapter: written by training, read by a test alone.", PATH
    )
    resume: bool | str | None = option(
        None,
        "Continue an interrupted run exactly: from the newest checkpoint in --adapter-path, or in "
        "the folder given. Options not given are those of that run.",
        RESUME,
    )
    accept_changes: tuple[str, ...] | None = option(
        None,
        "With --resume: options that may differ from the interrupted run, separated by commas, "
        "such as learning_rate,data.",
        NAMES,
    )
    overwrite: bool = option(
        False, "Replace the adapter and checkpoints of another run in --adapter-path.", FLAG
    )

    batch_size: int = option(4, "Rows in a batch.", integer(1))
    iters: int | None = option(
        None, f"Number of training steps, in place of epochs. Default: {DEFAULT_ITERS}.", integer(1)
    )
    epochs: int | None = option(
        None, "Number of passes over the training set, in place of iters.", integer(1)
    )
    grad_accumulation_steps: int = option(
        1, "Number of steps whose gradients are averaged before an update.", integer(1)
    )
    max_grad_norm: float | None = option(
        None,
        "Clip gradients to this global norm. Default: no clipping.",
        number("a number above 0", lambda x: x > 0),
    )
    optimizer: str = option("adam", "Optimizer.", one_of(*OPTIMIZERS))
    optimizer_config: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: {} for name in OPTIMIZERS},
        metadata=option_metadata("Arguments by optimizer.", OPTIMIZER_CONFIG),
    )
    learning_rate: float = option(
        1e-5,
        "Learning rate; lr_schedule in a config file replaces it.",
        number("a number above 0", lambda x: x > 0),
    )
    loraplus_lr_ratio: float | None = option(
        None,
        "LoRA+: learning rate of the matrices B (and DoRA's m), as a multiple of learning_rate, "
        "such as 16. "
        "Default: 1.",
        number("a number above 0", lambda x: x > 0),
    )
    lr_schedule: dict[str, Any] | None = field(
        default=None,
        metadata=option_metadata("Schedule of the learning rate, in its place.", SCHEDULE),
    )

    loss: str = option(
        "exact",
        "Cross-entropy over the whole vocabulary (exact), or over the tokens nearest to the labels "
        "(approximate); or a comparison of answers (dpo, orpo, simpo, kto).",
        one_of("exact", "approximate", *PREFERENCE_LOSSES),
    )
    beta: float | None = option(
        None,
        "For dpo, orpo, simpo and kto: strength of the preference. Default: 0.1, or 2 for simpo.",
        number("a number above 0", lambda x: x > 0),
    )
    simpo_gamma: float | None = option(
        None,
        "For simpo: margin by which chosen answers shall be better. Default: 0.5.",
        number("a number of at least 0", lambda x: x >= 0),
    )
    desirable_weight: float | None = option(
        None,
        "For kto: weight of desirable answers. Default: 1.",
        number("a number above 0", lambda x: x > 0),
    )
    undesirable_weight: float | None = option(
        None,
        "For kto: weight of undesirable answers. Default: 1.",
        number("a number above 0", lambda x: x > 0),
    )
    loss_k: int | None = option(
        None, "For the approximate loss: nearest tokens per label. Default: 1000.", integer(1)
    )
    loss_max_subset: int | None = option(
        None, "For the approximate loss: maximum number of tokens. Default: no limit.", integer(1)
    )
    loss_tail_correction: bool | None = option(
        None,
        "For the approximate loss: add an estimate for the tokens left out. Default: yes.",
        FLAG,
    )
    label_smoothing: float = option(
        0.0,
        "For the exact loss: fraction of the target that is spread over the vocabulary.",
        number("a number from 0 to below 1", lambda x: 0 <= x < 1),
    )

    val_batches: int = option(
        25,
        "Batches per validation; -1 for the whole set, 0 for no validation.",
        integer(0, also=-1),
    )
    test_batches: int = option(
        500, "Batches to test on; -1 for the whole set.", integer(1, also=-1)
    )
    sample_every: int | None = option(
        None,
        "Steps between answers of the model to fixed prompts, which are also answered before the "
        "first step. Default: never.",
        integer(1),
    )
    sample_prompts: tuple[str, ...] | None = option(
        None,
        "Prompts for --sample-every, or files with a prompt in each line. Default: the first two "
        "prompts of the validation set, or of the training set.",
        PROMPTS,
    )
    sample_tokens: int | None = option(
        None, "Tokens of such an answer, at most. Default: 64.", integer(1)
    )
    steps_per_report: int = option(10, "Steps between reports of the training loss.", integer(1))
    steps_per_eval: int = option(200, "Steps between validations.", integer(1))
    save_every: int = option(100, "Steps between saved adapters and checkpoints.", integer(1))
    keep_checkpoints: int = option(
        2, "Number of newest checkpoints to keep for --resume; 0 writes none.", integer(0)
    )
    save_best: bool = option(
        False,
        "Also keep the adapter with the lowest validation loss, in the folder best inside "
        "--adapter-path.",
        FLAG,
    )
    max_time: float | None = option(
        None, "Save and end after this time, such as 90s, 45m or 2h. Default: no limit.", DURATION
    )
    report_to: str | None = option(
        None, f"Services to log to, separated by a comma: {', '.join(REPORTERS)}.", _REPORT_TO
    )
    project_name: str | None = option(None, "Name of the project for --report-to.", text())
    log: str | None = option(
        None, "JSONL file to which every report is appended as one record.", FULL_PATH
    )
    report: str | None = option(
        None,
        "HTML file about the run, written when it ends: loss, speed, memory and plan.",
        FULL_PATH,
    )

    verbose: bool = option(
        False,
        "Print more: every choice of the plan, the memory of the process, and what a step reads "
        "and writes.",
        FLAG,
    )

    weights: str | None = option(
        None,
        "Where frozen weights are kept: read from disk block by block (streamed) or in memory "
        "(resident). Default: the memory budget decides.",
        one_of("streamed", "resident"),
    )
    quantize: int | None = option(
        None,
        "Quantize an unquantized model to this many bits, once; the result is cached.",
        one_of(2, 3, 4, 5, 6, 8),
    )
    dtype: str | None = option(
        None,
        "Data type to compute in. Default: that of the checkpoint.",
        one_of("float32", "bfloat16", "float16"),
    )
    kernel: str = option(
        "auto",
        "How quantized weights are multiplied: by MLX's kernel (fused) or unpacked first "
        "(dequantize). auto: fused on a GPU, dequantize on a CPU.",
        one_of("auto", "fused", "dequantize"),
    )
    activations: str | None = option(
        None,
        "Where block inputs are kept until the backward pass: in a file (spill) or in memory "
        "(ram). Default: the memory budget decides.",
        one_of("spill", "ram"),
    )
    adapters: str | None = option(
        None,
        "Where adapters or trained weights, gradients and optimizer state are kept: in memory "
        "(resident) or in a file (paged). Default: the memory budget decides.",
        one_of("resident", "paged"),
    )
    memory_budget: str | int | None = option(
        None,
        "Memory limit for MLX, such as 4GB or 800MB; the fastest plan that fits is used. min: as "
        "little as possible. Default: 80 % of the free memory, on a Mac at most what Metal "
        "recommends.",
        BUDGET,
    )
    plan: str | None = option(
        None, "Plan file to follow instead of a budget, as --plan-out writes it.", FULL_PATH
    )
    plan_out: str | None = option(None, "JSON file to write the plan to.", FULL_PATH)
    duty: float = option(
        1.0,
        "Fraction of the time to compute in; 0.5 pauses after each block for as long as the block "
        "took.",
        number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    )
    balance: bool = option(
        False,
        "With several processes, give each rows in proportion to its measured speed, not evenly.",
        FLAG,
    )
    caffeinate: bool = option(
        True, "On macOS, keep the system awake while the run lasts; the display may sleep.", FLAG
    )
    verify: str = option(
        "on",
        "Before training, compare the gradients of each kind of block with plain MLX.",
        SWITCH,
    )
    memory_profile: str | None = option(
        None,
        "Folder to write the memory use of the last step to: memory.json, and memory.png with the "
        "plot extra.",
        FULL_PATH,
    )
    spill_dir: str | None = option(
        None,
        "Folder for scratch files (block inputs, paged adapters). Default: the faster of the "
        "temporary folder and the user's cache.",
        FULL_PATH,
    )
    cache_dir: str | None = option(
        None,
        "Folder for converted models and for the nearest tokens of the approximate loss. Default: "
        "the user's cache.",
        FULL_PATH,
    )
    clear_cache_threshold: int | None = option(
        None,
        "Empty MLX's buffer cache after a step if it holds more than this (500MB, 4GB). Default: "
        "after every step where the budget is tight.",
        SIZE,
    )
    grad_checkpoint: bool = option(
        False,
        "Accepted for compatibility with mlx-lm and ignored: the memory budget decides which "
        "blocks are recomputed.",
        FLAG,
    )
    trust_remote_code: bool = option(
        False,
        "Accepted for compatibility with mlx-lm; only false is allowed.",
        _NO_REMOTE_CODE,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.train is None:
            object.__setattr__(self, "train", not self.test)
        if self.iters is None and self.epochs is None:
            object.__setattr__(self, "iters", DEFAULT_ITERS)
        _check_together(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], place: str | None = None) -> "TrainConfig":
        """Build a configuration from a mapping with mlx-lm's keys; null means the default.

        Args:
            mapping: values by key, as read from YAML or JSON.
            place: where the mapping is from; error messages begin with it.

        Raises:
            EdgeLoraError: an unknown key, or an invalid value.
        """
        return cls.from_layers((mapping, place))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """Build a configuration from a YAML file; see `from_dict`.

        Raises:
            EdgeLoraError: the file cannot be read, or has an unknown key or an invalid value.
        """
        return cls.from_layers((read_yaml(path), str(path)), ({"config": str(path)}, None))

    @classmethod
    def from_layers(cls, *layers: tuple[Mapping[str, Any], str | None]) -> "TrainConfig":
        """Build a configuration from layers of (mapping, place).

        Later layers take precedence.

        Raises:
            EdgeLoraError: an unknown key, or an invalid value.
        """
        values: dict[str, Any] = {}
        for mapping, place in layers:
            try:
                found = read_options(cls, mapping)
            except EdgeLoraError as error:
                raise EdgeLoraError(f"{place}: {error}" if place else str(error)) from None
            for name in EITHER.keys() & found.keys():
                if found[name]:
                    values.pop(EITHER[name], None)
            values |= found
        return cls(**values)

    @property
    def compares_answers(self) -> bool:
        """Whether the loss compares answers, so that rows are preferences."""
        return self.loss in PREFERENCE_LOSSES

    @property
    def compares_pairs(self) -> bool:
        """Whether a batch has two rows for each of `batch_size`, a chosen and a rejected answer."""
        return self.compares_answers and self.loss != KTO

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values under mlx-lm's names, as in `adapter_config.json`."""
        result = dataclasses.asdict(self)
        _drop_none(result["lora_parameters"])
        if self.fine_tune_type == "full":  # as in mlx-lm
            result["lora_parameters"] = None
        if self.hf_dataset is not None:
            result["hf_dataset"] = list(map(_drop_none, result["hf_dataset"]))
        if self.sample_prompts is not None:
            result["sample_prompts"] = list(self.sample_prompts)
        if self.accept_changes is not None:
            result["accept_changes"] = list(self.accept_changes)
        if self.lora_parameters.keys is not None:
            result["lora_parameters"]["keys"] = list(self.lora_parameters.keys)
        return result


def _drop_none(mapping: dict[str, Any]) -> dict[str, Any]:
    for key in [key for key, value in mapping.items() if value is None]:
        del mapping[key]
    return mapping


def _check_val_split(config: TrainConfig) -> None:
    """Reject val_split without validation, or if another option names the validation rows."""
    if config.val_split is None or not config.train:
        return
    got = f"val_split: got {config.val_split:g}"
    if config.val_batches == 0:
        raise EdgeLoraError(
            f"{got} with val_batches 0, which means no validation; leave one of them out"
        )
    if config.hf_dataset:
        raise EdgeLoraError(
            f"{got} with hf_dataset, whose valid_split names the validation rows; leave val_split "
            "out"
        )


def _check_together(config: TrainConfig) -> None:
    """Reject options that contradict each other."""
    if not config.train and not config.test:
        raise EdgeLoraError("train: got false without test, expected one of the two to be true")
    _check_val_split(config)
    if config.train and not config.adapter_path:
        raise EdgeLoraError("adapter_path: got no name, expected a folder to write the adapter to")
    if config.lora_preset is not None and config.lora_parameters.keys is not None:
        raise EdgeLoraError(
            f"lora_preset: got {config.lora_preset!r} with lora_parameters.keys, which name the "
            "layers already; leave one of them out (a resumed run keeps its layers)"
        )
    _check_resume(config)
    check_loss_options(config)
    _check_labels(config)
    _check_loraplus(config)
    check_full(config)
    if config.iters is not None and config.epochs is not None:
        raise EdgeLoraError(
            f"epochs: got {config.epochs} with iters {config.iters}, expected one of the two; "
            "leave the other out"
        )
    _check_memory(config)
    _check_samples(config)
    if config.memory_profile is not None and not config.train:
        raise EdgeLoraError(
            f"memory_profile: got {config.memory_profile!r} without training, but only training "
            "steps are profiled; leave it out, or train"
        )
    if config.spill_dir is not None and (config.activations, config.adapters) == (
        "ram",
        "resident",
    ):
        raise EdgeLoraError(
            f"spill_dir: got {config.spill_dir!r} with activations {config.activations} and "
            f"adapters {config.adapters}, which write no file; leave it out"
        )


def _check_resume(config: TrainConfig) -> None:
    """Reject contradicting options for resuming, replacing and saving runs."""
    if config.resume and config.overwrite:
        raise EdgeLoraError("overwrite: got true with resume, expected one of the two")
    if config.accept_changes is not None and not config.resume:
        raise EdgeLoraError(
            f"accept_changes: got {','.join(config.accept_changes)} without resume, which is what "
            "it is for; leave it out"
        )
    known = {field.name for field in dataclasses.fields(config)}
    for name in config.accept_changes or ():
        if name not in known:
            raise EdgeLoraError(f"accept_changes: got {name!r}, expected the names of options")
    if config.save_best and config.val_batches == 0:
        raise EdgeLoraError(
            "save_best: got true with val_batches 0, which validates never; leave one of them out"
        )


def _check_samples(config: TrainConfig) -> None:
    """Reject options of samples without samples."""
    if config.sample_every is not None and config.train:
        return
    for name in ("sample_every", "sample_prompts", "sample_tokens"):
        if (value := getattr(config, name)) is not None:
            why = "sample_every" if config.train else "training"
            raise EdgeLoraError(f"{name}: got {value!r} without {why}; leave it out")


def _check_labels(config: TrainConfig) -> None:
    """Reject two options for which tokens are trained."""
    if config.mask_prompt and config.train_on is not None:
        raise EdgeLoraError(
            f"train_on: got {config.train_on!r} with mask_prompt, which is last-answer; leave one "
            "of them out"
        )


def _check_loraplus(config: TrainConfig) -> None:
    """Reject a ratio of learning rates for an optimizer that has no use for a learning rate."""
    arguments = config.optimizer_config.get(config.optimizer) or {}
    relative = config.optimizer == "adafactor" and arguments.get("relative_step", True)
    if config.loraplus_lr_ratio is not None and relative:
        raise EdgeLoraError(
            f"loraplus_lr_ratio: got {config.loraplus_lr_ratio:g} with adafactor, which sets its "
            "own rate; set relative_step: false in optimizer_config, or use another optimizer"
        )


def _check_memory(config: TrainConfig) -> None:
    """Reject options that contradict the budget or the plan."""
    if config.memory_budget == "min":
        keeps = {"weights": "resident", "activations": "ram", "adapters": "resident"}
        for name, value in keeps.items():
            if getattr(config, name) == value:
                raise EdgeLoraError(
                    f"{name}: got {value!r} with memory_budget min, which keeps in memory only "
                    "what cannot be on disk; leave one of them out"
                )
    if config.plan is not None:
        for name in ("memory_budget", "weights", "activations", "adapters", "kernel"):
            if getattr(config, name) not in (None, "auto"):
                raise EdgeLoraError(
                    f"{name}: got {getattr(config, name)!r} with plan {config.plan!r}, which "
                    "already decides it; leave one of them out"
                )
