"""Going on with a run: its folder, and whether all that decides its result is as it was."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import Checkpoint as ModelFiles
from mlx_edgelora.storage.files import locked, make_folder, remove_temporaries
from mlx_edgelora.training.checkpoints import (
    BEST_FOLDER,
    FOLDER,
    Checkpoint,
    check_unused,
    find_checkpoint,
    fingerprint,
)
from mlx_edgelora.training.text import abbreviate

# Options that change nothing of what is learned in the steps that are left.
FREE = frozenset(
    {
        "accept_changes",
        "adapter_path",
        "cache_dir",
        "caffeinate",
        "clear_cache_threshold",
        "config",
        "duty",
        "epochs",
        "grad_checkpoint",
        "iters",
        "keep_checkpoints",
        "log",
        "max_time",
        "memory_profile",
        "overwrite",
        "plan_out",
        "project_name",
        "report",
        "report_to",
        "resume",
        "resume_adapter_file",
        "save_best",
        "save_every",
        "spill_dir",
        "steps_per_eval",
        "steps_per_report",
        "test",
        "test_batches",
        "train",
        "trust_remote_code",
        "val_batches",
        "verbose",
        "verify",
    }
)
# Options of the memory plan. Another plan gives the same gradients but for rounding.
MEMORY = "memory_budget", "weights", "activations", "adapters", "kernel", "plan"
# What fingerprints are compared of, and the options that name them.
CONTENTS = "model", "data"


@contextmanager
def run_folder(config: TrainConfig) -> Iterator[Checkpoint | None]:
    """Make and lock the adapter's folder; gives the checkpoint to go on from, if one is wanted.

    Raises:
        EdgeLoraError: another process is writing there, the folder holds a run and neither
            `resume` nor `overwrite` is set, or the checkpoint cannot be used.
    """
    if not config.train:
        yield None
        return
    folder = Path(config.adapter_path)
    is_new = not folder.exists()
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        if is_new:  # nothing stays of a run that saved nothing
            stack.callback(_remove_if_empty, folder)
        stack.enter_context(locked(folder))
        remove_temporaries(folder)
        remove_temporaries(folder / FOLDER)
        remove_temporaries(folder / BEST_FOLDER)
        checkpoint = None
        if config.resume:
            checkpoint = find_checkpoint(folder if config.resume is True else Path(config.resume))
            _check_place(checkpoint, folder)
        elif not config.overwrite:
            check_unused(folder)
        yield checkpoint


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_place(checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.folder.parent.resolve() != (folder / FOLDER).resolve():
        check_unused(folder)
        return
    newest = find_checkpoint(folder)
    if newest.state.step > checkpoint.state.step:
        raise EdgeLoraError(
            f"resume: {checkpoint.folder} is not the newest checkpoint, {newest.folder} is, which "
            "would be overwritten; resume from that one, or choose another --adapter-path"
        )


def check_iters(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Refuse to go on with a run that has done all its steps."""
    if config.iters <= checkpoint.state.step:
        raise EdgeLoraError(
            f"iters: got {config.iters}, but {checkpoint.folder} is of step "
            f"{checkpoint.state.step} already; raise it to go on"
        )


def saved_options(place: Path) -> dict[str, Any]:
    """The options of the run that a folder holds, with the folder as its `adapter_path`.

    Raises:
        EdgeLoraError: it holds no checkpoint, or a damaged one.
    """
    checkpoint = find_checkpoint(place)
    never = {"resume", "accept_changes", "overwrite", "max_time", "config"}
    options = {key: value for key, value in checkpoint.config.items() if key not in never}
    if checkpoint.folder.absolute().parent.name != FOLDER:  # a copy, somewhere else
        return options
    return options | {"adapter_path": os.path.normpath(checkpoint.folder / ".." / "..")}


def with_saved(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The options to go on with: those of `config`, once they are found to be the run's.

    Raises:
        EdgeLoraError: an option that decides what is learned differs, and is not accepted.
    """
    if config.num_layers is None:
        config = dataclasses.replace(config, num_layers=checkpoint.config.get("num_layers"))
    now = json.loads(json.dumps(config.to_dict()))
    changed = [
        name
        for name, value in now.items()
        if name not in FREE and name not in MEMORY and value != checkpoint.config.get(name)
    ]
    # Names that lead to the same bytes are no change; these are compared.
    changed = [name for name in changed if name not in CONTENTS]
    _refuse(
        {name: (checkpoint.config.get(name), now[name]) for name in changed}, config, checkpoint
    )
    return config


def check_contents(found: Mapping[str, str], config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Refuse to go on with another model or other rows.

    Args:
        found: fingerprints of now.
        config: of now.
        checkpoint: of the run.

    Raises:
        EdgeLoraError: one differs, and is not accepted.
    """
    saved = checkpoint.state.fingerprints
    changed = [name for name in found if saved.get(name) != found[name]]
    _refuse({name: ("other contents", "these") for name in changed}, config, checkpoint)


def _refuse(
    changed: Mapping[str, tuple[Any, Any]], config: TrainConfig, checkpoint: Checkpoint
) -> None:
    accepted = config.accept_changes or ()
    refused = {name: values for name, values in changed.items() if name not in accepted}
    if refused:
        differing = abbreviate(
            [f"{name} (was {was!r}, is {now!r})" for name, (was, now) in refused.items()]
        )
        raise EdgeLoraError(
            f"resume: {differing} differs from the run in {checkpoint.folder}; put it back, or go "
            f"on all the same with --accept-changes {','.join(refused)}"
        )


def planned(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The options with the memory plan of the checkpoint, unless others were asked for since."""
    saved = checkpoint.config
    now = json.loads(json.dumps(config.to_dict()))
    if checkpoint.plan is None or any(now[name] != saved.get(name) for name in MEMORY):
        return config
    unset = dict.fromkeys(("memory_budget", "weights", "activations", "adapters"))
    return dataclasses.replace(config, plan=str(checkpoint.plan), kernel="auto", **unset)


def fingerprints(files: ModelFiles, train_set: Sequence) -> dict[str, str]:
    """What tells a model and rows from others: SHA-256 of headers and of tokens and labels.

    Args:
        files: of the model; sizes, headers and config.json are looked at, no weights.
        train_set: rows of (tokens, labelled).
    """
    return {
        "model": fingerprint(_model_parts(files)),
        "data": fingerprint(_row_parts(train_set)),
    }


def _model_parts(files: ModelFiles) -> Iterator[bytes]:
    yield json.dumps(files.config, sort_keys=True).encode()
    for name in sorted(files.tensors):
        shard, info = files.tensors[name]
        yield repr((name, shard.name, info.dtype, info.shape, info.start)).encode()


def _row_parts(train_set: Sequence) -> Iterator[bytes]:
    for index in range(len(train_set)):
        for part in train_set[index]:
            yield np.asarray(part, np.int32).tobytes()
