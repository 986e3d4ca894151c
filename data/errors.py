"""Errors of the data room that callers tell apart by type. Each one's message is a line."""


class CorruptData(ValueError):
    """Stored bytes are not the ones that were prepared: restarting will not help, restoring the file will.

    The message is one line: which file, which bytes of it, and what to do.
    """


class AlteredCopy(CorruptData):
    """A file of this machine's cache was altered after it was opened. Opened again, it is another one: fetched anew."""

    def __init__(self, text: str, sha256: str) -> None:
        super().__init__(text)
        self.sha256 = sha256
        """Of the file as it was prepared."""


class Unavailable(ValueError):
    """Data cannot be had now, because a server does not give it: starting again later may help."""


class NoRoom(ValueError):
    """The disk is full: starting again helps only after some of it is freed."""
