"""Error messages and exit statuses that all commands share."""

import contextlib
import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence

from mlx_edgelora.errors import EdgeLoraError

# Exit statuses other than those of signals.
WRONG, UNFORESEEN, OUTPUT_CLOSED = 2, 70, 141
INTERRUPTED = 130
# Errors of standard output. Errors of files are EdgeLoraErrors already.
_OF_OUTPUT = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF

Main = Callable[[Sequence[str]], int]


def command(run: Main) -> Callable[[Sequence[str] | None], int]:
    """Wrap a function of a command's arguments as its `main`, which handles errors.

    Exit statuses are those of the function, or:

    - 2 for an `EdgeLoraError`, whose message is printed to standard error;
    - 70 for an unexpected error, whose traceback `--debug` shows;
    - 128 plus its number for a signal;
    - 141 if the reader of standard output is gone.

    Args:
        run: takes the arguments and returns an exit status.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        _open_closed_streams()
        arguments = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        _print_any_text()
        try:
            status = run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # errors of a flush at interpreter exit cannot be handled
            return status
        except EdgeLoraError as error:
            _say(f"error: {error}")
            return WRONG
        except KeyboardInterrupt as interrupt:
            return getattr(interrupt, "status", INTERRUPTED)
        except BrokenPipeError:
            _drop_output()
            return OUTPUT_CLOSED
        except Exception as error:
            if debug:
                raise
            if isinstance(error, OSError) and error.filename is None and error.errno in _OF_OUTPUT:
                _drop_output()
                _say(f"error: standard output cannot be written ({error.strerror})")
                return WRONG
            _say(
                f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
                "please report it with what the same command prints with --debug"
            )
            return UNFORESEEN

    return main


def _print_any_text() -> None:
    """Escape what standard output cannot encode, as standard error does, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _open_closed_streams() -> None:
    """Connect standard streams that are closed to nothing.

    The next file that is opened would otherwise get the number of the stream, and lines that a
    library prints would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends


def _drop_output() -> None:
    """Redirect standard output to nothing, or Python would print another error at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    # A quoted name may hold control characters, which a terminal would obey.
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    with contextlib.suppress(OSError):  # standard error may be closed
        print(text, file=sys.stderr)
