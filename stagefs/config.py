"""Every setting StageFS has: its default, where it may come from, and how it is read.

``load_settings`` merges, from weakest to strongest: the defaults below, drop-ins
(/etc/stagefs/conf.d/*.conf, by name), the site's file (/etc/stagefs/stagefs.conf), the
user's (~/.config/stagefs/stagefs.conf), the file named by ``--config``, the environment
(STAGEFS_<SECTION>_<KEY>), and what the command line said.  A key nobody knows is an error
that names the nearest known one: a misspelt limit must not be ignored.

This is the only module that reads the process environment.  It does no I/O but reading
those files; choosing directories and measuring disks is ``state_directory``'s.  No
credential is a setting.  Values are frozen, so they may be used from any thread.
"""

import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from stagefs.errors import InvalidConfig
from stagefs.model import CHUNK_BYTES, GIB, KIB, MIB
from stagefs.units import parse_duration, parse_size, size_text

SITE_DIRECTORY = Path("/etc/stagefs")
FILE_NAME = "stagefs.conf"
COMMAND_LINE = "the command line"
DEFAULT = "default"

Bytes = Annotated[int, msgspec.Meta(ge=0, extra={"unit": "bytes"})]
Seconds = Annotated[float, msgspec.Meta(ge=0, extra={"unit": "seconds"})]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o777, extra={"unit": "mode"})]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
_Section = TypeVar("_Section", bound=msgspec.Struct)


class StateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a mount keeps what must outlive its daemon (see ``state_directory``)."""

    base: str | None = None
    """Directory under which each mount gets its state directory; None: $SLURM_TMPDIR, the
    job's $TMPDIR, /var/tmp: the first that is a local disk."""
    outputs: str | None = None
    """Directory on durable storage for outputs; None: inside the state directory."""
    log_bytes_max: Bytes = 64 * MIB


class MountSettings(msgspec.Struct, frozen=True, kw_only=True):
    allow_other: bool = False
    lifetime: str = "forever"
    """``forever``, ``job`` (the batch job named in the environment) or ``pid:N``."""
    start_timeout_s: Seconds = 60.0
    """How long a daemon may take until it answers."""
    probe_period_s: Annotated[float, msgspec.Meta(ge=0.1, extra={"unit": "seconds"})] = 5.0
    """How often the supervisor asks the mount whether its daemon answers."""
    probe_timeout_s: Seconds = 15.0
    """A daemon that answers nothing for so long is replaced; 0: never."""
    standby_after_s: Seconds = 10.0
    """When one has served for so long, the next is made ready to take its place; 0: never."""


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    directory: str | None = None
    """None: ``cache`` inside the state directory."""
    capacity_bytes: Bytes | None = None
    """None: ``capacity_share`` of what is free or cached, at most ``capacity_bytes_max``."""
    capacity_share: Share = 0.5
    capacity_bytes_max: Bytes = 200 * GIB
    high_watermark: Share = 0.95
    low_watermark: Share = 0.9
    free_floor_bytes: Bytes | None = None
    """Free space that is left to others; None: 2 % of the file system, at most 2 GiB."""
    chunk_bytes: Bytes = CHUNK_BYTES


class ReadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How objects are read through the cache."""

    read_deadline_s: Seconds = 120.0
    """A read that has no bytes by then ends in ETIMEDOUT."""
    answer_deadline_s: Seconds = 2.0
    """Lookups, opens and links wait for a remote at most this long: a task in one of them cannot
    be killed."""
    failure_hold_s: Seconds = 5.0
    """A chunk that failed stays failed so long, or each reader would wait a deadline of its own."""
    window_bytes_max: Bytes = 64 * MIB
    """Read-ahead grows to this on sequential access."""
    seek_tolerance_bytes: Bytes = 16 * MIB
    """A jump ahead of at most this much still counts as sequential."""
    parallel_spans_per_object: Count = 4
    in_flight_bytes_max: Bytes = 256 * MIB
    """All fetches together."""
    volatile_bytes_max: Bytes = 256 * MIB
    """Memory for reading past a cache disk that is full or broken."""
    checksum_before_read_bytes_max: Bytes = 256 * MIB
    """Objects up to this size with a declared checksum are verified whole before the first byte
    is served; larger ones when their last chunk has arrived."""
    open_objects_max: Count = 4096
    small_batch_items_max: Count = 128
    small_batches_in_flight: Count = 4
    small_ahead_max: Count = 512
    """So many siblings of a small file are fetched ahead when they are opened in turn."""
    learned_ahead_bytes_max: Bytes = 256 * MIB
    """So much of the inputs that a task is likely to use next is fetched ahead of it, in the order
    in which earlier tasks with inputs of the same names used theirs; 0: nothing is learned."""
    affinity: str | None = None
    """Where this node is, as ``datacenter/machine``: of several replicas of an object, the one
    whose affinity shares the most leading parts with it is read."""


class NamespaceSettings(msgspec.Struct, frozen=True, kw_only=True):
    revalidate_s: Seconds = 60.0
    """An open this long after the last check asks the remote for the version again."""
    listing_ttl_s: Seconds = 60.0
    """How long the listing of a bound directory is believed."""
    default_file_mode: Mode = 0o755
    """Permission bits of files from remotes that have none (executable, so that programs run)."""


class WorkspaceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where tasks write."""

    on_write: Literal["copy-up", "read-only", "shared"] = "copy-up"
    """What happens to a write through a link, where a sandbox says nothing else: a private copy,
    a refusal (EROFS), or a new version for all who link it."""
    sandbox_roots: str | None = None
    """Patterns of directories that are sandboxes from the moment they are made, besides those in
    tasks/; separated by commas: ``radical.pilot.sandbox/*/*/*``."""


class StageOutSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How outputs are uploaded from the stage-out queue."""

    concurrency: Count = 4
    """Uploads at a time."""
    attempts: Count = 5
    """An upload that fails for a reason that may not pass is tried so often.  What waits for a
    server that is away or full is tried for ever; what is refused, once."""
    backoff_s: Seconds = 2.0
    """Before the second attempt; doubles for each further one, with jitter."""
    backoff_s_max: Seconds = 300.0
    drain_s: Seconds = 15.0
    """A mount that ends without `stagefs umount` uploads for so long, while anything moves."""
    settle_s: Seconds = 1.0
    """What is closed in a writable binding waits so long before it is queued: many programs write
    under a temporary name first, or set times and modes afterwards."""
    keep_s: Seconds = 7 * 24 * 3600.0
    """Finished and cancelled uploads are listed so long; until then the latter can be retried."""
    keep_max: Count = 1000
    """And so many of them."""


class SshSettings(msgspec.Struct, frozen=True, kw_only=True):
    config: str | None = None
    """Another ssh_config file, in place of ~/.ssh/config.  Also STAGEFS_SSH_CONFIG."""
    client: Literal["auto", "openssh", "paramiko"] = "auto"
    program: str = "ssh"
    connections: Count = 2
    """At most so many connections to one host."""
    ciphers: str | None = None
    """In place of the configured Ciphers: ``^aes128-gcm@openssh.com`` prefers the cheapest one."""
    keepalive_s: Seconds = 15.0
    """A connection that nobody uses is asked this often whether it still stands; 0: never."""
    restart_s: Seconds = 30.0
    """A server that broke its connections and now refuses them, or takes no login for the moment,
    is asked again for so long before a reader is told."""
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    ca_file: str | None = None
    """Certificates to trust in place of the system's."""
    netrc: bool = True
    token_file: str | None = None
    """A bearer token.  None: where the WLCG's token discovery finds one (see http_access)."""
    token_hosts: str | None = None
    """Hosts and domains, separated by commas, that get the token, over https only."""
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class S3Settings(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    ca_file: str | None = None
    anonymous: bool = False
    path_style: bool = True
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class GsSettings(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str | None = None
    credentials_file: str | None = None
    ca_file: str | None = None
    anonymous: bool = False
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class AzSettings(msgspec.Struct, frozen=True, kw_only=True):
    account: str | None = None
    endpoint: str | None = None
    ca_file: str | None = None
    anonymous: bool = False
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class IrodsSettings(msgspec.Struct, frozen=True, kw_only=True):
    environment_file: str | None = None
    """In place of ~/.irods/irods_environment.json.  Also IRODS_ENVIRONMENT_FILE."""
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class CommandSettings(msgspec.Struct, frozen=True, kw_only=True):
    programs: str | None = None
    """A file that names the programs of ``command://NAME/`` URLs."""
    connect_timeout_s: Seconds | None = None
    progress_timeout_s: Seconds | None = None
    attempts: Count | None = None
    concurrency: Count | None = None


class RemoteDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """For every remote; the sections below override it for one kind."""

    connect_timeout_s: Seconds = 10.0
    progress_timeout_s: Seconds = 20.0
    """A transfer that moves no byte for so long has failed."""
    attempts: Count = 4
    concurrency: Count = 16
    """Operations at one host at a time."""
    ssh: SshSettings = SshSettings()
    http: HttpSettings = HttpSettings()
    s3: S3Settings = S3Settings()
    gs: GsSettings = GsSettings()
    az: AzSettings = AzSettings()
    irods: IrodsSettings = IrodsSettings()
    command: CommandSettings = CommandSettings()


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `stagefs prolog` and `stagefs epilog` keep to."""

    directory: str | None = None
    """Where the mounts of jobs are made; None: /run/stagefs as root, else "jobs" beside the
    state directories of the job's owner."""
    prolog_deadline_s: Seconds = 300.0
    epilog_deadline_s: Seconds = 3600.0
    """Outputs that are not uploaded by then are kept, and the job is in error."""
    wait_s: Seconds = 30.0
    """A prolog waits so long for a server that is away, before the job is rescheduled."""
    cache_keep_s: Seconds = 600.0
    """The cache of a user's jobs on a node outlives the last of them so long (0: not at all); the
    next prolog or epilog on the node removes what is older."""
    attempts: Count = 5
    """Prologs of one job on one machine that fail for a reason that may pass; then the job is in
    error."""


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of one mount; each section is one table of the TOML files."""

    state: StateSettings = StateSettings()
    mount: MountSettings = MountSettings()
    cache: CacheSettings = CacheSettings()
    read: ReadSettings = ReadSettings()
    namespace: NamespaceSettings = NamespaceSettings()
    workspace: WorkspaceSettings = WorkspaceSettings()
    stage_out: StageOutSettings = StageOutSettings()
    remote: RemoteDefaults = RemoteDefaults()
    batch: BatchSettings = BatchSettings()
    path_map: dict[str, str] = {}
    """"host:/directory" -> the URL under which this machine reaches it."""
    log: LogSettings = LogSettings()


class EffectiveValue(msgspec.Struct, frozen=True):
    """One setting as it is in force.  ``text`` reads back as the same value."""

    key: str
    text: str
    source: str


class Loaded(msgspec.Struct, frozen=True):
    settings: Settings
    values: list[EffectiveValue]


# Short names for the settings people set most.
ENVIRONMENT_ALIASES = {
    "STAGEFS_SSH_CONFIG": "remote.ssh.config",
    "STAGEFS_CAPACITY": "cache.capacity_bytes",
    "STAGEFS_LOG_LEVEL": "log.level",
}


def load_settings(
    *,
    config_file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    site_directory: Path = SITE_DIRECTORY,
) -> Settings:
    """The settings in force; ``overrides`` are dotted keys (``{"log.level": "debug"}``)."""
    return load_with_sources(
        config_file=config_file,
        overrides=overrides,
        environment=environment,
        site_directory=site_directory,
    ).settings


def settings_from(assignments: Iterable[str]) -> Settings:
    """Exactly these ``KEY=VALUE`` over the defaults: no file, no environment."""
    return load_settings(
        overrides=parse_assignments(assignments),
        environment={},
        site_directory=Path("/nonexistent"),
    )


def load_with_sources(
    *,
    config_file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    site_directory: Path = SITE_DIRECTORY,
) -> Loaded:
    """As ``load_settings``, and for each value the place it came from.  Raises InvalidConfig."""
    environment = os.environ if environment is None else environment
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for path in _files(site_directory, environment, config_file):
        for key, raw in _file_values(path):
            values[key] = _typed(key, raw, where=str(path))
            sources[key] = str(path)
    for name, key, text in _environment_values(environment):
        values[key] = _typed(key, text, where=f"the environment variable {name}")
        sources[key] = name
    for key, text in (overrides or {}).items():
        _refuse_unknown(key, where=COMMAND_LINE)
        values[key] = _typed(key, text, where=COMMAND_LINE)
        sources[key] = COMMAND_LINE
    settings = _build(Settings, "", values)
    _check(settings, sources)
    effective = [
        EffectiveValue(key=key, text=value_text(key, value), source=sources.get(key, DEFAULT))
        for key, value in walk(settings)
    ]
    return Loaded(settings=settings, values=effective)


def _check(settings: Settings, sources: Mapping[str, str]) -> None:
    """What no single value can get wrong."""
    cache = settings.cache
    if cache.low_watermark >= cache.high_watermark:
        where = sources.get("cache.low_watermark") or sources.get("cache.high_watermark")
        raise InvalidConfig(f"cache.low_watermark in {where} must be below cache.high_watermark.")
    if cache.chunk_bytes < 64 * KIB or cache.chunk_bytes & (cache.chunk_bytes - 1):
        where = sources.get("cache.chunk_bytes")
        raise InvalidConfig(
            f"cache.chunk_bytes in {where} must be a power of two of 64KiB or more."
        )
    parse_lifetime(settings.mount.lifetime)


def _files(
    site_directory: Path, environment: Mapping[str, str], config_file: Path | None
) -> list[Path]:
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(
        environment.get("HOME") or "/nonexistent", ".config"
    )
    candidates = [
        *sorted((site_directory / "conf.d").glob("*.conf")),
        site_directory / FILE_NAME,
        Path(home) / "stagefs" / FILE_NAME,
    ]
    present = [path for path in candidates if os.path.isfile(path)]
    return present if config_file is None else [*present, config_file]


def _file_values(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with path.open("rb") as stream:
            document = tomllib.load(stream)
    except OSError as exc:
        raise InvalidConfig(f"Cannot read the configuration {path}: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidConfig(f"The configuration {path} is not TOML: {exc}.") from exc
    yield from _flatten(document, "", where=str(path))


def _flatten(
    table: Mapping[str, object], prefix: str, *, where: str
) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in SECTIONS:
            yield from _flatten(value, f"{key}.", where=where)
        else:
            _refuse_unknown(key, where=where)
            yield key, value


def _environment_values(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(variable, key, text) of each setting in the environment.

    Only names that begin with a section are ours to judge: others (STAGEFS_MOUNT, a site's
    own) are left alone.
    """
    known = {variable_name(key): key for key in KEYS}
    prefixes = tuple(f"{variable_name(section)}_" for section in SECTIONS)
    for name, text in sorted(environment.items()):
        key = ENVIRONMENT_ALIASES.get(name) or known.get(name)
        if key is not None:
            yield name, key, text
        elif name.startswith(prefixes):
            raise InvalidConfig(
                f"The environment variable {name} is no setting of StageFS"
                f"{_nearest(name, known)}: correct or unset it."
            )


def variable_name(key: str) -> str:
    """``cache.chunk_bytes`` -> ``STAGEFS_CACHE_CHUNK_BYTES``."""
    return "STAGEFS_" + key.replace(".", "_").upper()


def _refuse_unknown(key: str, *, where: str) -> None:
    if key not in KEYS:
        raise InvalidConfig(f"Unknown setting {key} in {where}{_nearest(key, _KNOWN)}.")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        leaf = name.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == leaf][:1]
    return f" (did you mean {near[0]}?)" if near else ""


# Values: text to typed and back.


def _leaves(section: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, object]]:
    for field in msgspec.structs.fields(section):
        key = f"{prefix}{field.name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _leaves(field.type, f"{key}.")
        else:
            yield key, field.type


