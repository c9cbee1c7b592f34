"""Caches and left-overs: what there is, how large it is, and its removal."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_edgelora.checkup.job import Checkup, Found
from mlx_edgelora.measure.units import size
from mlx_edgelora.storage.temporaries import is_used, left_over_scratch, left_overs, remove

RANDOM_MODELS = "random-models"
LEFT_OVER = "left-over of a dead run"
# Kinds of entries of a cache by their names; nothing else in a folder is touched.
KINDS = {
    r"machine\.json": "speed of this machine",
    r"measured\.json": "measured phases of steps",
    r"neighbours-[0-9a-f]{16}-k\d+\.bin": "nearest tokens",
    r".+-[0-9a-f]{16}": "converted model",
}


@dataclass(frozen=True)
class Entry:
    """A file or folder that can be removed without losing results.

    Attributes:
        path: the file or folder.
        kind: what it is.
        bytes: its space on the disk.
        used: whether a living process uses it.
    """

    path: Path
    kind: str
    bytes: int
    used: bool


def entries(cache: Path, scratch: Iterable[Path]) -> list[Entry]:
    """What is in a cache, and left-overs in folders of scratch files.

    Args:
        cache: the folder of caches; it may be missing.
        scratch: folders of scratch files.
    """
    left = [path for folder in dict.fromkeys(scratch) for path in left_over_scratch(folder)]
    left += left_overs(cache)
    kept = [(path, _kind(path)) for path in _paths(cache)]
    kept += [(path, "random model of the benchmark") for path in _paths(cache / RANDOM_MODELS)]
    found = [(path, LEFT_OVER) for path in left] + [(path, kind) for path, kind in kept if kind]
    return [Entry(path, kind, _bytes(path), is_used(path)) for path, kind in found]


def clean(found: Iterable[Entry]) -> Iterator[str]:
    """Remove entries that no living process uses; yields a line for each."""
    for entry in found:
        what = f"{entry.path} ({entry.kind}, {size(entry.bytes)})"
        if is_used(entry.path):
            yield f"kept, a process uses it: {what}"
            continue
        remove(entry.path)
        gone = not os.path.lexists(entry.path)
        yield f"removed: {what}" if gone else f"cannot be removed: {what}"


def caches(job: Checkup) -> Found:
    """Kinds of caches with their number and size; `doctor --clean` removes unused ones."""
    found = entries(job.cache, [job.folder.parent])
    rows = []
    for kind in dict.fromkeys(entry.kind for entry in found):
        same = [entry for entry in found if entry.kind == kind]
        used = sum(entry.used for entry in same)
        total = sum(entry.bytes for entry in same)
        rows.append({"what": kind, "count": len(same), "in_use": used, "bytes": total})
    unused = sum(entry.bytes for entry in found if not entry.used)
    return {"folder": job.cache, "clean_removes_bytes": unused, "caches": rows}


def _kind(path: Path) -> str | None:
    for pattern, kind in KINDS.items():
        if re.fullmatch(pattern, path.name):
            is_model = (path / "config.json").is_file()
            return kind if is_model == (kind == "converted model") else None
    return None


def _paths(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _bytes(path: Path) -> int:
    """Bytes on the disk; holes of a file take none."""
    parts = [path, *path.rglob("*")] if path.is_dir() else [path]
    total = 0
    for part in parts:
        try:
            total += 512 * os.lstat(part).st_blocks
        except OSError:
            continue  # removed meanwhile
    return total
