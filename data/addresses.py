"""Addresses of datasets: a path of this machine, or `PROTOCOL://...` for whatever fsspec reads. Imports nothing heavy."""

from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit

# Protocols whose addresses begin with a host, or a bucket.
_HOSTED = ("http", "https", "s3", "s3a", "gs", "gcs", "ftp", "sftp")
_FORM = "it has the form PROTOCOL://PLACE, such as s3://bucket/dataset"


def is_remote(address: Path | str | None) -> TypeGuard[str]:
    """Whether an address names a protocol, and is read through the cache."""
    return isinstance(address, str) and "://" in address


def parse_address(address: Path | str) -> Path | str:
    """A path as a Path, and a remote address without slashes at its end.

    ValueError for one that holds a secret, which would end up in logs and recipes. It does not repeat the address.
    """
    if not is_remote(address):
        return Path(address)
    protocol, _, place = address.partition("://")
    netloc = place.partition("/")[0]
    user, at, _ = netloc.rpartition("@")
    credentials = "credentials come from the environment, as fsspec's implementation of the protocol reads them"
    if at and (":" in user or protocol in ("http", "https")):
        raise ValueError(f"the {protocol} address holds a user's name or password; remove it: {credentials}")
    if "?" in place or "#" in place:
        raise ValueError(
            f"the {protocol} address holds a query, and names of files are added to its end; remove it: {credentials}"
        )
    if "::" in netloc and protocol in _HOSTED:
        raise ValueError(
            f"{address}: not a valid address, or one of IPv6, which fsspec does not read; give the host's name"
        )
    if "::" in address:
        raise ValueError(f"{address}: chained addresses are not read; give the place where manifest.json lies")
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"{address}: not a valid address ({error}); {_FORM}") from None
    if not place.strip("/") or not parts.scheme or (protocol in _HOSTED and not netloc):
        raise ValueError(f"{address}: not an address; {_FORM}")
    return address.rstrip("/")
