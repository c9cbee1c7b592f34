"""How every command ends: one sentence for what is wrong, and an exit status."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence

from mlx_edgelora.errors import EdgeLoraError

# Exit statuses beside those of signals.
WRONG, UNFORESEEN, OUTPUT_CLOSED = 2, 70, 141
INTERRUPTED = 130
# Of a standard output that takes no more; errors of files are sentences already.
_OF_OUTPUT = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF
# An error's text may be a whole configuration.
MOST_CHARACTERS = 1500

Main = Callable[[Sequence[str]], int]


def command(run: Main) -> Callable[[Sequence[str] | None], int]:
    """Make the `main` of a command of a function that takes arguments and gives an exit status.

    What the user can mend ends with status 2 and a sentence on standard error, what nobody
    foresaw with 70; `--debug` shows its traceback. A signal ends with 128 and its number, an
    output whose reader has gone with 141.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        try:
            status = run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # at the exit nobody would handle what goes wrong
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


def _drop_output() -> None:
    """Python would complain once more when it exits."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS - 300]} […] {text[-290:]}"
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(text, file=sys.stderr)
