"""Settings on a real mount: where they come from, and that a daemon keeps them."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]


def test_settings_reach_the_daemon(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, "--set", "read.read_deadline_s=7m", mounted=False)
    config = mount.state.with_name("my.conf")
    config.write_text('[read]\nread_deadline_s = 1\nwindow_bytes_max = "8MiB"\n')
    mount.mount("--config", str(config))
    settings = json.loads(mount.read(".stagefs/config"))
    assert settings["read"]["read_deadline_s"] == 420
    assert settings["read"]["window_bytes_max"] == 8 << 20


def test_daemon_comes_back_whatever_became_of_the_file(
    identity: Identity, new_mount: MakeMount
) -> None:
    mount = new_mount(identity, mounted=False)
    config = mount.state.with_name("my.conf")
    config.write_text('[read]\nwindow_bytes_max = "8MiB"\n')
    mount.mount("--config", str(config))
    config.write_text("no longer TOML [")
    killed = mount.kill_daemon()
    assert json.loads(mount.read(".stagefs/config"))["read"]["window_bytes_max"] == 8 << 20
    wait_until(lambda: mount.daemon() != killed, "the next daemon")


def test_wrong_settings_mount_nothing(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, mounted=False)
    config = mount.state.with_name("my.conf")
    config.write_text("[cache]\ncapactiy_bytes = 5\n")
    said = sentence(mount.mount("--config", str(config), check=False))
    assert str(config) in said
    assert "did you mean cache.capacity_bytes" in said
    said = sentence(mount.mount("--capacity", "plenty", check=False))
    assert "plenty" in said
    assert "cache.capacity_bytes" in said
    assert not mount.programs()


def test_effective_settings_are_shown_with_their_source(identity: Identity) -> None:
    shown = identity.run("stagefs", "config", environment={"STAGEFS_LOG_LEVEL": "debug"})
    assert b"log.level = debug  (STAGEFS_LOG_LEVEL)" in shown.stdout
    assert b"cache.chunk_bytes = 1MiB  (default)" in shown.stdout


def test_show_with_and_without_sources(identity: Identity, work: Path) -> None:
    top = identity.directory(work / "home")
    (top / "stagefs").mkdir()
    (top / "stagefs/stagefs.conf").write_text('[cache]\nchunk_bytes = "2MiB"\n')
    variables = {"XDG_CONFIG_HOME": str(top), "STAGEFS_LOG_LEVEL": "debug"}

    def show(*options: str) -> list[str]:
        done = identity.run("stagefs", "config", "show", *options, environment=variables)
        return done.stdout.decode().splitlines()

    assert "cache.chunk_bytes = 2MiB" in show()
    assert len(show()) == len(show("--sources"))
    assert show("--sources", "--changed", "--set", "read.read_deadline_s=7s") == [
        f"cache.chunk_bytes = 2MiB  ({top}/stagefs/stagefs.conf)",
        "read.read_deadline_s = 7s  (the command line)",
        "log.level = debug  (STAGEFS_LOG_LEVEL)",
    ]
    changed = json.loads("".join(show("--changed", "--json")))
    assert {value["key"] for value in changed} == {"cache.chunk_bytes", "log.level"}


def test_check_says_what_is_set_and_what_is_wrong(identity: Identity, work: Path) -> None:
    top = identity.directory(work / "c")
    good, bad = top / "good.conf", top / "bad.conf"
    good.write_text('[read]\nread_deadline_s = "9s"\n')
    bad.write_text("[read]\nread_deadlin_s = 9\n")
    done = identity.run("stagefs", "config", "check", good)
    assert f"{good}: read.read_deadline_s" in done.stdout.decode()
    assert b"settings are usable, 1 of them set" in done.stdout
    refused = sentence(identity.run("stagefs", "config", "check", bad, check=False))
    assert str(bad) in refused
    assert "did you mean read.read_deadline_s" in refused
