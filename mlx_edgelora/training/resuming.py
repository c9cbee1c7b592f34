"""Resume a run: lock its folder, and check that options, model and data are unchanged."""

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
from mlx_edgelora.data import Dataset
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import Checkpoint as ModelFiles
from mlx_edgelora.storage.files import locked, make_folder, write_atomically
from mlx_edgelora.storage.temporaries import remove_left_overs
from mlx_edgelora.training.adapters import CONFIG_FILE, WEIGHTS_FILE
from mlx_edgelora.training.checkpoints import (
    BEST_FOLDER,
    FOLDER,
    Checkpoint,
    check_unused,
    find_checkpoint,
    fingerprint,
    newest_checkpoint,
)
from mlx_edgelora.training.text import abbreviate

# Options that do not change what the remaining steps learn.
FREE = frozenset(
    {
        "accept_changes",
        "adapter_path",
        "balance",
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
        "sample_every",
        "sample_prompts",
        "sample_tokens",
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
# Options of the memory plan. Another plan gives the same gradients except for rounding.
MEMORY = "memory_budget", "weights", "activations", "adapters", "kernel", "plan"
# Options with paths, which may be relative to the working folder of the run.
INPUTS = "model", "data", "plan", "resume_adapter_file"
OUTPUTS = "cache_dir", "log", "memory_profile", "plan_out", "report", "spill_dir"
# Options whose contents are compared by fingerprint.
CONTENTS = "model", "data"


@contextmanager
def run_folder(config: TrainConfig, leads: bool = True) -> Iterator[Checkpoint | None]:
    """Create and lock the adapter's folder, and find the checkpoint to resume from.

    Args:
        config: options of the run.
        leads: whether this process writes into the folder; if not, it only finds the checkpoint.

    Yields:
        The checkpoint; None for a new run.

    Raises:
        EdgeLoraError: another process is writing to the folder, the folder contains a run and
            neither `resume` nor `overwrite` is set, or the checkpoint cannot be used.
    """
    if not config.train:
        yield None
        return
    folder = Path(config.adapter_path)
    if not leads:
        place = folder if config.resume is True else config.resume
        yield find_checkpoint(Path(place)) if place else None
        return
    is_new = not folder.exists()
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        if is_new:  # a run that saves nothing leaves no folder
            stack.callback(_remove_if_empty, folder)
        stack.enter_context(locked(folder))
        remove_left_overs(folder)
        remove_left_overs(folder / FOLDER)
        remove_left_overs(folder / BEST_FOLDER)
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
    newest = newest_checkpoint(folder)
    if int(newest.name) > checkpoint.state.step:
        raise EdgeLoraError(
            f"resume: {checkpoint.folder} is not the newest checkpoint, {newest} is, which "
            "would be overwritten; resume from that one, or choose another --adapter-path"
        )


def check_iters(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise `EdgeLoraError` if the run has finished all its steps.

    Its adapter is saved before: a kill between the last checkpoint and the adapter left an older
    one.
    """
    if config.iters <= checkpoint.state.step:
        folder = Path(config.adapter_path)
        if checkpoint.folder.parent.resolve() == (folder / FOLDER).resolve():
            _publish(checkpoint, folder)
        raise EdgeLoraError(
            f"iters: got {config.iters}, but {checkpoint.folder} is of step "
            f"{checkpoint.state.step} already; raise it to go on"
        )


def _publish(checkpoint: Checkpoint, folder: Path) -> None:
    """Make a checkpoint's adapter the one of the run's folder."""
    # The weights last: without them the configuration counts for nothing.
    names = CONFIG_FILE, WEIGHTS_FILE
    wanted = {folder / name: (checkpoint.folder / name).read_bytes() for name in names}
    if any(not file.exists() or file.read_bytes() != content for file, content in wanted.items()):
        writers = {
            file: lambda target, content=content: target.write(content)
            for file, content in wanted.items()
        }
        write_atomically(writers, folder / WEIGHTS_FILE)


def saved_options(place: Path) -> dict[str, Any]:
    """The options of the run in a folder, with that folder as `adapter_path`.

    Args:
        place: a checkpoint's folder, or the adapter folder of a run.

    Raises:
        EdgeLoraError: there is no checkpoint, or it is damaged.
    """
    checkpoint = find_checkpoint(place)
    never = {"resume", "accept_changes", "overwrite", "max_time", "config"}
    options = {key: value for key, value in checkpoint.config.items() if key not in never}
    options |= _from_here(options, checkpoint.state.working_folder)
    if checkpoint.folder.absolute().parent.name != FOLDER:  # a copy in another place
        return options
    return options | {"adapter_path": os.path.normpath(checkpoint.folder / ".." / "..")}


def _from_here(options: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Paths relative to another working folder, as absolute ones."""
    if not folder or folder == os.getcwd():
        return {}
    paths = {}
    for name in (*INPUTS, *OUTPUTS):
        value = options.get(name)
        if not isinstance(value, str) or not value or os.path.isabs(value):
            continue
        path = os.path.normpath(os.path.join(folder, value))
        if name in OUTPUTS or os.path.exists(path):  # other names are those of the Hub
            paths[name] = path
    return paths


def with_saved(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """Compare the options with those of the checkpoint; returns the options to resume with.

    Raises:
        EdgeLoraError: an option that changes what is learned differs, and is not in
            `accept_changes`.
    """
    if config.num_layers is None:
        config = dataclasses.replace(config, num_layers=checkpoint.config.get("num_layers"))
    now = json.loads(json.dumps(config.to_dict()))
    changed = [
        name
        for name, value in now.items()
        if name not in FREE and name not in MEMORY and value != checkpoint.config.get(name)
    ]
    # Other paths of the same model or data are no change; `check_contents` compares fingerprints.
    changed = [name for name in changed if name not in CONTENTS]
    _refuse(
        {name: (checkpoint.config.get(name), now[name]) for name in changed}, config, checkpoint
    )
    return config


def check_contents(found: Mapping[str, str], config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Check that the model and the rows are those of the checkpoint.

    Args:
        found: current fingerprints.
        config: current options.
        checkpoint: checkpoint of the run.

    Raises:
        EdgeLoraError: a fingerprint differs, and its option is not in `accept_changes`.
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
    """The options with the checkpoint's memory plan, unless options of the plan have changed."""
    saved = checkpoint.config
    now = json.loads(json.dumps(config.to_dict()))
    if checkpoint.plan is None or any(now[name] != saved.get(name) for name in MEMORY):
        return config
    unset = dict.fromkeys(("memory_budget", "weights", "activations", "adapters"))
    return dataclasses.replace(config, plan=str(checkpoint.plan), kernel="auto", **unset)


def options_digest(config: TrainConfig) -> str:
    """SHA-256 of the options that decide what is learned, apart from paths of model and data."""
    options = json.loads(json.dumps(config.to_dict()))
    kept = {k: v for k, v in options.items() if k not in {*FREE, *MEMORY, *CONTENTS}}
    return fingerprint(iter([json.dumps(kept, sort_keys=True).encode()]))


def fingerprints(files: ModelFiles, train_set: Sequence) -> dict[str, str]:
    """Fingerprints of a model and its training rows, as SHA-256 by option name.

    Args:
        files: files of the model; config.json and headers are read, weights are not.
        train_set: rows of tokens and labelled spans.
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
        if isinstance(train_set, Dataset) and (judgement := train_set.judgement(index)):
            yield judgement.encode()
