"""Access: how one host is reached where the mount's settings are not what is meant.

A program may know a key, an endpoint or a resource for one host only, and may not put it into a
URL.  Such an access is given through the control socket, is kept with the other secrets
(``credentials``: mode 0600), and comes before settings and environment for every URL of that host
(``RemoteUrl.host_url``: scheme, user and host; for s3 the bucket).  Never shown: not in messages,
logs, names or answers.  Free of trio, because commands import it.
"""

import msgspec

from stagefs.errors import InvalidUrl
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import parse, shown

SSH_SCHEMES = frozenset({"ssh", "sftp"})


class Access(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``key_file``: of the private key that an ssh host is shown first.
    ``access_key_id`` to ``region``: of an S3 bucket; ``endpoint`` is the service's URL.
    ``resource``: of iRODS, from which replicas are read; ``application``: what its server is told
    about who asks."""

    key_file: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    endpoint: str | None = None
    region: str | None = None
    resource: str | None = None
    application: str | None = None

    def __repr__(self) -> str:
        return "Access(...)"

    def applied(self, settings: RemoteSettings) -> RemoteSettings:
        """The settings of the host's remote with what this says in their place."""
        s3 = settings.s3
        s3 = msgspec.structs.replace(
            s3,
            endpoint=self.endpoint or s3.endpoint,
            region=self.region or s3.region,
            anonymous=s3.anonymous and self.access_key_id is None,
        )
        return msgspec.structs.replace(settings, s3=s3)


def checked(url: str, access: Access) -> str:
    """The host URL that an access is for.  Raises InvalidUrl for one that means nothing there."""
    parts = parse(url)
    kinds: dict[str, frozenset[str]] = {
        "key_file": SSH_SCHEMES,
        "access_key_id": frozenset({"s3"}),
        "secret_access_key": frozenset({"s3"}),
        "endpoint": frozenset({"s3"}),
        "region": frozenset({"s3"}),
        "resource": frozenset({"irods"}),
        "application": frozenset({"irods"}),
    }
    for name, schemes in kinds.items():
        if getattr(access, name) is not None and parts.scheme not in schemes:
            raise InvalidUrl(
                f"{shown(url)} has no use for {name}: that is for {', '.join(sorted(schemes))}."
            )
    if (access.access_key_id is None) != (access.secret_access_key is None):
        raise InvalidUrl(f"An access to {shown(url)} needs a key and its secret, or neither.")
    return parts.host_url
