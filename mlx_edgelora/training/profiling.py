"""Memory of a step by phase, recorded for the log and the files of `memory_profile`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.measure.profile import Profile, recording
from mlx_edgelora.storage.files import make_folder, write_atomically
from mlx_edgelora.training.callbacks import TrainingCallback
from mlx_edgelora.training.log import RunLog


@contextmanager
def memory_profile(
    config: TrainConfig, notify: Callable[[str], None], log: RunLog | None
) -> Iterator[list[TrainingCallback]]:
    """Record the memory of each step, and write that of the last step on exit.

    Args:
        config: `memory_profile` names the folder of files; None for no files.
        notify: called with a table of the last step, if files are written.
        log: gets a record of the memory; None without a log.

    Yields:
        Callbacks for the run. They log the step before the first report, so that a failed run has
        a record too.
    """
    if config.memory_profile is None and log is None:
        yield []
        return
    if config.memory_profile is not None:
        make_folder(Path(config.memory_profile))
    with recording() as profile:
        yield [] if log is None else [_FirstStep(profile, log)]
    if log is not None:
        log.note("step_memory", profile.rows())
    if config.memory_profile is not None:
        _write_profile(Path(config.memory_profile), profile, notify)


class _FirstStep(TrainingCallback):
    """Logs the memory of the step before the first report."""

    def __init__(self, profile: Profile, log: RunLog) -> None:
        self._profile, self._log = profile, log
        self._done = False

    def on_train_loss_report(self, train_info: dict) -> None:
        """Log the memory at the first report of a training loss."""
        if not self._done:
            self._done = True
            self._log.note("step_memory", self._profile.rows())


def _write_profile(folder: Path, profile: Profile, notify: Callable[[str], None]) -> None:
    """Write the memory of the last step to files, and show it as a table."""
    writers = {folder / "memory.json": lambda file: file.write(profile.json().encode())}
    if find_spec("matplotlib") is not None:
        writers[folder / "memory.png"] = profile.plot
    write_atomically(writers)
    notify(f"memory of the last step ({', '.join(map(str, writers))}):\n{profile.table()}")
