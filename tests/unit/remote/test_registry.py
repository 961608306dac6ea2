import subprocess
import sys

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stagefs.config import HttpSettings, RemoteDefaults, S3Settings, SshSettings
from stagefs.errors import InvalidUrl, RemoteUnavailable
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import Environment, RemoteSettings, from_config


class Made:
    """Records which drivers were made and which were closed."""

    def __init__(self) -> None:
        self.drivers: dict[str, MemoryRemote] = {}
        self.settings: dict[str, RemoteSettings] = {}
        self.closed: list[str] = []

    def __call__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> MemoryRemote:
        made = self

        class Closing(MemoryRemote):
            async def aclose(self) -> None:
                made.closed.append(self.host_url)

        self.drivers[host_url] = Closing(host_url)
        self.settings[host_url] = settings
        return self.drivers[host_url]


@pytest.fixture
async def made() -> Made:
    return Made()


def remotes(made: Made, settings: RemoteSettings | None = None) -> Remotes:
    return Remotes(
        settings or RemoteSettings(),
        CredentialStore(None),
        drivers=dict.fromkeys(("memory", "http", "https", "ssh"), made),
    )


async def test_one_remote_per_scheme_user_and_host(made: Made) -> None:
    served = remotes(made)
    assert served.for_url("http://h/x") is served.for_url("http://h:80/y/z?q=1")
    for url in ("https://h/x", "http://h:81/x", "ssh://h/x", "ssh://ada@h/x", "ssh://bob@h/x"):
        served.for_url(url)
    assert list(made.drivers) == [
        "http://h",
        "https://h",
        "http://h:81",
        "ssh://h",
        "ssh://ada@h",
        "ssh://bob@h",
    ]


async def test_drivers_never_see_a_password(made: Made) -> None:
    served = remotes(made)
    served.for_url(served.public("ssh://ada:S3cret@h/x"))
    assert list(made.drivers) == ["ssh://ada@h"]


async def test_idle_remotes_make_room(made: Made) -> None:
    served = remotes(made, RemoteSettings(remotes_max=2))
    first = served.for_url("http://a/x")
    served.for_url("http://b/x")
    served.for_url("http://a/y")
    served.for_url("http://c/x")
    await wait_all_tasks_blocked()
    assert made.closed == ["http://b"]
    assert served.for_url("http://a/z") is first


async def test_busy_remotes_are_not_closed(made: Made) -> None:
    served = remotes(made, RemoteSettings(remotes_max=1))
    served.for_url("memory://a/x")
    url = made.drivers["memory://a"].store("/x", b"")
    made.drivers["memory://a"].gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.for_url(url).stat, url)
        await wait_all_tasks_blocked()
        served.for_url("memory://b/x")
        await wait_all_tasks_blocked()
        assert made.closed == []
        nursery.cancel_scope.cancel()


async def test_all_are_closed_at_the_end(made: Made) -> None:
    served = remotes(made)
    served.for_url("http://a/x")
    served.for_url("ssh://b/x")
    await served.aclose()
    await served.aclose()
    assert made.closed == ["http://a", "ssh://b"]


@pytest.mark.parametrize("fault", [None, RemoteUnavailable("refused"), ValueError("a defect")])
async def test_connections_are_made_ahead_where_a_protocol_keeps_one(
    fault: Exception | None,
) -> None:
    """Whatever comes of it, nobody is told but who reads."""
    connected: list[str] = []

    class Connecting(MemoryRemote):
        async def connect(self) -> None:
            connected.append(self.host_url)
            if fault is not None:
                raise fault

    def made(
        host_url: str, _settings: RemoteSettings, _credentials: CredentialStore
    ) -> MemoryRemote:
        return Connecting(host_url) if host_url.startswith("ssh") else MemoryRemote(host_url)

    served = Remotes(
        RemoteSettings(), CredentialStore(None), drivers=dict.fromkeys(("ssh", "memory"), made)
    )
    for url in ("memory://a/x", "ssh://b/x"):
        served.connect_soon(url)
    assert connected == []
    await wait_all_tasks_blocked()
    assert connected == ["ssh://b"]


async def test_unknown_schemes(made: Made) -> None:
    for url in ("gopher://h/x", "nonsense", "staging:///x"):
        with pytest.raises(InvalidUrl):
            remotes(made).for_url(url)


async def test_each_scheme_gets_its_own_settings(made: Made) -> None:
    general = RemoteDefaults(
        connect_timeout_s=3,
        attempts=5,
        concurrency=7,
        http=HttpSettings(progress_timeout_s=11, concurrency=8),
        ssh=SshSettings(attempts=2),
    )
    served = remotes(made, from_config(general, environment={}, home=None))
    for url in ("http://h/x", "https://h/x", "ssh://h/x", "memory://h/x"):
        served.for_url(url)
    http, ssh = made.settings["https://h"], made.settings["ssh://h"]
    assert (http.connect_timeout_s, http.progress_timeout_s) == (3, 11)
    assert (http.attempts, http.concurrency) == (5, 8)
    assert (ssh.attempts, ssh.concurrency, ssh.progress_timeout_s) == (2, 7, 20)
    assert made.settings["memory://h"].attempts == 5


def test_settings_keep_little_of_the_environment_and_show_none_of_it() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "S3cret", "HOME": "/home/ada", "OTHER": "x"}
    settings = from_config(
        RemoteDefaults(s3=S3Settings(region="lab")), environment=environment, home=None
    )
    assert settings.environment == Environment({"AWS_SECRET_ACCESS_KEY": "S3cret"})
    assert "S3cret" not in repr(settings)
    assert settings.for_scheme("s3").s3.region == "lab"


def test_drivers_are_imported_when_they_are_needed() -> None:
    """obstore must not be touched before the daemon has forked, and costs memory."""
    program = (
        "import sys, stagefs.remote.registry\n"
        "print([name for name in ('obstore', 'urllib3', 'paramiko') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
