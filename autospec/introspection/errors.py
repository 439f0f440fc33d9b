"""The one exception that watching raises for a user's mistake."""


class WatchError(ValueError):
    """A model, a batch or labels that cannot be watched; the message says what, where and what to do."""
