"""Secrets out of what is written or printed. Standard library only.

Two kinds are known: a password in an address, and the value of an environment variable whose name
says that it is one. A secret that is neither is not seen.
"""

from __future__ import annotations

import logging
import os
import re
import string
from collections.abc import Iterator
from urllib.parse import urlsplit

HIDDEN = "***"
# The user ends at the first colon, the password at the last @ of the address. The scheme is not
# searched for: a long word would be read again from each of its letters.
SCHEME = string.ascii_letters + string.digits + "+.-"
PASSWORD = re.compile(rf"(?<=[{SCHEME}])://[^\s/:@'\"]*:[^\s/'\"]+@")
SECRET = re.compile(  # anywhere in a name, then whole words of it
    "PASSW|PASSPHRASE|SECRET|TOKEN(?!IZ)|CREDENTIAL|PRIVATE|APIKEY|ACCESSKEY|WEBHOOK"
    "|CONNECTION_STRING|_PWD$|(?<!COM)(?<!BY)(?<!SUR)PASS[0-9]*(_|$)"
    "|(^|_)(KEYS?|PAT|DSN|AUTH|AUTHORIZATION|CREDS?|BEARER|JWT|COOKIES?|SALT|SIGNATURE)[0-9]*(_|$)"
)
# Where one is, and not what. The address of a webhook is the secret itself.
NO_SECRET = re.compile(
    r"_(PATH|FILE|DIR|ID|NAME|MODE|TYPE|SOCK|HOST|PORT)$|(?<!WEBHOOK)_(URL|URI)$"
)
SHORTEST = 8  # characters: a shorter value would blot out plain words


def redacted(text: str) -> str:
    """A text without the secrets that are known here.

    >>> redacted("https://me:geheim@mlflow.example.org/x says 401")
    'https://***@mlflow.example.org/x says 401'
    >>> redacted("postgresql+psycopg2://air:p@ss:word@db:5432/mlflow")
    'postgresql+psycopg2://***@db:5432/mlflow'
    """
    text = PASSWORD.sub(f"://{HIDDEN}@", text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def password_at(text: str) -> int | None:
    """Where the first address with a password in it starts; None: there is none."""
    found = PASSWORD.search(text)
    return None if found is None else len(text[: found.start()].rstrip(SCHEME))


def looks_secret(name: str) -> bool:
    """Is a variable of this name likely to hold one?

    >>> [looks_secret(name) for name in ("AWS_SECRET_ACCESS_KEY", "DB_PASS", "my_api_key")]
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


def without_credentials(uri: str) -> str:
    """
    >>> without_credentials("https://me:secret@mlflow.example.org:443/x")
    'https://mlflow.example.org:443/x'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri
