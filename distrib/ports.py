"""Which process holds a TCP port, as the kernel of this host tells. Imports no torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

_LISTENS = "0A"


def holder_of_port(port: int) -> str | None:
    """Words for who holds `port` on this host; None where nobody does any more, or the kernel does not say."""
    sockets = _sockets_at(port)
    if not sockets:
        return None
    links = {f"socket:[{inode}]" for inode, _ in sockets}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if any(_link(descriptor) in links for descriptor in (process / "fd").iterdir()):
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
    return f"a process of the user with id {sockets[0][1]}, or one that is ending"


def _link(descriptor: Path) -> str | None:
    """None where it was closed since it was listed."""
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return None


def _sockets_at(port: int) -> list[tuple[str, str]]:
    """(inode, user id) of the sockets that listen at a port of this host; where none does, of all that are bound to it. Another
    process may well be connected from the same port of another address, where Linux gave it that."""
    found: list[tuple[str, str, str]] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue  # a kernel without IPv6, or no Linux
        found += [(row[3], row[9], row[7]) for row in rows if int(row[1].rpartition(":")[2], 16) == port]
    listening = [socket for socket in found if socket[0] == _LISTENS]
    return [(inode, user) for _, inode, user in listening or found]
