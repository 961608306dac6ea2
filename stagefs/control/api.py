"""The control API: which operations there are, under which path, with which values.

One table serves both ends, so that server and client cannot drift.  An operation is a POST of
one JSON request to ``/v1/<path>`` (GET too where it takes no argument).  Short ones answer with
one JSON object.  Long ones stream lines of JSON: ``progress`` as often as there is news (and
at least every HEARTBEAT_S), at the end one ``result`` or one ``error``.  Failures carry the
sentence, the exit code of a command, and the errno's name.  No trio here: commands import it.
"""

import enum
import json
from typing import Protocol, TypeVar

import msgspec

from stagefs.staging import queue_values, remote_values, replica_values, values
from stagefs.staging.values import Progress, ProgressCallback

HEARTBEAT_S = 5.0
SOCKET_NAME = "control.sock"
REQUEST_BYTES_MAX = 16 << 20
# The one path that is no operation: GET answers text, in the format of Prometheus.
METRICS_PATH = "/metrics"


class Failure(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """``errno`` is a name (``ENOENT``)."""

    error: str
    exit_code: int
    errno: str


class Result(msgspec.Struct, frozen=True, tag_field="type", tag="result"):
    """The last line of a stream that went well; ``value`` is the operation's answer."""

    value: dict[str, object]


Line = Progress | Result | Failure

_Value = TypeVar("_Value")


def encode(value: msgspec.Struct) -> bytes:
    r"""One JSON text without line breaks.  Names that are not UTF-8 travel as ``\udcXX``, which
    msgspec's own encoder refuses.
    """
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value)).encode("ascii")


def decode(text: bytes, kind: type[_Value]) -> _Value:
    """Raises ValueError."""
    try:
        return msgspec.convert(json.loads(text), kind)
    except (RecursionError, msgspec.ValidationError) as exc:
        raise ValueError(str(exc)) from exc


class Operation(msgspec.Struct, frozen=True):
    """``long`` operations take a progress callback and stream."""

    path: str
    request: type[msgspec.Struct]
    answer: type[msgspec.Struct]
    long: bool = False


class Operations(enum.Enum):
    """The name of each is, in lower case, the name of the method of ``Area``."""

    STATUS = Operation("status", values.Empty, values.Status)
    STAGE_IN = Operation("stage-in", values.StageIn, values.StagedIn, long=True)
    BIND = Operation("bind", values.Bind, values.NameStat)
    IMPORT_CATALOG = Operation("import", values.ImportCatalog, values.Imported, long=True)
    WHY = Operation("names/why", values.ExplainName, values.Why, long=True)
    LIST_NAMES = Operation("names/list", values.ListNames, values.NamePage)
    STAT = Operation("names/stat", values.OnePath, values.NameStat)
    REMOVE = Operation("names/remove", values.RemoveName, values.Removed, long=True)
    MOVE = Operation("names/move", values.MoveName, values.NameStat)
    REPLICA_ADD = Operation(
        "replicas/add", replica_values.AddReplica, replica_values.ReplicaList, long=True
    )
    REPLICA_LIST = Operation("replicas/list", values.OnePath, replica_values.ReplicaList)
    REPLICA_REMOVE = Operation(
        "replicas/remove", replica_values.RemoveReplica, replica_values.ReplicaList
    )
    SANDBOX_CREATE = Operation("sandboxes/create", values.CreateSandbox, values.Sandbox, long=True)
    SANDBOX_CREATE_MANY = Operation(
        "sandboxes/create-many", values.CreateSandboxes, values.Sandboxes, long=True
    )
    SANDBOX_LIST = Operation("sandboxes/list", values.ListSandboxes, values.SandboxPage)
    SANDBOX_SHOW = Operation("sandboxes/show", values.ShowSandbox, values.SandboxDetails, long=True)
    SANDBOX_COMMIT = Operation(
        "sandboxes/commit", values.CommitSandbox, values.CommitRecord, long=True
    )
    SANDBOX_MATERIALIZE = Operation(
        "sandboxes/materialize", values.SandboxDirectory, values.Copied, long=True
    )
    SANDBOX_ABSORB = Operation(
        "sandboxes/absorb", values.SandboxDirectory, values.Copied, long=True
    )
    SANDBOX_FAIL = Operation("sandboxes/fail", values.FailSandbox, values.Sandbox)
    SANDBOX_REMOVE = Operation("sandboxes/remove", values.OneSandbox, values.Removed, long=True)
    CACHE_LIST = Operation("cache/list", values.ListEntries, values.EntryPage)
    CACHE_SHOW = Operation("cache/show", values.ShowEntry, values.CacheEntry)
    CACHE_USAGE = Operation("cache/usage", values.Empty, values.CacheUsage)
    CACHE_VERIFY = Operation("cache/verify", values.Verify, values.Verified, long=True)
    CACHE_EVICT = Operation("cache/evict", values.Evict, values.Evicted, long=True)
    CACHE_PIN = Operation("cache/pin", values.Pin, values.Pinned, long=True)
    CACHE_WARM = Operation("cache/warm", values.Warm, values.Warmed, long=True)
    CACHE_CLEANUP = Operation("cache/cleanup", values.Cleanup, values.CacheUsage, long=True)
    CACHE_CAPACITY = Operation("cache/capacity", values.Capacity, values.CacheUsage, long=True)
    QUEUE_LIST = Operation("queue/list", queue_values.ListUploads, queue_values.UploadPage)
    QUEUE_RETRY = Operation("queue/retry", queue_values.RetryUploads, queue_values.UploadsChanged)
    QUEUE_CANCEL = Operation(
        "queue/cancel", queue_values.CancelUploads, queue_values.UploadsChanged
    )
    REMOTE_LIST = Operation("remotes/list", values.Empty, remote_values.RemoteList)
    REMOTE_ACCESS = Operation("remotes/access", remote_values.SetAccess, values.Empty)
    QUEUE_FLUSH = Operation("queue/flush", queue_values.Flush, queue_values.Flushed, long=True)


