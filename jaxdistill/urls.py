"""Places that are named by a URL, and what no URL in a config may hold."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxdistill.redaction import holds_secret

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(place: str | Path) -> bool:
    """Whether this is a place on object storage or the like, not a file or folder here (as file:// is)."""
    return _URL.match(str(place)) is not None and not str(place).startswith("file://")


def local_path(place: str | Path) -> Path:
    """The path of a file or folder here, which may be written as file:///folder."""
    return Path(os.path.expanduser(str(place).removeprefix("file://")))


def written_folder(place: str) -> str:
    """A folder that is to be written; raises ValueError for what would become one by mistake: a URL, nothing at all."""
    if not place.strip():
        raise ValueError("is empty; name a folder")
    if is_url(place):
        raise ValueError("is a URL, and only folders are written (a token store may be at one); name a folder, of a mounted disk or bucket")
    return place.removeprefix("file://")


def check_url(url: str) -> None:
    """Raises ValueError, which does not repeat it, for a URL with credentials in it: configs, manifests and messages would keep them."""
    if holds_secret(url):
        raise ValueError(
            "a URL with a password, a key or a signature in it, which would end in logs and configs; "
            "give credentials as the client of the store reads them (environment or its own files)"
        )
    if is_url(url) and "::" in url:
        raise ValueError("a chain of URLs (::) is not read; give a URL of one protocol, compressed files are known by their ending")
