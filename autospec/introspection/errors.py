"""The exceptions that watching raises for a user's mistake."""


class WatchError(ValueError):
    """A model, a batch or labels that cannot be watched; the message says what, where and what to do."""


class UntracedRows(WatchError):
    """Rows whose samples tracing does not tell; the message says which, and who catches it what to do."""


class SeveralReadings(WatchError):
    """The samples could lie along several dimensions of the inputs."""


class FailedCopy(WatchError):
    """The copy of the model that rows are traced with failed, as the model itself may be about to."""


class NoSamples(WatchError):
    """No input of the model has as many entries as there should be samples."""
