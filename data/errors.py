"""Errors of the data room that callers tell apart by type."""


class CorruptData(ValueError):
    """Stored bytes are not the ones that were prepared: restarting will not help, restoring the file will.

    The message is one line: which file, which bytes of it, and what to do.
    """
