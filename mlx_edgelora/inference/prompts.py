"""Read prompts: a text, or a file with a text or a JSON object in each line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_edgelora.errors import EdgeLoraError


def read_prompts(path: Path, option: str) -> Iterator[tuple[str, Any]]:
    """The lines of a file of prompts: their places, and texts or JSON values.

    Args:
        path: the file.
        option: the option that names it, for messages.

    Raises:
        EdgeLoraError: the file cannot be read or is empty, or a line is not JSON.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeLoraError(f"{option}: {path} cannot be read ({error})") from error
    if not any(line.strip() for line in lines):
        raise EdgeLoraError(f"{option}: {path} is empty, expected a prompt in each line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        if not line.lstrip().startswith("{"):
            yield place, line
            continue
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EdgeLoraError(f"{place}: is not JSON ({error})") from error


def conversation(row: Any, place: str, system_prompt: str | None) -> list[dict[str, Any]]:
    """The messages of a prompt, without its answer.

    Args:
        row: a text, a list of messages, or an object with `prompt` or `messages`.
        place: where the row is from, for messages.
        system_prompt: added before a text; None for none.

    Raises:
        EdgeLoraError: the row is neither.
    """
    if isinstance(row, dict):
        row = row.get("messages") or row.get("prompt")
    if isinstance(row, list) and row and all(map(_is_message, row)):
        return row
    if not isinstance(row, str) or not row.strip():
        raise EdgeLoraError(f"{place}: got {row!r:.60}, expected a prompt or messages")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": row}]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
