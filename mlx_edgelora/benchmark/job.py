"""What a contender's process is told to do; travels as JSON."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ADAPTERS = "adapters.safetensors"


@dataclass(frozen=True)
class TrainingJob:
    """A fine-tuning run: the same for all contenders but for `last` and what follows `seed`.

    Attributes:
        model: folder of the model.
        data: folder with train.jsonl.
        start: file of the initial LoRA matrices.
        context: tokens that the model sees of a row, at most.
        batch: rows of a step.
        steps: how many are compared, the first of which warms up.
        rank, scale: of the adapters of all linear layers of all blocks.
        learning_rate: of AdamW.
        mask_prompt: whether prompts carry no labels.
        last: the step to end at; more than `steps` for the reference, which accompanies all.
        seed: of the order of batches.
        runner: `module:function` that does the run, as in `benchmark/contenders.py`.
        output: folder for what the run writes; its adapters are in `ADAPTERS` there.
        checkpointing: whether mlx-lm checkpoints gradients.
        options: more options of this package's `TrainConfig`.
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
        """The plan that this package follows, where it is the contender."""
        return Path(self.output, "plan.json")

    @property
    def limit(self) -> int:
        """Tokens of a row, at most: one more than the model sees."""
        return self.context + 1

    def json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def with_(self, **changes: Any) -> "TrainingJob":
        """The job with changes."""
        return replace(self, **changes)
