"""Settings on a real mount: where they come from, and that a daemon keeps them."""

import json
from collections.abc import Callable

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
