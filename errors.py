"""The one exception that means "your input is at fault, and here is the fix"."""


class InputError(SystemExit):
    """A user's file, folder or argument cannot be used; raised before anything is trained or written.

    The message names what was wrong, where (the file), and what to do. Uncaught, it ends the program
    with that one line and status 1 instead of a traceback. It is no ``ValueError`` because the parser of
    the command line swallows every ``Exception`` of a constructor into a message about types.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")


def require(fits: bool, argument: str, value: object, fix: str) -> None:
    """Raise :class:`InputError` naming an argument, its value and the fix, unless the value fits."""
    if not fits:
        raise InputError(f"{argument} {value!r}: {fix}")
