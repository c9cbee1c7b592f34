"""Checkpoints: files from which a run resumes with the same results as without a stop.

    adapters/checkpoints/0000100/
        adapters.safetensors    the adapter, as at the top of the folder
        adapter_config.json     all options of the run
        state.safetensors       optimizer state, and gradients accumulated since the last update
        run.json                step, counts, key of MLX's random generator, fingerprints
        plan.json               the memory plan, because another plan rounds differently
        manifest.json           size and SHA-256 of each file, and SHA-256 of this list

A checkpoint is written under a temporary name and synced; its manifest is written last, and then
the folder is renamed. A checkpoint is therefore either complete or absent, and a changed bit in
any of its files is detected before it is used.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_edgelora.engine.adapter_state import AdapterState
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import Writer, cannot_write, sync, sync_folder
from mlx_edgelora.storage.safetensors import write_tensors
from mlx_edgelora.storage.temporaries import create, remove, temporary_folder
from mlx_edgelora.training.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_writer
from mlx_edgelora.training.group import Group

FOLDER = "checkpoints"
BEST_FOLDER = "best"
NUMBERED_FILES = f"[0-9]*_{WEIGHTS_FILE}"
STATE_FILE, RUN_FILE, PLAN_FILE, MANIFEST_FILE = (
    "state.safetensors",
    "run.json",
    "plan.json",
    "manifest.json",
)
# Version of the format; increase it when the meaning of the content changes.
VERSION = 1
_PACKAGES = ("mlx", "mlx-lm", "mlx-edgelora")


@dataclass(frozen=True)
class RunState:
    """Progress of a run.

    Attributes:
        step: number of finished steps.
        accumulated: total weight of the gradients summed since the last update; 0 after one.
        first_tokens: labelled tokens of the first batch in that sum, whose weight is 1.
        trained_tokens: labelled tokens over all steps.
        random_key: key of MLX's random generator, as two halves of 32 bits.
        train_loss: last reported training loss; None before the first report.
        val_loss: last reported validation loss; None before the first report.
        best_val_loss: lowest validation loss so far; None before the first validation.
        fingerprints: SHA-256 of the model and of the tokenized data.
        working_folder: folder that relative paths of the options start from; "" if unknown.
    """

    step: int
    accumulated: float
    first_tokens: int
    trained_tokens: int
    random_key: tuple[int, int]
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    fingerprints: dict[str, str]
    working_folder: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        folder: the checkpoint's folder.
        state: progress of the run.
        config: options of the run, as in `TrainConfig.to_dict`.
    """

    folder: Path
    state: RunState
    config: dict[str, Any]

    @property
    def weights(self) -> Path:
        """Path of the adapter's weights."""
        return self.folder / WEIGHTS_FILE

    @property
    def plan(self) -> Path | None:
        """Path of the memory plan; None if the run had no plan."""
        path = self.folder / PLAN_FILE
        return path if path.exists() else None

    def restore(self, adapters: AdapterState, optimizer: optimizers.Optimizer) -> None:
        """Restore the optimizer's state, accumulated gradients and MLX's random generator.

        Weights are not restored.

        Args:
            adapters: the parameters of this checkpoint, after `start`.
            optimizer: of the same kind and with the same arguments as the run's optimizer.
        """
        arrays = mx.load(os.fspath(self.folder / STATE_FILE), format="safetensors")

        def arrays_of(kind: str) -> Iterator[tuple[list[str], mx.array]]:
            for name in [name for name in arrays if name.startswith(f"{kind}:")]:
                yield name.split(":")[1:], arrays.pop(name)

        adapters.restore(
            ((tuple(names), value) for names, value in arrays_of("state")),
            ((name, value) for (name,), value in arrays_of("gradient")),
        )
        for (name,), value in arrays_of("optimizer"):
            optimizer.state[name] = value
        mx.eval(optimizer.state)
        high, low = self.state.random_key
        mx.random.seed(high << 32 | low)


