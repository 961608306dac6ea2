"""stage-in, bind, import, ls, stat, rm, mv: the commands about names."""

import os
from collections.abc import Iterator

import click

from stagefs.cli.finding import Target, json_option, mount_option, target
from stagefs.cli.output import (
    human,
    print_json,
    print_json_list,
    print_table,
    progress_bar,
    shown_name,
    when,
)
from stagefs.errors import InvalidName
from stagefs.model import Checksum, ChecksumKind
from stagefs.remote.url import quote_path
from stagefs.staging.values import NameStat, StagedIn
from stagefs.units import parse_duration

DIGEST_CHARACTERS = {ChecksumKind.SHA256: 64, ChecksumKind.MD5: 32, ChecksumKind.XXH3: 16}


def as_url(text: str) -> str:
    """A URL as it is; a path of this machine as a file URL."""
    if "://" in text:
        return text
    return f"file://{quote_path(os.path.abspath(text))}"


def declared_checksum(**digests: str | None) -> Checksum | None:
    """At most one of the options, checked.  Raises InvalidName."""
    given = [(ChecksumKind(kind), digest) for kind, digest in digests.items() if digest]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidName("Declare one checksum: --sha256, --md5 or --xxh3.")
    kind, digest = given[0]
    digest = digest.strip().lower()
    if len(digest) != DIGEST_CHARACTERS[kind] or set(digest) - set("0123456789abcdef"):
        raise InvalidName(
            f"{digest!r} is no {kind} checksum: it has {DIGEST_CHARACTERS[kind]} hex digits."
        )
    return Checksum(kind, digest)


