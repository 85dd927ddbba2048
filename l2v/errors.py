"""Errors that the user can fix: one sentence and an exit code, never a traceback."""


class UserError(Exception):
    """Something outside the program is wrong (a file, a row, a run directory); exit code 1."""

    exit_code = 1


class RecipeError(UserError):
    """The recipe or the command line is wrong; exit code 2. The message names file and line, or the key."""

    exit_code = 2


class Notice(UserWarning):
    """What the user should know about a result and need not fix; the program `l2v` prints it as one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
