"""What the control API tells of remotes: values, as ``values``, of which they are a part."""

import msgspec

from stagefs.remote.access import Access
from stagefs.remote.health import RemoteStatus


class RemoteList(msgspec.Struct, frozen=True):
    """By URL.  A remote is in use from its first request on, while there are not too many."""

    remotes: list[RemoteStatus]


class SetAccess(msgspec.Struct, frozen=True):
    """How the host of ``url`` is reached from now on, by everybody who uses the mount."""

    url: str
    access: Access
