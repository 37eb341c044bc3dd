"""The errors that reach a user: of a recipe, and of a run. They carry a finished message; they know nothing of how it is shown."""


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
