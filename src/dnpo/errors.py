"""Errors that are messages to the user, printed without a traceback."""


class DnpoError(Exception):
    """An error that the user can fix. The text names the setting or the file and line, and what was expected."""


class SettingsError(DnpoError):
    """A setting is unknown, missing or has a value that cannot work."""


class DataError(DnpoError):
    """A file or row that was given cannot be used."""


class ModelError(DnpoError):
    """A model, tokenizer or template that was given cannot be used."""


class TrackingError(DnpoError):
    """The tracking store cannot be reached or written."""


class JudgeError(DnpoError):
    """A judge cannot be reached, or too many of its verdicts are missing."""


class EngineError(DnpoError):
    """A server that generates cannot be reached, or what it returned cannot be used."""


class LedgerError(DnpoError):
    """The file of judge calls cannot be opened or read."""


class StepZeroError(DnpoError):
    """Before the first update, the policy differs from the one that training starts from."""


class NonFiniteLossError(DnpoError):
    """A loss became NaN or infinite."""


class OutOfMemoryError(DnpoError):
    """A step does not fit into memory."""


class DiskError(DnpoError):
    """The disk is full, or cannot be written to."""


class StoreError(DnpoError):
    """A finished stage has changed since it was written, or cannot be checked."""


class RankError(DnpoError):
    """One of the processes that share a stage's work has ended."""


class Declined(Exception):
    """Raised by an optional stage (a cache) that declines to run, with the reason; other stages run without it."""
