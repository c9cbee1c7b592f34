"""Format sizes and times: decimal units, three digits."""

import math

UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float, up: bool = False) -> str:
    """Bytes in decimal units: 18.4 kB, 512 MB, 4.20 GB.

    With `up`, the number is rounded up, as for a required minimum.
    """
    for unit in UNITS:
        if abs(count) < 999.5 or unit == UNITS[-1]:
            break
        count /= 1000
    digits = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    if up:
        count = math.ceil(round(count * 10**digits, 9)) / 10**digits
    return f"{count:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours: 0.505 s, 12.3 s, 45 min, 7.5 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """Remaining time as a clock: 0:27, 12:05, 3:04:59."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
