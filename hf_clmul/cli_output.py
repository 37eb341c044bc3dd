"""What every command of `hf-clmul` prints with: consoles of one width, and errors as one clear message. It knows no command."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from hf_clmul.errors import ClmulError, RecipeError

MAX_WIDTH = 120  # wider tables are hard to read
INTERRUPTED = 130  # what shells report for Ctrl-C


def is_main_process() -> bool:
    """False on all ranks but the first, which print nothing. RANK counts over machines, LOCAL_RANK within
    one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0


def console(stderr: bool = False) -> Console:
    """Made anew each time: the streams may have been redirected since."""
    made = Console(stderr=stderr, highlight=False, quiet=not is_main_process())
    made.width = min(made.width, MAX_WIDTH)
    return made


def say(text: str, stderr: bool = False) -> None:
    """Prints text as it is: no markup, no wrapping, so that it can be copied and searched."""
    console(stderr).print(text, markup=False, emoji=False, soft_wrap=True)


def names_of(option: str, given: str | None) -> list[str] | None:
    """The names in an option, None where it is left out. Raises RecipeError for one that names nothing."""
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    if given is not None and not names:
        raise RecipeError(f"{option}: it names nothing. Give names, with commas between them, or leave it out.")
    return names or None


@contextmanager
def errors_explained(debug: bool) -> Iterator[None]:
    """Turns every error into a message and an exit code; the traceback is for --debug."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        say("stopped; run the same command to continue", stderr=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, ClmulError):
            say(str(error), stderr=True)
        else:
            _say_unexpected(error)
        raise typer.Exit(error.exit_code if isinstance(error, ClmulError) else 1) from None


def _say_unexpected(error: Exception) -> None:
    message = " ".join(str(error).split())
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    # A failure of one rank alone would otherwise be seen as nothing but a hanging job.
    rank = "" if is_main_process() else f"rank {os.environ.get('RANK') or os.environ.get('LOCAL_RANK')}: "
    Console(stderr=True, highlight=False).print(
        f"{rank}{line}\nrun again with --debug for the traceback", markup=False, soft_wrap=True
    )
