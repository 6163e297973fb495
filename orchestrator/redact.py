"""Remove secrets from text. Standard library only.

Two kinds of secrets are recognized: a password in an address, and the value of an environment
variable whose name suggests a secret. Other secrets are not recognized.
"""

from __future__ import annotations

import os
import re
import string
from urllib.parse import urlsplit

HIDDEN = "***"
# The user ends at the first colon, the password at the last @ of the address. The pattern does not
# match the scheme itself: that would take quadratic time on a long word.
SCHEME = string.ascii_letters + string.digits + "+.-"
PASSWORD = re.compile(rf"(?<=[{SCHEME}])://[^\s/:@'\"]*:[^\s/'\"]+@")
SECRET = re.compile(  # first substrings of a name, then complete words
    "PASSW|PASSPHRASE|SECRET|TOKEN(?!IZ)|CREDENTIAL|PRIVATE|APIKEY|ACCESSKEY|WEBHOOK"
    "|CONNECTION_STRING|_PWD$|(?<!COM)(?<!BY)(?<!SUR)PASS[0-9]*(_|$)"
    "|(^|_)(KEYS?|PAT|DSN|AUTH|AUTHORIZATION|CREDS?|BEARER|JWT|COOKIES?|SALT|SIGNATURE)[0-9]*(_|$)"
)
# Variables that locate or describe a secret. The address of a webhook is itself a secret.
NO_SECRET = re.compile(
    r"_(PATH|FILE|DIR|ID|NAME|MODE|TYPE|SOCK|HOST|PORT)$|(?<!WEBHOOK)_(URL|URI)$"
)
SHORTEST = 8  # characters; replacing shorter values would damage ordinary text


def redact(text: str) -> str:
    """The text with every recognized secret replaced by `***`.

    >>> redact("https://me:geheim@mlflow.example.org/x returned 401")
    'https://***@mlflow.example.org/x returned 401'
    >>> redact("postgresql+psycopg2://air:p@ss:word@db:5432/mlflow")
    'postgresql+psycopg2://***@db:5432/mlflow'
    """
    text = PASSWORD.sub(f"://{HIDDEN}@", text)
    secrets = {
        value for name, value in os.environ.items() if len(value) >= SHORTEST and looks_secret(name)
    }
    for secret in sorted(secrets, key=len, reverse=True):  # a value can contain another
        text = text.replace(secret, HIDDEN)
    return text


def find_password(text: str) -> int | None:
    """The index of the first address that contains a password; None if none does."""
    match = PASSWORD.search(text)
    return None if match is None else len(text[: match.start()].rstrip(SCHEME))


def looks_secret(name: str) -> bool:
    """Whether a variable with this name is likely to contain a secret.

    >>> [looks_secret(name) for name in ("AWS_SECRET_ACCESS_KEY", "DB_PASS", "my_api_key")]
    [True, True, True]
    >>> harmless = ("AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM")
    >>> [looks_secret(name) for name in harmless]
    [False, False, False]
    """
    return bool(SECRET.search(name.upper())) and not NO_SECRET.search(name.upper())


def contains_secret(name: str, value: str) -> bool:
    """Whether a variable contains a secret, by its name or because its value has a password.

    >>> contains_secret("MIRROR", "https://me:geheim@example.org"), contains_secret("MIRROR", "s3://air")
    (True, False)
    """
    return looks_secret(name) or find_password(value) is not None


def without_credentials(uri: str) -> str:
    """A URI without user and password.

    >>> without_credentials("https://me:secret@mlflow.example.org:443/x")
    'https://mlflow.example.org:443/x'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri
