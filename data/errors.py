"""Errors of the data room that callers tell apart by type. Each one's message is a line."""


class CorruptData(ValueError):
    """Stored bytes are not the ones that were prepared: restarting will not help, restoring the file will.

    The message is one line: which file, which bytes of it, and what to do.
    """


class Unavailable(ValueError):
    """Data cannot be had now, because a server does not give it: starting again later may help."""


class NoRoom(ValueError):
    """The disk is full: starting again helps only after some of it is freed."""
