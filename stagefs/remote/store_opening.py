"""Opening a bucket: an obstore client with the user's keys, endpoint and certificates.

Blocking: files are read.  May be used from several threads.
"""

import datetime
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.store import S3Store

from stagefs.errors import AccessDenied, RemoteError
from stagefs.remote import aws
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import HIDDEN, parse

if TYPE_CHECKING:
    from obstore.store import S3Credential

# How long keys of a file are used before the file is read again: pilots renew them in place.
KEYS_LIFETIME = datetime.timedelta(minutes=5)


def open_store(host_url: str, settings: RemoteSettings, credentials: CredentialStore) -> S3Store:
    parts = parse(host_url)
    profile = aws.read_profile(settings)
    endpoint = aws.endpoint(settings, profile)
    stall_s = max(settings.answer_timeout_s, settings.progress_timeout_s)
    client: dict[str, Any] = {
        "connect_timeout": datetime.timedelta(seconds=settings.connect_timeout_s),
        "read_timeout": datetime.timedelta(seconds=stall_s),
        # For a whole request, which may be a large range on a slow link.
        "timeout": datetime.timedelta(days=1),
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
    }
    if settings.s3.ca_file is not None:
        client["root_certificate"] = _certificates(settings.s3.ca_file)
    options: dict[str, Any] = {
        "region": aws.region(settings, profile),
        "virtual_hosted_style_request": not settings.s3.path_style,
        "client_options": client,
        "retry_config": {"max_retries": 0},
    }
    if endpoint is not None:
        options["endpoint"] = endpoint
    keys = keys_of_url(host_url, credentials) or aws.keys_of_environment(settings)
    if settings.s3.anonymous:
        options["skip_signature"] = True
    elif keys is not None:
        options["access_key_id"] = keys.access_key_id
        options["secret_access_key"] = keys.secret_access_key
        if keys.session_token is not None:
            options["session_token"] = keys.session_token
    elif profile.keys is not None:
        options["credential_provider"] = _FileKeys(settings)
    elif machine := settings.environment.get(aws.MACHINE_ENDPOINT_NAME):
        options["metadata_endpoint"] = machine
    return S3Store(parts.host, **options)


def keys_of_url(host_url: str, credentials: CredentialStore) -> aws.Keys | None:
    """``s3://KEY:SECRET@bucket/...`` brings its own keys; others may have been given."""
    parts = parse(host_url)
    if parts.user is None:
        given = credentials.access(host_url)
        if given.access_key_id is None or given.secret_access_key is None:
            return None
        return aws.Keys(given.access_key_id, given.secret_access_key)
    public = f"s3://{parts.user}:{HIDDEN}@{parts.authority}/"
    return aws.Keys(parts.user, parse(credentials.reveal(public)).password or "")


class _FileKeys:
    """Asked by obstore for the keys of ~/.aws, and again when they have become old."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings

    def __call__(self) -> "S3Credential":
        keys = aws.read_profile(self._settings).keys
        if keys is None:
            raise AccessDenied("The AWS profile holds no keys any more: mend ~/.aws/credentials.")
        return {
            "access_key_id": keys.access_key_id,
            "secret_access_key": keys.secret_access_key,
            "token": keys.session_token,
            "expires_at": datetime.datetime.now(datetime.UTC) + KEYS_LIFETIME,
        }


def trusting(settings: RemoteSettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if settings.s3.ca_file is not None:
        context.load_verify_locations(settings.s3.ca_file)
    return context


def _certificates(ca_file: str) -> bytes:
    try:
        return Path(ca_file).read_bytes()
    except OSError as exc:
        raise RemoteError(
            f"The certificates in {ca_file} ([remote.s3] ca_file) cannot be read ({exc.strerror}): "
            "name a file of PEM certificates."
        ) from exc
