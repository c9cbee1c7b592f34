"""New folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import cannot_write, remove, sync_folder


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
    building = None
    try:
        save_path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{save_path.name}.", dir=save_path.parent))
        building.chmod(0o755)  # mkdtemp's folders are private
        yield building
        sync_folder(building)
        os.rename(building, save_path)
        sync_folder(save_path.parent)
    except OSError as error:
        raise cannot_write(save_path, error) from error
    finally:
        if building is not None:
            remove(building)
