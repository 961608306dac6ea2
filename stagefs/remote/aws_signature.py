"""Signing a request for S3: AWS Signature Version 4, in a header.

After "Authenticating Requests: Using the Authorization Header" in the S3 API reference.  The
payload is not part of the signature (UNSIGNED-PAYLOAD), so that it is read once, while it is
sent; a Content-MD5 header, which is signed, stands for it.  Pure functions.
"""

import datetime
import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import quote

from stagefs.remote.aws import Keys

UNSIGNED = "UNSIGNED-PAYLOAD"


def encoded_key(key: str) -> str:
    """A key as it stands in the path of a request."""
    return quote(key.encode("utf-8", "surrogateescape"), safe="/-._~")


def encoded_query(query: Mapping[str, str]) -> str:
    def encoded(text: str) -> str:
        return quote(text.encode("utf-8", "surrogateescape"), safe="-._~")

    pairs = sorted((encoded(name), encoded(value)) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


def signed(
    method: str,
    *,
    host: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    keys: Keys,
    region: str,
    now: datetime.datetime,
) -> dict[str, str]:
    """The headers to send: those given, and what proves who asks.  ``path`` and ``query`` are
    encoded; ``host`` is the Host header as the client will send it."""
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    sent = {**headers, "x-amz-content-sha256": UNSIGNED, "x-amz-date": stamp}
    if keys.session_token is not None:
        sent["x-amz-security-token"] = keys.session_token
    to_sign = {name.lower(): value.strip() for name, value in sent.items()} | {"host": host}
    lines = "".join(f"{name}:{to_sign[name]}\n" for name in sorted(to_sign))
    names = ";".join(sorted(to_sign))
    canonical = "\n".join((method, path, query, lines, names, UNSIGNED))
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    signature = hmac.new(
        _signing_key(keys.secret_access_key, scope),
        f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}".encode(),
        hashlib.sha256,
    ).hexdigest()
    sent["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.access_key_id}/{scope}, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    return sent


def _signing_key(secret: str, scope: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key
