"""Manifest: the declared inputs and outputs of one sandbox, and how it treats them.

From the words of a command line (``from_options``), or from a JSON or TOML file
(``read_manifest``).  Whatever is wrong with one is InvalidManifest, which names the file and
the place in it.  Pure but for reading that file and, in ``expand_mirrors``, the directories of
this machine; commands import it, so no trio.

A file looks like this (JSON has the same shape)::

    on_write = "copy-up"            # or "read-only", "shared"
    persistent = false
    lifetime = "task"               # of the inputs' leases: "task", "pilot", "forever"

    [inputs]                        # name in the sandbox = URL, staging:/// name, or a path
    "ref.fa" = "https://host/ref.fa"

    [mirrors]                       # pattern on this machine = directory in the sandbox
    "/data/models/*" = "models"

    [outputs]                       # pattern in the sandbox = where to
    "std*" = "staging:///runs/7/"
    "result.h5" = { to = "s3://bucket/7.h5", optional = true, overwrite = true }
    "table.csv" = ["staging:///runs/7/", "ssh://host/data/"]
"""

import enum
import glob
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from stagefs import globs
from stagefs.errors import InvalidManifest, InvalidUrl
from stagefs.model import OnWrite
from stagefs.remote.url import (
    HTTP_SCHEMES,
    LITERAL_SCHEMES,
    has_bytes,
    is_file_name,
    parse,
    quote_path,
)

DOCUMENT_BYTES_MAX = 16 << 20
NAME_CHARACTERS_MAX = 4095  # of a name in the sandbox with its directories: PATH_MAX
# In URLs of outputs, for sandboxes that share a manifest; as URLs are given, and as some are kept.
_NAME, _ENCODED_NAME = "{name}", "%7Bname%7D"


class LeaseLifetime(enum.StrEnum):
    """How long the inputs of a sandbox are kept in the cache: until it ends, until the mount
    ends, or until somebody unpins them.  Kept on disk: words stay."""

    TASK = "task"
    PILOT = "pilot"
    FOREVER = "forever"


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ``pattern`` matches goes ``to`` a URL: below it when that ends with a slash (by the
    path in the sandbox), else under exactly that name, which takes exactly one match.  No match
    is an error unless it is ``optional``; what is there at the target, without ``overwrite``.
    ``{name}`` in the URL stands for the sandbox's name.
    """

    pattern: str
    to: str
    optional: bool = False
    overwrite: bool = False

    @property
    def glob(self) -> globs.Glob:
        return globs.parse(self.pattern)

    def of(self, sandbox: str) -> "Output":
        """With the name of a sandbox in place of ``{name}``."""
        to = self.to
        if _NAME in to or _ENCODED_NAME in to:
            name = sandbox if parse(to).scheme in LITERAL_SCHEMES else quote_path(sandbox)
            to = to.replace(_NAME, name).replace(_ENCODED_NAME, name)
        return msgspec.structs.replace(self, to=to)

    @property
    def is_below(self) -> bool:
        return self.to.endswith("/")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``inputs``: name in the sandbox -> URL.  ``mirrors``: pattern of this machine's paths ->
    directory in the sandbox.  ``on_write`` None: as the mount says.  ``record``: note what the
    sandbox reads.
    """

    inputs: dict[str, str] = {}
    mirrors: dict[str, str] = {}
    outputs: list[Output] = []
    on_write: OnWrite | None = None
    persistent: bool = False
    record: bool = False
    lifetime: LeaseLifetime = LeaseLifetime.TASK


class Mirrored(msgspec.Struct, frozen=True):
    """A path of this machine that appears as ``name`` in the sandbox."""

    path: str
    name: str


def as_url(text: str, directory: str | None = None) -> str:
    """A URL as it is; a path of this machine (relative to ``directory``, else to the current
    one) as a file URL, with its slash at the end."""
    if "://" in text:
        return text
    path = os.path.abspath(os.path.join(directory or "", text))
    slash = "/" if text.endswith("/") and path != "/" else ""
    return f"file://{quote_path(path)}{slash}"