@click.command("stage-in")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.argument("name", metavar="staging:///NAME")
@click.option("--wait", is_flag=True, help="Fetch now, and prove the declared checksum.")
@click.option("--sha256", metavar="HEX", help="What the content must be.")
@click.option("--md5", metavar="HEX", help="What the content must be.")
@click.option("--xxh3", metavar="HEX", help="What the content must be (XXH3, 64 bits).")
@click.option(
    "--replace", is_flag=True, help="A new version of an existing name; links keep theirs."
)
@click.option("--immutable", is_flag=True, help="Never ask the remote again for a newer version.")
@mount_option
@json_option
def stage_in(
    urls: tuple[str, ...],
    name: str,
    wait: bool,
    sha256: str | None,
    md5: str | None,
    xxh3: str | None,
    replace: bool,
    immutable: bool,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """Register remote objects under staging:/// names.

    Each shows at once, with its size, and is fetched when somebody reads it.  Several URLs, or
    a name that ends with a slash, mean a directory.  A path of this machine is a URL too.
    """
    checksum = declared_checksum(sha256=sha256, md5=md5, xxh3=xxh3)
    if checksum is not None and len(urls) > 1:
        raise InvalidName("A checksum belongs to one URL: stage the others in one by one.")
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        entries = chosen.client.stage_in(
            [as_url(url) for url in urls],
            chosen.path(name),
            checksum=checksum,
            replace=replace,
            immutable=immutable,
            wait=wait,
            progress=progress,
        )
    if as_json:
        print_json(StagedIn(entries))
        return
    for entry in entries:
        fate = "fetched on first read"
        if entry.state == "cached":
            fate = "fetched" if wait else "cached already"
        click.echo(f"{shown_name(entry.path)}: registered, {human(entry.size_bytes)}, {fate}")


@click.command()
@click.argument("url")
@click.argument("name", metavar="staging:///NAME")
@click.option("--ttl", metavar="TIME", help="How long a listing is believed (60s).")
@click.option("--writable", is_flag=True, help="Upload what is closed in it.")
@click.option("--overwrite", is_flag=True, help="Replace objects that are there already.")
@click.option("--propagate-delete", is_flag=True, help="Remove objects whose names are removed.")
@mount_option
@json_option
def bind(
    *,
    url: str,
    name: str,
    ttl: str | None,
    writable: bool,
    overwrite: bool,
    propagate_delete: bool,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """Show a remote directory under a staging:/// name, listed on demand.

    With --writable, files that are closed in it, and local files that are moved or linked into
    it, are uploaded to their place below URL.
    """
    try:
        ttl_s = None if ttl is None else parse_duration(ttl)
    except ValueError as exc:
        raise InvalidName(f"--ttl: {exc}.") from exc
    chosen = target(mountpoint)
    bound = chosen.client.bind(
        as_url(url),
        chosen.path(name),
        ttl_s=ttl_s,
        writable=writable,
        overwrite=overwrite,
        propagate_delete=propagate_delete,
    )
    if as_json:
        print_json(bound)
        return
    fate = ", what is closed in it is uploaded" if bound.writable else ""
    click.echo(f"{shown_name(bound.path)}: bound to {bound.url}, listed on demand{fate}")


@click.command("import")
@click.argument("catalog", type=click.Path(exists=True, dir_okay=False))
@click.option("--prefix", default="staging:///", help="Directory that the names are relative to.")
@click.option("--replace", is_flag=True, help="New versions of existing names.")
@mount_option
@json_option
def import_catalog(
    catalog: str, prefix: str, replace: bool, mountpoint: str | None, as_json: bool
) -> None:
    """Register a catalog: JSON lines or CSV with name, url, size, mtime, checksum."""
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        imported = chosen.client.import_catalog(
            os.path.abspath(catalog),
            prefix=chosen.path(prefix),
            replace=replace,
            progress=progress,
        )
    if as_json:
        print_json(imported)
    else:
        more = [(imported.replaced, "replaced"), (imported.unchanged, "there already")]
        rest = "".join(f", {count} {what}" for count, what in more if count)
        click.echo(f"{shown_name(catalog)}: {imported.entries} names registered{rest}")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-l", "--long", "in_full", is_flag=True, help="Size, cached part, time and URL too.")
@mount_option
@json_option
def ls(names: tuple[str, ...], in_full: bool, mountpoint: str | None, as_json: bool) -> None:
    """List names (staging:///); contacts no remote but for bound directories."""
    chosen = target(mountpoint)
    entries = (
        entry
        for name in names or ("staging:///",)
        for entry in _listed(chosen, chosen.path(name), cached=in_full or as_json)
    )
    if as_json:
        print_json_list(entries)
        return
    for entry in entries:
        click.echo(_long_line(entry) if in_full else _short_name(entry))


def _listed(chosen: Target, path: str, *, cached: bool) -> Iterator[NameStat]:
    """The entries of a directory; anything else lists itself."""
    found = chosen.client.stat(path)
    if found.kind == "directory":
        yield from chosen.client.list_names(path, cached=cached)
    else:
        yield found


def _short_name(entry: NameStat) -> str:
    return shown_name(entry.name) + ("/" if entry.kind == "directory" else "")


def _long_line(entry: NameStat) -> str:
    size = "-" if entry.kind == "directory" else human(entry.size_bytes)
    url = f"  {entry.url}" if entry.url else ""
    state = (entry.upload or entry.state or entry.kind).partition(":")[0]
    return f"{size:>10}  {state:<9}  {when(entry.mtime_ns)}  {_short_name(entry)}{shown_name(url)}"


@click.command()
@click.argument("name")
@mount_option
@json_option
def stat(name: str, mountpoint: str | None, as_json: bool) -> None:
    """Show what is known of a name, without asking its remote."""
    chosen = target(mountpoint)
    found = chosen.client.stat(chosen.path(name))
    if as_json:
        print_json(found)
        return
    rows = [
        ("path", shown_name(found.path)),
        ("kind", found.kind),
        ("inode", str(found.inode)),
        ("links", str(found.links)),
        ("mode", f"{found.mode:04o}"),
        ("modified", when(found.mtime_ns)),
    ]
    if found.kind == "file":
        rows.append(("size", f"{human(found.size_bytes)} ({found.size_bytes} bytes)"))
        rows.append(("cached", f"{human(found.cached_bytes)} ({found.state})"))
    facts = [
        ("source", found.url),
        ("version", found.version),
        ("checksum", found.checksum),
        ("upload", found.upload),
        *(("replica", replica) for replica in found.replicas),
        ("last error", found.last_error),
    ]
    print_table([*rows, *((label, shown_name(fact)) for label, fact in facts if fact)])


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("-r", "--recursive", is_flag=True, help="Directories with all that is below them.")
@mount_option
@json_option
def rm(names: tuple[str, ...], recursive: bool, mountpoint: str | None, as_json: bool) -> None:
    """Remove names.  Nothing at a remote is ever touched."""
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        removed = [
            chosen.client.remove(chosen.path(name), recursive=recursive, progress=progress)
            for name in names
        ]
    if as_json:
        print_json_list(removed)


@click.command()
@click.argument("source")
@click.argument("destination")
@mount_option
@json_option
def mv(source: str, destination: str, mountpoint: str | None, as_json: bool) -> None:
    """Rename; into a directory when DESTINATION is one."""
    chosen = target(mountpoint)
    moved = chosen.client.move(chosen.path(source), chosen.path(destination))
    if as_json:
        print_json(moved)