KEYS: Mapping[str, object] = dict(_leaves(Settings, ""))
"""Dotted key -> its type."""
SECTIONS = frozenset(
    ".".join(key.split(".")[:depth]) for key in KEYS for depth in range(1, key.count(".") + 1)
)


_KNOWN = dict.fromkeys([*KEYS, *SECTIONS])


def _unit(kind: object) -> tuple[str | None, bool]:
    """(unit, may be None) of a leaf's type."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else ()
    if not options and typing.get_origin(kind) is typing.Union:
        options = typing.get_args(kind)
    optional = type(None) in options
    for option in options or (kind,):
        for meta in getattr(option, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.extra:
                return str(meta.extra["unit"]), optional
    return None, optional


def _typed(key: str, raw: object, *, where: str) -> object:
    unit, optional = _unit(KEYS[key])
    if optional and isinstance(raw, str) and raw in {"", "auto"}:
        return None
    from_text = where == COMMAND_LINE or where.startswith("the environment")
    try:
        value: object = raw
        if isinstance(raw, str) and unit == "bytes":
            value = parse_size(raw)
        elif isinstance(raw, str) and unit == "seconds":
            value = parse_duration(raw)
        elif isinstance(raw, str) and unit == "mode":
            value = int(raw, 8)
        elif isinstance(raw, str) and typing.get_origin(KEYS[key]) is dict:
            value = json.loads(raw)
        return msgspec.convert(value, KEYS[key], strict=not from_text)
    except (ValueError, msgspec.ValidationError) as exc:
        raise InvalidConfig(f"The value {raw!r} of {key} in {where} is not usable: {exc}.") from exc


def _build(section: type[_Section], prefix: str, values: Mapping[str, object]) -> _Section:
    arguments: dict[str, object] = {}
    for field in msgspec.structs.fields(section):
        key = f"{prefix}{field.name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            arguments[field.name] = _build(field.type, f"{key}.", values)
        elif key in values:
            arguments[field.name] = values[key]
    return section(**arguments)


def walk(settings: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every setting, in the order of the documentation."""
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if isinstance(value, msgspec.Struct):
            yield from walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def value_text(key: str, value: object) -> str:
    """A value as one would write it in a file, without quotes."""
    unit, _ = _unit(KEYS[key])
    if value is None:
        return "auto"
    if unit == "bytes" and isinstance(value, int):
        return size_text(value)
    if unit == "seconds" and isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".") + "s"
    if unit == "mode" and isinstance(value, int):
        return f"{value:04o}"
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