def from_options(
    *,
    inputs: Iterable[str] = (),
    mirrors: Iterable[str] = (),
    outputs: Iterable[str] = (),
    overwrite: bool = False,
    on_write: OnWrite | None = None,
    persistent: bool = False,
    record: bool = False,
    lifetime: LeaseLifetime = LeaseLifetime.TASK,
) -> Manifest:
    """From words such as ``NAME=URL``, ``GLOB=DIR`` and ``GLOB=URL``.  Raises InvalidManifest."""
    linked: dict[str, str] = {}
    for word in inputs:
        name, source = _pair("--in", word, "NAME=URL", *word.partition("="))
        if name in linked:
            raise InvalidManifest(f"--in names {name} twice: one name leads to one input.")
        linked[name] = source
    mirrored: dict[str, str] = {}
    for word in mirrors:
        # A directory in the sandbox has no '=' in its name, a path of this machine may.
        pattern, place = _pair("--mirror", word, "GLOB=DIR", *word.rpartition("="))
        mirrored[pattern] = place
    declared = []
    for word in outputs:
        pattern, target = _pair("--out", word, "GLOB=URL", *word.partition("="))
        declared.append(Output(pattern, target, overwrite=overwrite))
    return checked(
        Manifest(
            inputs=linked,
            mirrors=mirrored,
            outputs=declared,
            on_write=on_write,
            persistent=persistent,
            record=record,
            lifetime=lifetime,
        ),
        places=_OptionPlaces(),
    )


def _pair(
    option: str, word: str, shape: str, left: str, equals: str, right: str
) -> tuple[str, str]:
    if not (left and equals and right):
        raise InvalidManifest(f"{option} {word!r} declares nothing: write {option} {shape}.")
    return left, right


class _OptionPlaces:
    """Where a fact was said, in words of the command line."""

    def of(self, table: str, key: str) -> str:
        option = {"inputs": "--in", "mirrors": "--mirror", "outputs": "--out"}[table]
        return f"{option} {key!r}"


class _FilePlaces:
    def __init__(self, path: str) -> None:
        self._path = path

    def of(self, table: str, key: str) -> str:
        return f"{self._path}, {table}.{json.dumps(key, ensure_ascii=False)}"


