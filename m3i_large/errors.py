"""The one error type that means: the input is wrong, the program is right."""


class UserError(ValueError):
    """A mistake in what the user gave: one line naming the field, the value got and the value needed.

    Commands print it without a traceback and exit with status 2.
    """
