"""LoRA fine-tuning of language models on MLX in a fraction of the usual memory.

    from mlx_edgelora import TrainConfig, finetune
    result = finetune(TrainConfig(model="...", data="..."))

The result can be evaluated, used and merged within the same budget:

    from mlx_edgelora import evaluate, fuse, generate, load

For a training loop of your own, `value_and_grad` replaces `mlx.nn.value_and_grad`.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_edgelora.mlx_settings import set_defaults

if TYPE_CHECKING:
    from mlx_edgelora.config import LoraParameters, TrainConfig
    from mlx_edgelora.engine.gradients import value_and_grad
    from mlx_edgelora.errors import EdgeLoraError
    from mlx_edgelora.evaluation.evaluating import Evaluation, evaluate
    from mlx_edgelora.export.fusing import fuse
    from mlx_edgelora.export.gguf_files import export_gguf
    from mlx_edgelora.export.ollama import export_ollama
    from mlx_edgelora.export.peft import export_peft
    from mlx_edgelora.export.peft_import import import_peft
    from mlx_edgelora.inference.loading import generate, load
    from mlx_edgelora.storage.stores import MappedStore, RamStore
    from mlx_edgelora.training.callbacks import TrainingCallback
    from mlx_edgelora.training.finetune import finetune
    from mlx_edgelora.training.loop import TrainResult

set_defaults()
# As in mlx-lm: transformers would say in every command that PyTorch is not installed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Imported at first use, so that importing a single layer or loss does not load mlx-lm.
_MODULES = {
    "EdgeLoraError": "errors",
    "Evaluation": "evaluation.evaluating",
    "LoraParameters": "config",
    "MappedStore": "storage.stores",
    "RamStore": "storage.stores",
    "TrainConfig": "config",
    "TrainResult": "training.loop",
    "TrainingCallback": "training.callbacks",
    "evaluate": "evaluation.evaluating",
    "export_gguf": "export.gguf_files",
    "export_ollama": "export.ollama",
    "export_peft": "export.peft",
    "finetune": "training.finetune",
    "fuse": "export.fusing",
    "generate": "inference.loading",
    "import_peft": "export.peft_import",
    "load": "inference.loading",
    "value_and_grad": "engine.gradients",
}

__all__ = [
    "EdgeLoraError",
    "Evaluation",
    "LoraParameters",
    "MappedStore",
    "RamStore",
    "TrainConfig",
    "TrainResult",
    "TrainingCallback",
    "evaluate",
    "export_gguf",
    "export_ollama",
    "export_peft",
    "finetune",
    "fuse",
    "generate",
    "import_peft",
    "load",
    "value_and_grad",
]


class _Package(ModuleType):
    """This package, whose functions have names of its commands' modules.

    Python binds a module to its name in the package once it is imported. Here the names stay those
    of the functions; modules are found by `import_module` or `from mlx_edgelora.fuse import main`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
