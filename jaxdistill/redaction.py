"""What must not be written down, wherever it comes from: passwords and signatures in URLs, tokens."""

from __future__ import annotations

import os
import re

# A password in a URL: what stands between a colon that is no port's and the last @, for secrets may hold slashes; in one for http a name
# alone may be a token, where abfs://container@account holds none. A parameter that is named like a secret. The Hub's tokens.
_KEY = r"(?:aws)?(?:api|access|secret|account|private)?[-_]?key(?:[-_]?id)?"
_NAME = rf"(?:[\w.-]*[-_.])?(?:sig(?:nature)?|token|{_KEY}|cred(?:ential)?s?|secret|passw(?:or)?d|auth(?:orization)?)"
_SECRET = re.compile(
    r"(?P<before>\bhttps?:/?/)[^/\s@]+(?=@)|(?P<scheme>[:/]/)[^/\s@:'\"]*:(?!\d+(?:/|$))[^\s'\"]*(?=@)"
    rf"|(?P<name>[?&;#]{_NAME}=)[^&;#\s'\"]+|\bhf_[A-Za-z0-9]{{30,}}\b",
    re.IGNORECASE,
)
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def redacted(text: str) -> str:
    """The text with stars for passwords and signatures in URLs, for tokens of the Hub and for what the environment holds as a token."""
    for value in filter(None, map(os.environ.get, _ENVIRONMENT)):
        if len(value) >= 8:  # a shorter one is a placeholder, and would blot out words
            text = text.replace(value, "***")
    return _SECRET.sub(lambda found: f"{found['before'] or found['scheme'] or found['name'] or ''}***", text)


def holds_secret(text: str) -> bool:
    """Whether a text holds what `redacted` would hide."""
    return redacted(text) != text


def first_line(message: str) -> str:
    """The first line of what another library says of an error, redacted."""
    return redacted((message.strip() or "no reason given").splitlines()[0])
