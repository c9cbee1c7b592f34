"""Text helpers that several messages share."""

from collections.abc import Sequence


def abbreviate(names: Sequence[str]) -> str:
    """The first three names and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
