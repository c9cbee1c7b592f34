"""The exception whose message is meant for users, and a test for an error of MLX."""

# A message may quote a whole row or configuration; its beginning and end are kept.
MOST_CHARACTERS, OF_THE_END = 1500, 290


class EdgeLoraError(Exception):
    """An error that the user can fix.

    The message names the place, the value found, the value expected and what to do. Commands
    print it without a traceback and exit with status 2; Python code catches it like any other
    exception. A message of more than 1500 characters loses its middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, MOST_CHARACTERS, OF_THE_END))


def shortened(text: str, most: int, end: int = 0) -> str:
    """A text of at most `most` characters, `end` of them from its end."""
    if len(text) <= most:
        return text
    mark = " […] " if end else "…"
    return text[: most - end - len(mark)] + mark + text[len(text) - end :]


def shown(value: object) -> str:
    """A value as an error message quotes it: `repr`, of at most 200 characters."""
    try:
        return shortened(repr(value), 200, 40)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return "a number of thousands of digits"


def is_killed(error: BaseException) -> bool:
    """Whether macOS ended a computation on the GPU because of its duration or of memory.

    MLX raises this error at the next use of the GPU, possibly in unrelated code.
    """
    return isinstance(error, RuntimeError) and "Command buffer execution failed" in str(error)
