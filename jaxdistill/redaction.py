"""What must not be written down, wherever it comes from: passwords and signatures in URLs, tokens."""

from __future__ import annotations

import os
import re

# A password in a URL (in one for http a name alone may be a token; abfs://container@account holds none), a parameter that sounds like
# a secret, and the Hub's tokens wherever they stand.
_SECRET = re.compile(
    r"(?P<before>\bhttps?:/?/)[^/\s@]+(?=@)|(?P<scheme>[:/]/)[^/\s@]*:[^/\s@]*(?=@)"
    r"|(?P<name>[?&;][^=&?/;\s]*(?:sig|token|key|cred|secret|passw|auth)[^=&?/;\s]*=)[^&;\s'\"]+|\bhf_[A-Za-z0-9]{16,}",
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
