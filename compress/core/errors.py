"""What can go wrong for a user, each with its documented exit code."""


class CompressError(Exception):
    """A failure that one clear line explains; ``exit_code`` is what the command returns."""

    exit_code = 2


class InputError(CompressError):
    """Wrong usage or input: a path, a config, a tensor, a setting. Exit code 2."""


class Infeasible(CompressError):
    """No student of the space fits the budget; the message names the floor. Exit code 3."""

    exit_code = 3


class VerificationFailed(CompressError):
    """An artifact was written but does not compute what it should. Exit code 4."""

    exit_code = 4
