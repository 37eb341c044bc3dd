"""The errors that reach a user, with a finished message, and the reason of a library's error in one line. They know
nothing of how it is shown."""

AGAIN = "Delete it and give `hf-clmul run` again: it is written anew."
"""The remedy for a record of a run that cannot be read."""


def reason(error: BaseException) -> str:
    """The first line of a library's error; where that only announces a list, the beginning of the whole."""
    text = str(error).strip() or repr(error)
    first = text.splitlines()[0].rstrip()
    return " ".join(text.split())[:200] if first.endswith(":") else first


class ClmulError(Exception):
    """Base of the errors whose message is written for the user. `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(ClmulError):
    """The recipe (or the data it names) cannot be used as written."""

    exit_code = 2


class RunError(ClmulError):
    """The run could not go on. What was finished stays on disk and can be resumed."""


class NotFinite(RunError):
    """What a model gives are no numbers: it is destroyed, or its precision is too low. An attack on it ends there, and nothing else."""