@dataclass(frozen=True)
class Origin:
    """How a run starts: new or from a checkpoint, and with which model, data and plan.

    Attributes:
        checkpoint: the checkpoint to resume from; None for a new run.
        fingerprints: SHA-256 of the model and of the tokenized data.
        plan: returns the current memory plan as JSON text, or None.
        overwrites: whether the first save removes another run's files from the adapter's folder.
        group: the processes of the run, of which the first writes files.
        base: `weights_fingerprint` of the base model, kept with the adapter; None if unknown.
    """

    checkpoint: Checkpoint | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    plan: Callable[[], str | None] = lambda: None
    overwrites: bool = False
    group: Group = field(default_factory=Group)
    base: str | None = None

    @contextlib.contextmanager
    def replacing(self, run_folder: Path, patterns: Iterable[str]) -> Iterator[None]:
        """Context of the first save: remove another run's files if `overwrites` is set.

        The files, which match one of the glob patterns, are moved aside during the save and moved
        back if it fails. The next start removes what a crash left aside.

        Raises:
            EdgeLoraError: a file cannot be moved.
        """
        if not self.overwrites or self.checkpoint is not None:
            yield
            return
        paths = [path for name in patterns for path in run_folder.glob(name)]
        try:
            with temporary_folder(run_folder / "replaced") as aside:
                try:
                    for path in paths:
                        os.replace(path, aside / path.name)
                    yield
                except BaseException:
                    for path in paths:
                        if (aside / path.name).exists():
                            remove(path)
                            os.replace(aside / path.name, path)
                    raise
        except OSError as error:
            raise cannot_write(run_folder, error) from error


def check_unused(run_folder: Path) -> None:
    """Check that a folder contains no run.

    Raises:
        EdgeLoraError: the folder contains an adapter or checkpoints.
    """
    best = run_folder / BEST_FOLDER / WEIGHTS_FILE
    if (run_folder / WEIGHTS_FILE).exists() or best.exists() or _folders(run_folder):
        more = "--resume to go on with it, " if _folders(run_folder) else ""
        raise EdgeLoraError(
            f"adapter_path: {run_folder} holds the adapter of another run; use {more}--overwrite "
            "to replace it, or another --adapter-path"
        )


def save_checkpoint(
    run_folder: Path,
    adapters: AdapterState,
    optimizer: optimizers.Optimizer,
    state: RunState,
    config: Mapping[str, object],
    plan: str | None,
    base: str | None = None,
) -> Path:
    """Write a checkpoint of a run, one array at a time.

    Args:
        run_folder: the adapter's folder.
        adapters: the trained parameters, between two steps.
        optimizer: the optimizer, between two steps.
        state: progress of the run.
        config: options of the run.
        plan: JSON text of the memory plan; None without one.
        base: `weights_fingerprint` of the base model; None if unknown.

    Returns:
        The checkpoint's folder.

    Raises:
        EdgeLoraError: the checkpoint cannot be written. Its files are removed, and earlier
            checkpoints are unchanged.
    """
    final = run_folder / FOLDER / f"{state.step:07d}"
    writers: dict[str, Writer] = {
        WEIGHTS_FILE: adapter_writer(final, adapters.weights(), config, base),
        CONFIG_FILE: _json_writer(config),
        STATE_FILE: _state_writer(adapters, optimizer, state.accumulated),
        RUN_FILE: _json_writer(asdict(state)),
    }
    if plan is not None:
        writers[PLAN_FILE] = lambda file: file.write(plan.encode())
    try:
        with temporary_folder(final) as building:
            entries = {name: _write(building / name, writer) for name, writer in writers.items()}
            _write(building / MANIFEST_FILE, _json_writer(_manifest(entries)))
            sync_folder(building)
            _remove(final)  # the same step of the same run, so nothing is lost
            os.replace(building, final)
        sync_folder(final.parent)
        sync_folder(run_folder)
    except OSError as error:
        raise cannot_write(final, error) from error
    return final


