"""How every command ends: one sentence for what is wrong, and an exit status."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence

from mlx_edgelora.errors import EdgeLoraError

# Exit statuses beside those of signals.
WRONG, UNFORESEEN, OUTPUT_CLOSED = 2, 70, 141
INTERRUPTED = 130
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
            return run(arguments)
        except EdgeLoraError as error:
            _say(f"error: {error}")
            return WRONG
        except KeyboardInterrupt as interrupt:
            return getattr(interrupt, "status", INTERRUPTED)
        except BrokenPipeError:
            # Python would complain once more when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OUTPUT_CLOSED
        except Exception as error:
            if debug:
                raise
            _say(
                f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
                "please report it with what the same command prints with --debug"
            )
            return UNFORESEEN

    return main


def _say(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS - 300]} […] {text[-290:]}"
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(text, file=sys.stderr)
