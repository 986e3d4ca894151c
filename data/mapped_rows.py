"""Rows copied straight out of memory maps, of however many files, in one call."""

import mmap
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


class MappedRows:
    """Rows of so many integers wherever they begin in the memory of some maps.

    To torch it is one array that reaches from the first map's beginning to the last one's end, with a row at each integer.
    torch, because it copies into memory that is there already, without the interpreter; NumPy would take memory of its own
    first.
    """

    def __init__(self, row_integers: int, dtype: npt.DTypeLike) -> None:
        self._row_integers, self._dtype = row_integers, np.dtype(dtype)
        self._signed = np.dtype(f"<i{self._dtype.itemsize}")  # torch knows few unsigned ones; it only copies them
        self._shift = self._dtype.itemsize.bit_length() - 1
        self._maps: dict[int, mmap.mmap] = {}  # by where they begin; keeps them mapped
        self._first = self._stop = 0
        self._rows: torch.Tensor | None = None

    def add(self, map: mmap.mmap) -> None:
        """The rows of one more map."""
        start = address_of(map)
        self._maps[start] = map
        self._first = min(self._first or start, start)
        self._stop = max(self._stop, start + len(map))
        self._view()

    def remove(self, map: mmap.mmap) -> None:
        """Let go of a map and its rows."""
        del self._maps[address_of(map)]
        self._first = min(self._maps, default=0)
        self._stop = max((start + len(map) for start, map in self._maps.items()), default=0)
        self._view()

    def _view(self) -> None:
        import torch  # here, because what only opens a dataset answers at once

        size = self._dtype.itemsize
        self.__array_interface__ = {
            "version": 3,
            "data": (self._first, False),  # torch asks for what may be written; nothing writes
            "shape": (max(0, (self._stop - self._first) // size - self._row_integers + 1), self._row_integers),
            "strides": (size, size),
            "typestr": self._signed.str,
        }
        self._rows = torch.from_numpy(np.asarray(self))

    def copy(self, addresses: npt.NDArray[np.int64], rows: npt.NDArray[np.integer]) -> None:
        """Copy the rows at addresses (n,), each of which must lie, to its last byte, in one of the maps, into `rows` (n, .).

        IndexError for one that lies in none, as far as that is told.
        """
        import torch

        if not len(addresses):
            return
        if self._rows is None or not len(self._rows):
            raise IndexError("rows of no map")
        numbers = torch.from_numpy((addresses - self._first) >> self._shift)
        torch.index_select(self._rows, 0, numbers, out=torch.from_numpy(rows.view(self._signed)))


def address_of(map: mmap.mmap) -> int:
    """Where a map begins in memory."""
    return int(np.frombuffer(map, dtype=np.uint8).__array_interface__["data"][0])
