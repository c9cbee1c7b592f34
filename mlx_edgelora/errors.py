"""The one exception whose text is meant for the user, and how to know one of MLX's."""


class EdgeLoraError(Exception):
    """A mistake that the user can mend.

    The text is one sentence that names the place, what was found, what was
    expected and what to do. Commands print it without a traceback and exit
    with status 2; Python callers catch it as any other exception.
    """


def is_killed(error: BaseException) -> bool:
    """Whether macOS ended a computation on the GPU: it took too long, or memory ran out.

    MLX raises this wherever it next looks at the GPU, in a trial of something else, say.
    """
    return isinstance(error, RuntimeError) and "Command buffer execution failed" in str(error)
