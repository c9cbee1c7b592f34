"""New folders that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import cannot_write, sync_folder
from mlx_edgelora.storage.temporaries import temporary_folder


@contextmanager
def new_folder(save_path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder that is renamed to `save_path` at the end of the block.

    Raises:
        EdgeLoraError: `save_path` exists, or a file cannot be written. After this or any other
            error in the block the temporary folder is removed and `save_path` does not exist.
    """
    save_path = Path(save_path)
    if os.path.lexists(save_path):
        raise EdgeLoraError(
            f"save_path: {save_path} exists, expected a new folder; remove it or choose another"
        )
    try:
        with temporary_folder(save_path) as building:
            yield building
            sync_folder(building)
            os.rename(building, save_path)
            with suppress(OSError):  # it is complete, and at worst lost by a power failure
                sync_folder(save_path.parent)
    except OSError as error:
        raise cannot_write(save_path, error) from error
