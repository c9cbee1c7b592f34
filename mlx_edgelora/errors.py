"""The one exception whose text is meant for the user."""


class EdgeLoraError(Exception):
    """A mistake that the user can mend.

    The text is one sentence that names the place, what was found, what was
    expected and what to do. Commands print it without a traceback and exit
    with status 2; Python callers catch it as any other exception.
    """
