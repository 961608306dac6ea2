"""Hostile names and secrets: nothing leads out of the mount or the cache, nothing leaks (A11)."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.kernel import programs
from tests.support.mounted import Mounted, sentence
from tests.support.served import HttpServed, ServedFiles

MakeMount = Callable[..., Mounted]

LONGEST = "n" * 255
BAD_NAMES = [
    "..",
    "../x",
    "a/../../x",
    "/../x",
    "a/./b",
    "",
    "x\0y",
    "n" * 256,
    "a//../b",
    "dir/..",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_catalog_name_that_leads_out(
    anybody: Identity, web: HttpServed, new_mount: MakeMount, name: str
) -> None:
    mount = new_mount(anybody)
    catalog = mount.state.with_name("catalog.jsonl")
    catalog.write_text(json.dumps({"name": name, "url": web.url("x"), "size": 1}) + "\n")
    assert "line 1" in sentence(mount.stagefs("import", catalog, check=False)).lower()
    assert mount.run("find", "MNT/staging", "-mindepth", "1").stdout == b""


def test_catalog_names_that_only_look_bad_are_just_names(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    names = ["%2e%2e", "..%2fx", "...", "-rf", "a\nb", "~", "$HOME", "`id`", "\x1b[31m", LONGEST]
    mount = new_mount(identity)
    catalog = mount.state.with_name("catalog.jsonl")
    url = web.put("x", b"x")
    catalog.write_text(
        "".join(json.dumps({"name": name, "url": url, "size": 1}) + "\n" for name in names)
    )
    mount.stagefs("import", catalog)
    found = mount.run("find", "MNT/staging", "-mindepth", "1", "-printf", "%f\\0").stdout
    assert sorted(found.split(b"\0")[:-1]) == sorted(name.encode() for name in names)
    for name in names:
        assert mount.read(f"staging/{name}") == b"x"


def test_names_that_are_not_utf8(
    identity: Identity, served_files: ServedFiles, new_mount: MakeMount
) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.dat")
    served_files.put("dir/plain", b"plain")
    (served_files.objects / "dir" / name).write_bytes(b"latin")
    mount = new_mount(identity, environment=served_files.environment(identity))
    mount.stagefs("bind", served_files.url("dir/"), "staging:///dir")
    listed = mount.run("ls", "-A", "MNT/staging/dir").stdout
    assert os.fsencode(name) in listed
    assert mount.read(f"staging/dir/{name}") == b"latin"
    mount.run("mkdir", f"MNT/tasks/{name}")
    mount.run("ln", f"MNT/staging/dir/{name}", f"MNT/tasks/{name}/{name}")
    assert mount.read(f"tasks/{name}/{name}") == b"latin"
    assert mount.stagefs("ls", f"staging:///dir/{name}").stdout.strip() == os.fsencode(name)
    assert mount.json_of("stagefs", "ls", "staging:///dir")


INDEX = """<html><body><h1>Index of /trap/</h1><hr><pre>
<a href="../">../</a>
<a href="good.txt">good.txt</a>
<a href="/plain/outside.txt">outside</a>
<a href="../outside.txt">outside</a>
<a href="..%2foutside.txt">outside</a>
<a href="%2e%2e/outside.txt">outside</a>
<a href="sub%2Foutside.txt">outside</a>
<a href="%2e%2e">up</a>
<a href="a%00b">nul</a>
<a href="file:///etc/passwd">passwd</a>
<a href="http://127.0.0.1:9/elsewhere.txt">elsewhere</a>
<a href="//127.0.0.1:9/elsewhere.txt">elsewhere</a>
<a href="javascript:alert(1)">script</a>
<a href="{long}">long</a>
</pre></body></html>
"""


def test_listing_of_a_hostile_web_server(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    web.put("outside.txt", b"outside")
    web.put("trap/good.txt", b"good")
    web.put("trap/index.html", INDEX.format(long="n" * 256).encode())
    mount = new_mount(identity)
    mount.stagefs("bind", web.url("trap/"), "staging:///trap")
    assert mount.run("ls", "-A", "MNT/staging/trap").stdout.split() == [b"good.txt"]
    assert mount.read("staging/trap/good.txt") == b"good"
    for name in ("..%2foutside.txt", "%2e%2e", "sub%2Foutside.txt"):
        assert mount.run("cat", f"MNT/staging/trap/{name}", check=False).returncode != 0


def test_symbolic_links_of_a_remote_show_as_files_or_not_at_all(
    identity: Identity, served_files: ServedFiles, new_mount: MakeMount
) -> None:
    """They are followed by the server, never here: no link of ours leads to a local path."""
    served_files.put("dir/real", b"real")
    for name, target in (
        ("to-file", "real"),
        ("to-root", "/"),
        ("up", "../.."),
        ("nowhere", "/absent"),
    ):
        (served_files.objects / "dir" / name).symlink_to(target)
    mount = new_mount(identity, environment=served_files.environment(identity))
    mount.stagefs("bind", served_files.url("dir/"), "staging:///dir")
    kinds = mount.run("find", "MNT/staging/dir", "-maxdepth", "1", "-printf", "%f %y\\n").stdout
    assert b" l\n" not in kinds
    assert b"real f\n" in kinds


def test_cache_files_are_named_by_us_alone(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    for number, name in enumerate(("a b", "..%2e", "x;y", "ü", "quo'te")):
        web.put(name, b"x" * (200_000 if number % 2 else 20))
        mount.stage_in(web.url(name), f"n{number}")
        mount.read(f"staging/n{number}")
    mount.umount()
    cache = mount.state / "cache"
    for path in cache.rglob("*"):
        name = path.relative_to(cache).as_posix()
        assert re.fullmatch(r"[A-Za-z]+(\.[A-Za-z-]+)?(/[0-9a-f]{2,40}){0,2}", name), name


SECRET = "s3cr3t-w0rd"
TOKEN = "t0k3n-that-nobody-sees"


def test_secrets_show_nowhere(identity: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    web.put("x", b"behind a password")
    web.put("y", b"behind a token")
    with_password = web.private_url("x").replace("://", f"://ada:{SECRET}@")
    with_token = f"{web.url('y')}?token={TOKEN}"
    refused = with_password.replace(SECRET, f"{SECRET}-wrong")

    mount = new_mount(identity, "--set", "log.level=debug")
    shown: list[bytes] = []

    def see(*command: str) -> None:
        done = mount.run(*command, check=False)
        shown.append(done.stdout + done.stderr)

    see("stagefs", "stage-in", with_password, "staging:///x")
    see("stagefs", "stage-in", with_token, "staging:///y")
    see("stagefs", "stage-in", refused, "staging:///z")
    see("stagefs", "stage-in", with_password, "staging:///x")
    see("stagefs", "bind", with_password.removesuffix("x"), "staging:///dir")
    mount.run("mkdir", "MNT/tasks/t")
    see("ln", "-s", with_token, "MNT/tasks/t/y")
    assert mount.read("staging/x") == b"behind a password"
    assert mount.read("staging/y") == mount.read("tasks/t/y") == b"behind a token"
    (web.objects / "y").unlink()
    mount.cache("evict", "--all")
    see("cat", "MNT/staging/y")
    see("ls", "-lR", "MNT/staging", "MNT/tasks")
    see("getfattr", "-R", "-d", "-m", "-", "MNT/staging")
    see("sh", "-c", f"cat {mount.point}/.stagefs/*")
    for command in (("ls", "-l"), ("ls", "--json"), ("stat", "staging:///x"), ("status",)):
        see("stagefs", *command)
    for command in (("list",), ("list", "--json"), ("usage",), ("show", "staging:///x")):
        see("stagefs-cache", *command)
    shown.extend(" ".join(program.command).encode() for program in programs())
    text = b"\n".join(shown)
    for secret in (SECRET, TOKEN):
        assert secret.encode() not in without_typed(text), f"{secret} was shown"
    assert b"ada" in text, "nothing of the URLs was shown, so nothing was tried"

    mount.umount()
    leaks = [
        path
        for path in mount.state.rglob("*")
        if path.is_file()
        and not kept_for_restarts(path)
        and any(secret.encode() in path.read_bytes() for secret in (SECRET, TOKEN))
    ]
    assert not leaks


def without_typed(text: bytes) -> bytes:
    """`ln` repeats what it was told in its own error message; that is not ours."""
    return b"\n".join(line for line in text.split(b"\n") if not line.startswith(b"ln: "))


def kept_for_restarts(path: Path) -> bool:
    """The one file that may hold them: private, so that a restarted daemon can go on."""
    return path.name == "credentials.json" and path.stat().st_mode & 0o077 == 0
