"""Short-lived signed tokens (JWT, HS256; RFC 7519): to join a server that is not on loopback, and to resume a call."""

from __future__ import annotations

import secrets
import time
from typing import Any

import jwt

ALGORITHM = "HS256"
JOIN_SECONDS = 60.0


class BadToken(ValueError):
    """A token that is missing, malformed, expired, for another purpose or signed by somebody else."""


class Signer:
    """Issues and checks tokens with one secret (a new one by default: then tokens end with the process)."""

    def __init__(self, secret: str | None = None) -> None:
        if secret is not None and len(secret) < 32:
            raise ValueError(f"the secret has {len(secret)} characters: use 32 or more (openssl rand -hex 32)")
        self._secret = secret or secrets.token_hex(32)

    def issue(self, purpose: str, subject: str, seconds: float) -> str:
        """A token for ``purpose`` (``join``, ``resume``) about ``subject`` that is valid for ``seconds``."""
        now = time.time()
        claims = {"sub": subject, "aud": purpose, "iat": now, "exp": now + seconds}
        return jwt.encode(claims, self._secret, algorithm=ALGORITHM)

    def check(self, purpose: str, token: str) -> str:
        """The token's subject. Raises BadToken, whose message does not repeat the token."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token, self._secret, [ALGORITHM], audience=purpose, options={"require": ["sub", "aud", "exp"]}
            )
        except jwt.ExpiredSignatureError:
            raise BadToken(f"the {purpose} token has expired: ask for a new one") from None
        except jwt.InvalidTokenError as error:
            raise BadToken(f"not a valid {purpose} token ({type(error).__name__}): ask for a new one") from None
        return str(claims["sub"])
