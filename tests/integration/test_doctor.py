"""`stagefs doctor` before any mount, beside real servers; and completion in a real shell."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.identity import Identity
from tests.support.served import Served, serving


def findings(identity: Identity, served: Served | None, *words: str) -> tuple[int, list[Any]]:
    environment = served.environment(identity) if served is not None else {}
    done = identity.run("stagefs", "doctor", "--json", *words, environment=environment, check=False)
    return done.returncode, json.loads(done.stdout)


def level_of(found: list[Any], check: str) -> str:
    return next(str(one["level"]) for one in found if one["check"].startswith(check))


def test_this_machine_can_mount(identity: Identity) -> None:
    code, found = findings(identity, None)
    assert code == 0, found
    for check in ("fuse", "mounting", "settings", "state", "disk"):
        assert level_of(found, check) == "good"


def test_remotes_are_asked_as_a_mount_would_ask_them(anybody: Identity, served: Served) -> None:
    url = served.put("there", b"here")
    code, found = findings(anybody, served, url)
    assert code == 0, found
    assert level_of(found, "remote ") == "good"


def test_missing_object_and_dead_server_are_told_apart(anybody: Identity, served: Served) -> None:
    url = served.put("there", b"here")
    served.remove("there")
    code, found = findings(anybody, served, url)
    assert code == 1
    missing = next(one for one in found if one["check"].startswith("remote "))
    code, found = findings(anybody, None, "http://127.0.0.1:9/x")
    assert code == 1
    dead = next(one for one in found if one["check"].startswith("remote "))
    assert "refused" in dead["said"].lower()
    assert "refused" not in missing["said"].lower()
    assert missing["advice"]
    assert dead["advice"]


def test_secrets_of_urls_are_not_printed(anybody: Identity) -> None:
    url = "http://me:geheim@127.0.0.1:9/x?sig=verborgen"
    done = anybody.run("stagefs", "doctor", url, check=False)
    assert b"geheim" not in done.stdout + done.stderr
    assert b"verborgen" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"), [("stagefs doc", "doctor"), ("stagefs-cache ver", "verify")]
)
def test_bash_completes(anybody: Identity, typed: str, offered: str) -> None:
    program, word = typed.split(" ")
    script = (
        'eval "$(stagefs completion bash)"; '
        f"COMP_WORDS=({program} {word}); COMP_CWORD=1; "
        f'_{program.replace("-", "_")}_completion {program}; echo "${{COMPREPLY[@]}}"'
    )
    done = anybody.run("bash", "-c", script)
    assert done.stdout.decode().split() == [offered]


def test_ssh_without_keys_or_known_hosts_is_explained(
    anybody: Identity, served_directory: Path
) -> None:
    """With the environment of the test this server lets him in; with his own it does not."""
    with serving("ssh", served_directory) as server:
        url = server.put("there", b"here")
        assert findings(anybody, server, url)[0] == 0
        code, found = findings(anybody, None, url)
    assert code == 1
    refused = next(one for one in found if one["check"].startswith("remote "))
    assert "host key" in refused["said"].lower() or "key" in refused["said"].lower(), refused
    assert "`ssh HOST true`" in refused["advice"]