def read_manifest(path: Path) -> Manifest:
    """A file in TOML (its name ends with .toml) or JSON.  Paths of this machine are relative to
    its directory.  Raises InvalidManifest."""
    try:
        if path.stat().st_size > DOCUMENT_BYTES_MAX:
            raise InvalidManifest(
                f"The manifest {path} is larger than {DOCUMENT_BYTES_MAX >> 20} MiB."
            )
        raw = path.read_bytes()
    except OSError as exc:
        raise InvalidManifest(f"The manifest {path} cannot be read: {exc.strerror}.") from exc
    try:
        text = raw.decode("utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except RecursionError as exc:
        raise InvalidManifest(f"The manifest {path} is nested too deeply.") from exc
    except ValueError as exc:  # of both parsers and of the decoding; it says line and column
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise InvalidManifest(f"The manifest {path} is not {kind}: {exc}.") from exc
    return _from_document(document, str(path), directory=str(path.absolute().parent))


class _Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table form of an output."""

    to: str
    optional: bool = False
    overwrite: bool = False


_Targets = str | _Target | list[str | _Target]


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a file."""

    inputs: dict[str, str] = {}
    mirrors: dict[str, str] = {}
    outputs: dict[str, _Targets] = {}
    on_write: OnWrite | None = None
    persistent: bool = False
    record: bool = False
    lifetime: LeaseLifetime = LeaseLifetime.TASK


def _from_document(document: object, path: str, *, directory: str) -> Manifest:
    try:
        read = msgspec.convert(document, _Document)
    except (msgspec.ValidationError, UnicodeEncodeError) as exc:  # the latter: a word of an enum
        raise InvalidManifest(f"The manifest {path} is not usable: {exc}.") from exc
    outputs = [
        Output(pattern, target)
        if isinstance(target, str)
        else Output(pattern, target.to, optional=target.optional, overwrite=target.overwrite)
        for pattern, targets in read.outputs.items()
        for target in (targets if isinstance(targets, list) else [targets])
    ]
    manifest = Manifest(
        inputs=read.inputs,
        mirrors={os.path.join(directory, pattern): to for pattern, to in read.mirrors.items()},
        outputs=outputs,
        on_write=read.on_write,
        persistent=read.persistent,
        record=read.record,
        lifetime=read.lifetime,
    )
    return checked(manifest, places=_FilePlaces(path), directory=directory)


def checked(
    manifest: Manifest,
    *,
    places: "_OptionPlaces | _FilePlaces | None" = None,
    directory: str | None = None,
) -> Manifest:
    """The manifest with names and URLs in their one spelling.  Raises InvalidManifest."""
    where = places or _FilePlaces("the manifest")
    inputs: dict[str, str] = {}
    for name, source in manifest.inputs.items():
        place = where.of("inputs", name)
        inside = "/".join(_inside(name, place))
        if inside in inputs:
            raise InvalidManifest(f"{place}: the name {inside} is declared twice.")
        _refuse_no_url(source, place)
        inputs[inside] = as_url(source, directory)
        _refuse_wrong_url(inputs[inside], place)
    for name in inputs:
        for above in _directories_above(name):
            if above in inputs:
                raise InvalidManifest(
                    f"{where.of('inputs', name)}: {above} is an input itself, so there is nothing"
                    " below it to declare."
                )
    for pattern in manifest.mirrors:
        if "\0" in pattern or not has_bytes(pattern):
            raise InvalidManifest(
                f"{where.of('mirrors', pattern)}: no path of this machine holds such characters."
            )
    mirrors = {
        os.path.abspath(os.path.join(directory or "", pattern)): "/".join(
            _inside(to, where.of("mirrors", pattern), may_be_all=True)
        )
        for pattern, to in manifest.mirrors.items()
    }
    outputs = [_checked_output(output, where.of("outputs", output.pattern), directory)
               for output in manifest.outputs]  # fmt: skip
    return msgspec.structs.replace(manifest, inputs=inputs, mirrors=mirrors, outputs=outputs)


def _inside(name: str, place: str, *, may_be_all: bool = False) -> list[str]:
    """The components of a name in a sandbox; none at all for the sandbox itself."""
    if name.startswith("/"):
        raise InvalidManifest(
            f"{place}: {name!r} is absolute, but names are relative to the sandbox."
        )
    if len(name) > NAME_CHARACTERS_MAX:
        raise InvalidManifest(
            f"{place[:200]}...: the name has more than {NAME_CHARACTERS_MAX} characters."
        )
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if (not parts or name.endswith("/")) and not may_be_all:
        raise InvalidManifest(f"{place}: {name!r} cannot be the name of an input.")
    if not all(map(is_file_name, parts)):
        raise InvalidManifest(
            f"{place}: {name!r} cannot be a name in the sandbox ('..', NUL or a component of more"
            " than 255 bytes)."
        )
    return parts


def _directories_above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _refuse_no_url(text: str, place: str) -> None:
    if not text:
        raise InvalidManifest(f"{place}: the URL is empty.")
    if not has_bytes(text):
        raise InvalidManifest(f"{place}: {text!r} holds characters that are no text.")


def _refuse_wrong_url(url: str, place: str) -> None:
    try:
        parse(url)
    except InvalidUrl as exc:
        raise InvalidManifest(f"{place}: {exc}") from exc


def _checked_output(output: Output, place: str, directory: str | None) -> Output:
    try:
        pattern = globs.parse(output.pattern)
    except ValueError as exc:
        raise InvalidManifest(f"{place}: {exc}.") from exc
    _refuse_no_url(output.to, place)
    to = as_url(output.to, directory)
    try:
        scheme = parse(to).scheme
    except InvalidUrl as exc:
        raise InvalidManifest(f"{place}: {exc}") from exc
    if scheme in HTTP_SCHEMES:
        raise InvalidManifest(
            f"{place}: nothing can be written to an {scheme} server: name a staging:///, ssh://,"
            " s3:// or file:// URL."
        )
    return msgspec.structs.replace(output, pattern=str(pattern), to=to)


def with_more(
    manifest: Manifest,
    *,
    inputs: Mapping[str, str],
    outputs: "Mapping[str, str] | Sequence[Output]",
) -> Manifest:
    """The manifest with further inputs and outputs, checked.  Raises InvalidManifest."""
    if isinstance(outputs, Mapping):
        outputs = [Output(pattern, to) for pattern, to in outputs.items()]
    more = msgspec.structs.replace(
        manifest,
        inputs={**manifest.inputs, **inputs},
        outputs=[*manifest.outputs, *outputs],
    )
    return checked(more)


def expand_mirrors(mirrors: Mapping[str, str]) -> list[Mirrored]:
    """The paths of this machine that the patterns match now, and their names in the sandbox.

    As PyOpus mirrors: no dotfiles unless the dot is written, a pattern that matches nothing is
    no error, each match keeps its last component.  Raises InvalidManifest when two would get
    one name.
    """
    found: dict[str, str] = {}
    for pattern, directory in mirrors.items():
        for match in sorted(glob.glob(pattern, recursive=True)):
            path = match.rstrip("/")
            if not path:
                raise InvalidManifest("The root directory cannot be mirrored: name what is in it.")
            name = os.path.join(directory, os.path.basename(path))
            if found.setdefault(name, path) != path:
                raise InvalidManifest(
                    f"{found[name]} and {path} would both be {name} in the sandbox: mirror one of"
                    " them to another directory."
                )
    return [Mirrored(path, name) for name, path in found.items()]
