"""Short runs of a tiny model in forked processes, for the scripts beside this file.

The parent imports everything once and computes nothing. A child therefore begins within
milliseconds, has an interpreter and a GPU or CPU stream of its own, and can be killed like any
process.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import Faults, faulty  # noqa: E402, F401 - for the scripts
from tiny import make_data, make_model, run_options  # noqa: E402

from mlx_edgelora import TrainConfig, finetune  # noqa: E402
from mlx_edgelora.command import command  # noqa: E402
from mlx_edgelora.planner import machine  # noqa: E402
from mlx_edgelora.training.checkpoints import find_checkpoint, newest_checkpoint  # noqa: E402

# Of a machine with two cores: plans do not depend on what else the machine does.
RATES = machine.Rates(4e10, 2e9, 1e9, 4e9, 2e9, 1e9, 4e-6)
# Everything that a run keeps besides its adapter: accumulated gradients, a schedule, the key of
# dropout, and an optimizer whose state is in a file.
OPTIONS = {
    "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.2},
    "batch_size": 3,
    "iters": 12,
    "grad_accumulation_steps": 3,
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 6], "warmup": 2},
    "optimizer": "adamw",
    "steps_per_report": 1,
    "save_every": 2,
    "verify": "off",
    "weights": "streamed",
    "activations": "spill",
    "adapters": "paged",
}


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder with a tiny model and its data; caches are kept there as well."""
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        place = Path(folder)
        for name in ("cache", "temporary", "spill", "written"):
            (place / name).mkdir()
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        tempfile.tempdir = str(place / "temporary")
        machine.measure_rates = lambda *_: RATES
        wait(fork(lambda: _make(place)))
        yield place


def _make(place: Path) -> None:
    make_model(place / "model")
    make_model(place / "unquantized", quantized=False)
    make_data(place / "data", rows=10)


def train(place: Path, name: str, **changes: object) -> None:
    """A whole run whose adapter is in `place / name`; prints to a file there."""
    own = {"adapter_path": str(place / name), "spill_dir": str(place / "spill")}
    options = TrainConfig.from_dict(run_options(place, place) | OPTIONS | own | changes)
    with open(place / "output", "w") as output, redirect_stdout(output):
        finetune(options, notify=lambda line: None)


def fork(function: Callable[[], object], errors: Path | None = None) -> int:
    """Run a function as a command in a child process; returns the child's id.

    Args:
        function: what the child does.
        errors: file of the child's standard error; by default that of this process.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            if errors is not None:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = command(lambda _: (function(), 0)[1])([])
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def wait(child: int) -> int:
    """The exit status of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(folder: Path) -> bytes:
    """The bytes of an adapter's tensors and header."""
    return (folder / "adapters.safetensors").read_bytes()


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can be resumed; its newest checkpoint must then be whole."""
    if newest_checkpoint(folder) is None:
        return False
    find_checkpoint(folder)
    return True


def left_overs(*folders: Path) -> list[str]:
    """Temporary files and locks in some folders, at any depth."""
    return sorted(
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.name.endswith(".tmp") or path.name == ".lock" or "building-" in path.name
    )


def remove(*folders: Path) -> None:
    """Remove folders, if they are there."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def timed(function: Callable[[], object]) -> float:
    """The seconds that a function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
