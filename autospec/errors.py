"""The exception for a user's mistake: the command line prints its sentence and no traceback."""


class UserError(ValueError):
    """Input that cannot be used; the message says what, where and what to do."""
