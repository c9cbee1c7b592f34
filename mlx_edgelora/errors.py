"""The exception whose message is meant for users, and a test for an error of MLX."""


class EdgeLoraError(Exception):
    """An error that the user can fix.

    The message names the place, the value found, the value expected and what to do. Commands
    print it without a traceback and exit with status 2; Python code catches it like any other
    exception.
    """


def is_killed(error: BaseException) -> bool:
    """Whether macOS ended a computation on the GPU because of its duration or of memory.

    MLX raises this error at the next use of the GPU, possibly in unrelated code.
    """
    return isinstance(error, RuntimeError) and "Command buffer execution failed" in str(error)
