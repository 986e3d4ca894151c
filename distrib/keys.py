"""Keys for stateless randomness (law 4): a random choice is a function of what it is about, never of what ran before."""

from __future__ import annotations

import hashlib
import json


def key64(purpose: str, *parts: int | str | list[int]) -> int:
    """A 64-bit key from a purpose and all its parts; any change of any part gives an unrelated key.

    The parts are written as JSON before hashing, so ("a", 1) and ("a1",) differ.
    """
    text = json.dumps([purpose, *parts], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