class Lifetime(msgspec.Struct, frozen=True):
    """How long a mount lives.  ``pid`` is set for ``pid:N`` only, ``directory`` for
    ``jobs:DIRECTORY``, which prologs of batch systems use: as long as a job is registered there."""

    kind: Literal["pid", "job", "jobs", "forever"]
    pid: int | None = None
    directory: str | None = None


def parse_lifetime(text: str) -> Lifetime:
    """Raises InvalidConfig."""
    if text == "job":
        return Lifetime("job")
    if text == "forever":
        return Lifetime("forever")
    kind, _, number = text.partition(":")
    if kind == "pid" and number.isascii() and number.isdigit() and int(number) > 0:
        return Lifetime("pid", int(number))
    if kind == "jobs" and os.path.isabs(number):
        return Lifetime("jobs", directory=number)
    raise InvalidConfig(f"{text!r} is no lifetime: write pid:N, job or forever.")


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """``KEY=VALUE`` words of a command line as ``overrides``.  Raises InvalidConfig."""
    overrides = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidConfig(f"{text!r} sets nothing: write KEY=VALUE, as log.level=debug.")
        overrides[key.strip()] = value.strip()
    return overrides


def environment() -> Mapping[str, str]:
    """The process environment, for the few who pass it on or look for one name."""
    return os.environ
