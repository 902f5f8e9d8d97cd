"""Pieces of a card's text: what may stand in a cell of a table, and names of the Hub."""

from __future__ import annotations

import re

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cell(text: object) -> str:
    """Within a cell of a table, whatever it holds."""
    return " ".join(str(text).split()).replace("|", "\\|")


def linked(text: str, place: str) -> str:
    """A name with a link to its place on the Hub. One's own mirror or Hub is the reader's to know: of it stands the name alone."""
    from huggingface_hub import constants

    if constants.ENDPOINT.rstrip("/") != "https://huggingface.co":
        return f"`{text}`"
    return f"[{text}](https://huggingface.co/{place})"
