"""Memory for batches, used again as soon as nothing refers to the batch before.

Fresh memory costs more than the copy into it: the operating system hands it out a zeroed page at a time, at the first
write to each.
"""

import ctypes
import weakref

import numpy as np
import numpy.typing as npt

# Buffers that are kept while nobody uses them. A stream has three chunks at once: one being made, one ready, one in use.
MOST_IDLE = 4


class _Buffer:
    """Memory for some rows, and a view of each of them, made once."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.memory = bytearray(rows * row_bytes)
        whole = memoryview(self.memory)
        self.views = [whole[start : start + row_bytes] for start in range(0, len(whole), row_bytes)]


class RowBuffers:
    """Lends arrays of rows of one size. Several threads may take them and let them go at once."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._idle: list[_Buffer] = []  # appended to and popped from only, each at one stroke

    def take(self, rows: int) -> tuple[npt.NDArray[np.void], list[memoryview]]:
        """An array (rows,) of opaque rows with anything in them, and a view of each, and perhaps of more, to read it by.

        The memory is lent again once the array and all arrays and tensors made of it are gone; a view does not count.
        """
        buffer = self._fitting(max(rows, 1))
        # Whatever NumPy or torch makes of the array refers to what lent it the memory, through however many views: this
        # lender goes when the last of them does.
        lender = (ctypes.c_char * len(buffer.memory)).from_buffer(buffer.memory)
        weakref.finalize(lender, self._give_back, buffer).atexit = False
        array: npt.NDArray[np.void] = np.frombuffer(memoryview(lender), f"V{self._row_bytes}", rows)
        return array, buffer.views

    def _fitting(self, rows: int) -> _Buffer:
        while self._idle:
            try:
                buffer = self._idle.pop()
            except IndexError:  # another thread took the last one
                break
            if len(buffer.views) >= rows:  # one that is too small is given up
                return buffer
        return _Buffer(rows, self._row_bytes)

    def _give_back(self, buffer: _Buffer) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle.append(buffer)
