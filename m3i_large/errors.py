"""Errors that are told in one line: the input is wrong, the environment failed, the training diverged. All else is a
defect."""


class UserError(ValueError):
    """A mistake in what the user gave: one line naming the field, the value got and the value needed.

    Commands print it without a traceback and exit with status 2.
    """


class OutageError(Exception):
    """What the program depends on failed for too long: storage, another process. Commands exit with status 1.

    Never a ValueError: an outage must not be taken for a bad sample and papered over with a substitute.
    """


class DivergenceError(ArithmeticError):
    """The training does not get past steps that are not finite, or spike. Commands exit with status 1."""


# Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL, which schedulers are told to requeue.
REQUEUE = 75
