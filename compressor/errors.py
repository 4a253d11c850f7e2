"""The errors a user may see: each says what is wrong, where, and how to mend it."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class CompressorError(Exception):
    """Base of every error that reaches the user as one message and not as a traceback.

    Args:
        what: what is wrong, one sentence without a final full stop.
        where: the place, such as ``recipe.yaml:12`` or a file or layer name.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class RecipeError(CompressorError):
    """The recipe (or the command line) is at fault; the process exits with code 2."""

    exit_code = 2


class RunError(CompressorError):
    """The run failed although the recipe was valid; the process exits with code 1."""

    exit_code = 1
