"""A full or failing disk, or the end of the process, at single operations of a short run."""

import errno
import os
import shutil

import mlx.core as mx
import pytest
from faults import Faults, faulty
from tiny import make_data, make_model, run_options

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.training.adapters import check_adapter
from mlx_edgelora.training.checkpoints import find_checkpoint

SHORT = {
    "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.2},
    "batch_size": 3,
    "grad_accumulation_steps": 3,
    "optimizer": "adamw",
    "save_every": 2,
    "val_batches": 1,
    "steps_per_eval": 2,
    "save_best": True,
    "verify": "off",
    "weights": "streamed",
    "activations": "spill",
    "adapters": "paged",
}
WRITTEN = "log", "report", "plan_out"


class Disturbed:
    """A run that was stopped after two steps and goes on to the fourth, over and over."""

    def __init__(self, root):
        self.root = root
        make_model(root / "model")
        make_data(root / "data", rows=10, splits=("train", "valid"))
        self.run(adapter_path=str(root / "before"), iters=2)
        self.saves = {self.weights(root / "before")}
        self.reset()
        with faulty(Faults()) as faults:
            self.go_on()
        self.operations, self.expected = faults.calls, self.weights(root / "run")
        self.saves.add(self.expected)

    def run(self, **changes):
        base = run_options(self.root, self.root) | SHORT | {"spill_dir": str(self.root / "spill")}
        (self.root / "spill").mkdir(exist_ok=True)
        finetune(TrainConfig.from_dict(base | changes), notify=lambda line: None)

    def go_on(self):
        files = {name: str(self.root / "written" / name) for name in WRITTEN}
        self.run(adapter_path=str(self.root / "run"), iters=4, resume=True, **files)

    def reset(self):
        for name in ("run", "written"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        shutil.copytree(self.root / "before", self.root / "run")
        (self.root / "written").mkdir()

    def weights(self, folder):
        return (folder / "adapters.safetensors").read_bytes()

    def check(self, at, **failure):
        self.reset()
        try:
            with faulty(Faults(at, **failure)):
                self.go_on()
        except EdgeLoraError as error:
            said = str(error)
            assert "\n" not in said and os.strerror(failure["error"]) in said, error
        checkpoint = find_checkpoint(self.root / "run")
        step = checkpoint.state.step
        assert step in (2, 3, 4)
        assert check_adapter(self.root / "run" / "adapters.safetensors") is None
        # A run that fails in its fourth step saves the third, which the undisturbed one does not.
        assert self.weights(self.root / "run") in {*self.saves, self.weights(checkpoint.folder)}
        assert left_overs(self.root) == []
        if step < 4:
            self.go_on()
            assert self.weights(self.root / "run") == self.expected


def left_overs(folder):
    return [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == ".lock"]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    mx.disable_compile()
    return Disturbed(tmp_path_factory.mktemp("disturbed"))


def test_operations_of_all_kinds_are_counted(disturbed):
    kinds = {"open", "write", "fsync", "replace", "mkdir"}
    assert kinds <= set(disturbed.operations)
    assert len(disturbed.operations) > 80


@pytest.mark.parametrize(
    "failure",
    [{"error": errno.ENOSPC, "lasting": True}, {"error": errno.EIO}],
    ids=["full", "one error"],
)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.5, 0.8])
def test_a_disk_that_fails_once_or_for_good(disturbed, failure, share):
    disturbed.check(1 + int(share * len(disturbed.operations)), **failure)


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure",
    [
        {"error": errno.ENOSPC, "lasting": True},
        {"error": errno.ENOSPC},
        {"error": errno.EDQUOT},
        {"error": errno.EIO},
    ],
    ids=["full", "ENOSPC", "EDQUOT", "EIO"],
)
def test_a_disk_that_fails_at_every_ninth_operation(disturbed, failure):
    """`dev/reliability/faulty_disk.py` takes all of them."""
    for at in range(1, len(disturbed.operations) + 1, 9):
        disturbed.check(at, **failure)