def remove_old(run_folder: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep`."""
    for folder in _folders(run_folder)[:-keep]:
        with contextlib.suppress(OSError):  # it is removed after a later save
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, if it exists: all of it, or nothing that counts as a checkpoint."""
    if not folder.exists():
        return
    with temporary_folder(folder) as aside:
        os.replace(folder, aside / folder.name)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The folder of a run's newest checkpoint, which is not read; None without one."""
    return next(reversed(_folders(run_folder)), None)


def find_checkpoint(place: Path) -> Checkpoint:
    """Read the checkpoint in a folder, or the newest checkpoint of a run.

    Args:
        place: a checkpoint's folder, or the adapter folder of a run.

    Raises:
        EdgeLoraError: there is no checkpoint, or one of its files is damaged.
    """
    if (place / MANIFEST_FILE).exists():
        return _read(place)
    newest = newest_checkpoint(place)
    if newest is None:
        raise EdgeLoraError(
            f"resume: {place} has no checkpoint, expected the adapter folder of a run or one of "
            "its checkpoints; start without --resume, or load weights alone with "
            "--resume-adapter-file"
        )
    return _read(newest)


def fingerprint(parts: Iterator[bytes]) -> str:
    """SHA-256 of a sequence of byte strings and their lengths, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()


def _folders(run_folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    try:
        found = [path for path in (run_folder / FOLDER).iterdir() if path.name.isdecimal()]
    except OSError:
        return []
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name))


def _json_writer(content: Mapping[str, object]) -> Writer:
    return lambda file: file.write(_json_text(content))


def _json_text(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _state_writer(
    adapters: AdapterState, optimizer: optimizers.Optimizer, accumulated: float
) -> Writer:
    arrays: dict[str, Any] = {}
    for name, value in optimizer.state.items():
        if isinstance(value, mx.array):
            arrays[f"optimizer:{name}"] = lambda value=value: value
    states = adapters.optimizer_state()
    # If no batch is accumulated, these gradients are those of a step that failed.
    gradients = adapters.gradients() if accumulated else {}
    for name, key in states:
        arrays[f"state:{name}:{key}"] = lambda at=(name, key): states[at]
    for name in gradients:
        arrays[f"gradient:{name}"] = lambda at=name: gradients[at]
    specs = {}
    for name, get in arrays.items():
        array = get()
        specs[name] = array.dtype, array.shape
        del array
    return lambda file: write_tensors(file, specs, (get() for get in arrays.values()))


def _write(path: Path, writer: Writer) -> dict[str, object]:
    """Write and sync a file, and return its entry in the manifest."""
    with create(path) as file:
        writer(file)
        file.flush()
        sync(file.fileno())
    return _entry(path)


def _entry(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _manifest(entries: Mapping[str, object]) -> dict[str, object]:
    content = {"version": VERSION, "files": entries, "packages": package_versions()}
    return {"content": content, "sha256": _digest(content)}


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes, by name."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> Checkpoint:
    content = _read_manifest(folder / MANIFEST_FILE)
    if content.get("version") != VERSION:
        raise EdgeLoraError(
            f"{folder}: is a checkpoint of version {content.get('version')}, expected {VERSION}; "
            "resume it with the version of mlx_edgelora that wrote it, or load its weights alone "
            f"with --resume-adapter-file {folder / WEIGHTS_FILE}"
        )
    for name, expected in content["files"].items():
        try:
            found = _entry(folder / name)
        except OSError as error:
            raise _damaged(folder / name, error.strerror) from error
        if found != expected:
            raise _damaged(folder / name, "its size or checksum differs")
    if missing := {WEIGHTS_FILE, CONFIG_FILE, STATE_FILE, RUN_FILE} - content["files"].keys():
        raise _damaged(folder / MANIFEST_FILE, f"it does not name {min(missing)}")
    state = json.loads((folder / RUN_FILE).read_bytes())
    known = {field.name for field in fields(RunState)}
    state = RunState(**{key: value for key, value in state.items() if key in known})
    return Checkpoint(folder, state, json.loads((folder / CONFIG_FILE).read_bytes()))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        content, digest = manifest["content"], manifest["sha256"]
    except OSError as error:
        raise _damaged(path, error.strerror) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "it is not a manifest") from error
    if _json_text(manifest) != data or _digest(content) != digest:
        raise _damaged(path, "its checksum differs")
    return content


def _damaged(path: Path, why: str | None) -> EdgeLoraError:
    return EdgeLoraError(
        f"{path}: the checkpoint is damaged ({why}); delete {path.parent}, and --resume goes on "
        "from the one before it"
    )
