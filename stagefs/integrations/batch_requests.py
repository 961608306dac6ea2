"""What a batch job asks of StageFS: its inputs and outputs, in the words that its submitter has.

    STAGEFS_MANIFEST=inputs.toml
    STAGEFS_IN="ref.fa=https://host/ref.fa table=/home/me/a%20b.csv"
    STAGEFS_OUT="*.log=ssh://host/runs/7/"

Pairs are separated by blanks; in them ``%20`` stands for a blank and ``%2C`` for a comma, which
`qsub -v` would split at.  A path is one of the host that the job was submitted from: ``PathMap``
says where that is for other hosts.  Pure, but for reading the manifest's file; no state.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from stagefs.errors import InvalidManifest
from stagefs.remote.url import LITERAL_SCHEMES, decode_path, quote_path
from stagefs.staging.manifest import Manifest, Output, read_manifest, with_more

MANIFEST, INPUTS, OUTPUTS = "STAGEFS_MANIFEST", "STAGEFS_IN", "STAGEFS_OUT"


class PathMap(msgspec.Struct, frozen=True):
    """``entries``: "host:/directory" -> the URL under which this machine reaches that directory;
    "*:/directory" is that of any host.

    ``here`` is this machine's name.
    """

    entries: Mapping[str, str]
    here: str

    def mapped(self, host: str, path: str) -> str | None:
        """The URL of an absolute path of a host, by the longest entry that holds it."""
        best: tuple[str, str] | None = None
        for key, url in self.entries.items():
            name, _, prefix = key.partition(":")
            prefix = prefix.rstrip("/")
            inside = path == prefix or path.startswith(f"{prefix}/")
            is_longer = best is None or len(prefix) > len(best[0])
            if (name == "*" or _same(name, host)) and inside and is_longer:
                best = (prefix, url)
        if best is None:
            return None
        prefix, url = best
        rest = path[len(prefix) :]
        literal = url.partition(":")[0] in LITERAL_SCHEMES
        return url.rstrip("/") + (rest if literal else quote_path(rest))

    def is_here(self, host: str) -> bool:
        return not host or _same(host, self.here)

    def shared(self, host: str, path: str) -> str:
        """For what the submitter sees as a file: without an entry, a file system that both hosts
        have."""
        return self.mapped(host, path) or f"file://{quote_path(path)}"

    def delegated(self, host: str, path: str) -> str:
        """For what the batch system says lies on another host: without an entry, over ssh."""
        if (url := self.mapped(host, path)) is not None:
            return url
        if self.is_here(host):
            return f"file://{quote_path(path)}"
        return f"ssh://{host}{quote_path(path)}"


def _same(one: str, other: str) -> bool:
    """Host names with and without their domain are the same host."""
    return one == other or (
        one.partition(".")[0] == other.partition(".")[0] and ("." in one) != ("." in other)
    )


class Submission(msgspec.Struct, frozen=True):
    """Where a job was submitted: paths in its words are relative to that."""

    host: str
    directory: str


def declared(
    variables: Mapping[str, str], submission: Submission, paths: PathMap
) -> Manifest | None:
    """What the job's variables ask for; None when they ask for nothing.  Raises InvalidManifest.

    Outputs of pairs replace what is there, because a job may run again.  All outputs are optional:
    a job that was ended has made some of them, and those are staged out.
    """
    named, inputs, outputs = (variables.get(name, "") for name in (MANIFEST, INPUTS, OUTPUTS))
    if not (named or inputs.strip() or outputs.strip()):
        return None
    manifest = Manifest()
    if named:
        manifest = read_manifest(Path(os.path.join(submission.directory, named)))
    wanted = with_more(
        manifest,
        inputs={
            decode_path(left): _url(right, submission, paths)
            for left, right in _pairs(INPUTS, inputs, "NAME=URL")
        },
        outputs=[
            Output(decode_path(left), _url(right, submission, paths), overwrite=True)
            for left, right in _pairs(OUTPUTS, outputs, "PATTERN=URL")
        ],
    )
    return msgspec.structs.replace(
        wanted,
        outputs=[msgspec.structs.replace(output, optional=True) for output in wanted.outputs],
    )


def input_names(variables: Mapping[str, str]) -> set[str]:
    """Those that STAGEFS_IN names.  Raises InvalidManifest."""
    text = variables.get(INPUTS, "")
    return {decode_path(left) for left, _ in _pairs(INPUTS, text, "NAME=URL")}


def _pairs(variable: str, text: str, shape: str) -> Iterator[tuple[str, str]]:
    seen = set()
    for word in text.split():
        left, equals, right = word.partition("=")
        if not (left and equals and right):
            raise InvalidManifest(
                f"{variable} holds {word!r}, which declares nothing: write {shape} pairs separated"
                " by blanks, and a blank in a name as %20."
            )
        if variable == INPUTS and left in seen:
            raise InvalidManifest(f"{variable} names {left} twice: one name leads to one input.")
        seen.add(left)
        yield left, right


def _url(text: str, submission: Submission, paths: PathMap) -> str:
    scheme, there, _ = text.partition("://")
    if there:
        return decode_path(text) if scheme in LITERAL_SCHEMES else text
    path = os.path.normpath(os.path.join(submission.directory, decode_path(text)))
    slash = "/" if text.endswith("/") and path != "/" else ""
    return paths.shared(submission.host, path + slash)
