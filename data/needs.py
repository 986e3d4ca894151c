"""Which files are needed when: what has been looked ahead along the plan, as intervals of positions for each file."""

from collections import deque
from collections.abc import Iterable, Iterator

from data.claims import Claim
from data.manifest import FileEntry

# Two sightings of a file this many looks apart, or fewer, are one use of it: between them it is not given up.
SAME_USE_LOOKS = 64


class _Use:
    __slots__ = ("look", "start", "stop")

    def __init__(self, start: int, stop: int, look: int) -> None:
        self.start, self.stop, self.look = start, stop, look


class Needs:
    """The uses of files that lie ahead of the position that has been reached. Memory is O(files x uses of each)."""

    def __init__(self) -> None:
        self.position = 0
        self._looks = 0
        self._entries: dict[str, FileEntry] = {}
        self._uses: dict[str, deque[_Use]] = {}

    def expect(self, start: int, stop: int, entries: Iterable[FileEntry]) -> None:
        """Files that are read between two positions. These rise from call to call."""
        self._looks += 1
        for entry in entries:
            uses = self._uses.setdefault(entry.sha256, deque())
            if uses and self._looks - uses[-1].look <= SAME_USE_LOOKS:
                uses[-1].stop, uses[-1].look = max(stop, uses[-1].stop), self._looks
            else:
                self._entries[entry.sha256] = entry
                uses.append(_Use(start, stop, self._looks))

    def reached(self, position: int) -> None:
        """Everything before `position` has been read."""
        self.position = position
        for sha256 in list(self._uses):
            uses = self._uses[sha256]
            while uses and uses[0].stop <= position:
                uses.popleft()
            if not uses:
                del self._uses[sha256], self._entries[sha256]

    def __contains__(self, entry: FileEntry) -> bool:
        return entry.sha256 in self._uses

    def claims(self) -> dict[str, Claim]:
        """For each file needed, by its sha256, how many samples from here; 0 while it is in use."""
        return {
            sha256: Claim(max(0, uses[0].start - self.position), self._entries[sha256].bytes)
            for sha256, uses in self._uses.items()
        }

    def in_order(self) -> Iterator[tuple[FileEntry, int]]:
        """The files needed and their distances, the soonest first."""
        claims = self.claims()
        for sha256 in sorted(claims, key=lambda sha256: (claims[sha256].distance, sha256)):
            yield self._entries[sha256], claims[sha256].distance
