"""Secrets out of what is written or printed. Standard library only.

Two kinds are known: a password in an address, and the value of an environment variable whose name
says that it is one. A secret that is neither is not seen.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

HIDDEN = "***"
# The user ends at the first colon, the password at the last @ of the address.
PASSWORD = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/:@'\"]*):[^\s/'\"]+@")
SECRET = re.compile(
    r"PASSW|PASSPHRASE|SECRET|TOKEN(?!IZ)|CREDENTIAL|PRIVATE|APIKEY|_PWD$|(^|_)KEY(_|$)"
)
NO_SECRET = re.compile(r"_(PATH|FILE|DIR|ID|NAME|MODE|URL|URI)$")  # where one is, and not what
SHORTEST = 8  # characters: a shorter value would blot out plain words


def redacted(text: str) -> str:
    """A text without the secrets that are known here.

    >>> redacted("https://me:geheim@mlflow.example.org/x says 401")
    'https://***@mlflow.example.org/x says 401'
    >>> redacted("postgresql+psycopg2://air:p@ss:word@db:5432/mlflow")
    'postgresql+psycopg2://***@db:5432/mlflow'
    """
    text = PASSWORD.sub(rf"\g<scheme>{HIDDEN}@", text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def password_at(text: str) -> int | None:
    """Where the first address with a password in it starts; None: there is none."""
    found = PASSWORD.search(text)
    return None if found is None else found.start()


def looks_secret(name: str) -> bool:
    """Is a variable of this name likely to hold one?

    >>> [looks_secret(name) for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "my_api_key")]
    [True, True, True]
    >>> harmless = ("AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM")
    >>> [looks_secret(name) for name in harmless]
    [False, False, False]
    """
    return bool(SECRET.search(name.upper())) and not NO_SECRET.search(name.upper())


def shows_secret(name: str, value: str) -> bool:
    """Should a variable stay out of what others can read? By its name, or a password in it.

    >>> shows_secret("MIRROR", "https://me:geheim@example.org"), shows_secret("MIRROR", "s3://air")
    (True, False)
    """
    return looks_secret(name) or password_at(value) is not None


def _secrets() -> Iterator[str]:
    """Values of this process's environment, the longest first: one may be part of another."""
    found = {
        value for name, value in os.environ.items() if len(value) >= SHORTEST and looks_secret(name)
    }
    yield from sorted(found, key=len, reverse=True)


class Redacting(logging.Filter):
    """Takes secrets out of what a handler is about to write."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