class Area(Protocol):
    """What the server calls: one method for each operation.  Each raises StageFSError only."""

    async def status(self, request: values.Empty) -> values.Status: ...

    async def metrics(self) -> str: ...

    async def stage_in(
        self, request: values.StageIn, progress: ProgressCallback
    ) -> values.StagedIn: ...

    async def bind(self, request: values.Bind) -> values.NameStat: ...

    async def import_catalog(
        self, request: values.ImportCatalog, progress: ProgressCallback
    ) -> values.Imported: ...

    async def why(self, request: values.ExplainName, progress: ProgressCallback) -> values.Why: ...

    async def list_names(self, request: values.ListNames) -> values.NamePage: ...

    async def stat(self, request: values.OnePath) -> values.NameStat: ...

    async def remove(
        self, request: values.RemoveName, progress: ProgressCallback
    ) -> values.Removed: ...

    async def move(self, request: values.MoveName) -> values.NameStat: ...

    async def replica_add(
        self, request: replica_values.AddReplica, progress: ProgressCallback
    ) -> replica_values.ReplicaList: ...

    async def replica_list(self, request: values.OnePath) -> replica_values.ReplicaList: ...

    async def replica_remove(
        self, request: replica_values.RemoveReplica
    ) -> replica_values.ReplicaList: ...

    async def sandbox_create(
        self, request: values.CreateSandbox, progress: ProgressCallback
    ) -> values.Sandbox: ...

    async def sandbox_create_many(
        self, request: values.CreateSandboxes, progress: ProgressCallback
    ) -> values.Sandboxes: ...

    async def sandbox_list(self, request: values.ListSandboxes) -> values.SandboxPage: ...

    async def sandbox_show(
        self, request: values.ShowSandbox, progress: ProgressCallback
    ) -> values.SandboxDetails: ...

    async def sandbox_commit(
        self, request: values.CommitSandbox, progress: ProgressCallback
    ) -> values.CommitRecord: ...

    async def sandbox_materialize(
        self, request: values.SandboxDirectory, progress: ProgressCallback
    ) -> values.Copied: ...

    async def sandbox_absorb(
        self, request: values.SandboxDirectory, progress: ProgressCallback
    ) -> values.Copied: ...

    async def sandbox_fail(self, request: values.FailSandbox) -> values.Sandbox: ...

    async def sandbox_remove(
        self, request: values.OneSandbox, progress: ProgressCallback
    ) -> values.Removed: ...

    async def cache_list(self, request: values.ListEntries) -> values.EntryPage: ...

    async def cache_show(self, request: values.ShowEntry) -> values.CacheEntry: ...

    async def cache_usage(self, request: values.Empty) -> values.CacheUsage: ...

    async def cache_verify(
        self, request: values.Verify, progress: ProgressCallback
    ) -> values.Verified: ...

    async def cache_evict(
        self, request: values.Evict, progress: ProgressCallback
    ) -> values.Evicted: ...

    async def cache_pin(self, request: values.Pin, progress: ProgressCallback) -> values.Pinned: ...

    async def cache_warm(
        self, request: values.Warm, progress: ProgressCallback
    ) -> values.Warmed: ...

    async def cache_cleanup(
        self, request: values.Cleanup, progress: ProgressCallback
    ) -> values.CacheUsage: ...

    async def cache_capacity(
        self, request: values.Capacity, progress: ProgressCallback
    ) -> values.CacheUsage: ...

    async def remote_list(self, request: values.Empty) -> remote_values.RemoteList: ...

    async def remote_access(self, request: remote_values.SetAccess) -> values.Empty: ...

    async def queue_list(self, request: queue_values.ListUploads) -> queue_values.UploadPage: ...

    async def queue_retry(
        self, request: queue_values.RetryUploads
    ) -> queue_values.UploadsChanged: ...

    async def queue_cancel(
        self, request: queue_values.CancelUploads
    ) -> queue_values.UploadsChanged: ...

    async def queue_flush(
        self, request: queue_values.Flush, progress: ProgressCallback
    ) -> queue_values.Flushed: ...
