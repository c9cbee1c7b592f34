"""The job of a contender's process, which is sent to it as JSON."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ADAPTERS = "adapters.safetensors"


@dataclass(frozen=True)
class TrainingJob:
    """A fine-tuning run.

    It is the same for all contenders, except for `last` and the attributes after `seed`.

    Attributes:
        model: folder of the model.
        data: folder with train.jsonl.
        start: file of the initial LoRA matrices.
        context: largest number of tokens of a row that the model sees.
        batch: rows of a step.
        steps: number of compared steps; the first is a warm-up.
        rank: rank of the adapters, which are on all linear layers of all blocks.
        scale: scale of the adapters.
        learning_rate: learning rate of AdamW.
        mask_prompt: whether prompts have no labels.
        last: last step. For the reference it is larger than `steps`, because the reference runs
            along with all contenders.
        seed: seed of the order of batches.
        runner: `module:function` of the run, as in `benchmark/contenders.py`.
        output: folder for the output of the run; its adapters are in the file `ADAPTERS`.
        checkpointing: whether mlx-lm uses gradient checkpointing.
        options: further options of this package's `TrainConfig`.
    """

    model: str
    data: str
    start: str
    context: int
    batch: int
    steps: int
    rank: int
    scale: float
    learning_rate: float
    mask_prompt: bool
    last: int
    seed: int = 0
    runner: str = ""
    output: str = ""
    checkpointing: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def adapters(self) -> Path:
        """The file of the adapters after `steps` steps."""
        return Path(self.output, ADAPTERS)

    @property
    def plan_file(self) -> Path:
        """The file of the plan, if the contender is this package."""
        return Path(self.output, "plan.json")

    @property
    def limit(self) -> int:
        """Largest number of tokens of a row: one more than the model sees."""
        return self.context + 1

    def json(self) -> str:
        """The job as one line of JSON."""
        return json.dumps(asdict(self))

    def with_(self, **changes: Any) -> "TrainingJob":
        """A copy of the job with changes."""
        return replace(self, **changes)
