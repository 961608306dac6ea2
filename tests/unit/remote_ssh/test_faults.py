"""What happens when host keys, logins, connections, processes or files are not as they should be.

Each fault hits while work is in flight; the tests wait for that before they go on.
"""

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from stagefs.errors import (
    AccessDenied,
    CacheFailed,
    DeadlineExceeded,
    ObjectChanged,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import MIB, Span
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.ssh import SshRemote
from tests.support.sshd import Sshd
from tests.support.waiting import wait_until
from tests.unit.remote_ssh.conftest import settings_for
from tests.unit.remote_ssh.sinks import FileSink, Item

Make = Callable[..., SshRemote]
LARGE = 256 * MIB


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def engine_pid() -> int:
    """Of the only engine there is."""
    (found,) = [
        pid
        for pid in children(os.getpid())
        if b"sftp_engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def large(directory: Path) -> Path:
    path = directory / "large"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """Connections are taken by the kernel, and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def reconfigured(server: Sshd, directory: Path, old: str, new: str) -> str:
    """Another client configuration."""
    text = server.ssh_config.read_text()
    assert old in text
    path = directory / "ssh_config"
    path.write_text(text.replace(old, new))
    return str(path)


async def test_an_unknown_host_key_is_refused(
    my_server: Sshd, directory: Path, remote_to: Make, client: str
) -> None:
    nothing = directory / "known"
    config = reconfigured(my_server, directory, str(my_server.known_hosts), str(nothing))
    with pytest.raises(AccessDenied, match=r"127\.0\.0\.1 is not known here: .*known_hosts"):
        await remote_to(my_server, config=config, client=client).stat(f"{my_server.url}/etc/passwd")


@pytest.mark.parametrize("option", ["no", "off"])
async def test_no_configuration_switches_host_keys_off(
    my_server: Sshd, directory: Path, remote_to: Make, option: str, client: str
) -> None:
    new = f"{directory}/known\n  StrictHostKeyChecking {option}"
    config = reconfigured(my_server, directory, str(my_server.known_hosts), new)
    with pytest.raises(AccessDenied, match="not known here"):
        await remote_to(my_server, config=config, client=client).stat(f"{my_server.url}/etc/passwd")


async def test_a_configuration_that_accepts_new_host_keys_is_respected(
    my_server: Sshd, directory: Path, remote_to: Make
) -> None:
    new = f"{directory}/known\n  StrictHostKeyChecking accept-new"
    config = reconfigured(my_server, directory, str(my_server.known_hosts), new)
    await remote_to(my_server, config=config).stat(f"{my_server.url}/etc/passwd")
    assert (directory / "known").read_text()


async def test_a_changed_host_key_is_refused(
    my_server: Sshd, directory: Path, remote_to: Make, client: str
) -> None:
    other = (my_server.root / "id_client.pub").read_text().rsplit(" ", 1)[0]
    (directory / "known").write_text(f"[127.0.0.1]:{my_server.port} {other}\n")
    config = reconfigured(
        my_server, directory, str(my_server.known_hosts), str(directory / "known")
    )
    with pytest.raises(AccessDenied, match="not the one in known_hosts"):
        await remote_to(my_server, config=config, client=client).stat(f"{my_server.url}/etc/passwd")


async def test_a_refused_login(
    my_server: Sshd, directory: Path, remote_to: Make, client: str
) -> None:
    config = reconfigured(
        my_server, directory, str(my_server.identity), str(my_server.root / "id_host")
    )
    with pytest.raises(AccessDenied, match="refused the login"):
        await remote_to(my_server, config=config, client=client).stat(f"{my_server.url}/etc/passwd")


async def test_a_configuration_that_is_wrong(
    my_server: Sshd, directory: Path, remote_to: Make, client: str
) -> None:
    wrong = reconfigured(my_server, directory, "IdentitiesOnly yes", "NoSuchOption yes")
    if client == "openssh":  # paramiko overlooks what it does not know
        with pytest.raises(RemoteError, match="ssh configuration"):
            await remote_to(my_server, config=wrong).stat(f"{my_server.url}/etc/passwd")
    nowhere = str(directory / "nowhere")
    with pytest.raises(RemoteError, match="ssh configuration"):
        await remote_to(my_server, config=nowhere, client=client).stat(f"{my_server.url}/x")


async def test_nobody_listens(my_server: Sshd, remote_to: Make, client: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"ssh://127.0.0.1:{taken.getsockname()[1]}"
        remote = SshRemote(url, settings_for(my_server, client=client), CredentialStore(None))
        with pytest.raises(RemoteUnavailable, match="refused the connection"):
            await remote.stat(f"{url}/x")
        await remote.aclose()


async def test_a_host_that_does_not_exist(my_server: Sshd, client: str) -> None:
    remote = SshRemote(
        "ssh://no-such-host.invalid", settings_for(my_server, client=client), CredentialStore(None)
    )
    with pytest.raises(RemoteUnavailable, match=r"no-such-host\.invalid cannot be resolved"):
        await remote.stat("ssh://no-such-host.invalid/x")
    await remote.aclose()


async def test_a_server_that_never_greets(my_server: Sshd, deaf_port: int, client: str) -> None:
    url = f"ssh://127.0.0.1:{deaf_port}"
    remote = SshRemote(
        url, settings_for(my_server, limit_s=1.0, client=client), CredentialStore(None)
    )
    with trio.fail_after(10), pytest.raises(DeadlineExceeded):
        await remote.stat(f"{url}/x")
    await remote.aclose()


async def test_an_alias_of_the_configuration(my_server: Sshd, client: str) -> None:
    remote = SshRemote(
        "sftp://staged", settings_for(my_server, client=client), CredentialStore(None)
    )
    assert (await remote.stat("sftp://staged/etc/passwd")).size_bytes > 0
    await remote.aclose()


async def test_a_silent_server(own_server: Sshd, large: Path, remote_to: Make, client: str) -> None:
    """200 readers wait for it: each ends in time, and all goes on when it is back."""
    remote, url = remote_to(own_server, limit_s=2.0, client=client), own_server.url_of(large)
    info = await remote.stat(url)
    ended: list[None] = []
    with FileSink(large.with_name("sink")) as sink:

        async def read() -> None:
            with pytest.raises((DeadlineExceeded, RemoteUnavailable)):
                await remote.fetch(url, Span(0, LARGE), sink=sink, validator=info.validator)
            ended.append(None)

        own_server.freeze()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(200):
                    nursery.start_soon(read)
        assert len(ended) == 200
        own_server.thaw()
        assert await remote.stat(url) == info
        await remote.fetch(url, Span(0, LARGE), sink=sink, validator=info.validator)


async def test_a_server_that_falls_silent_in_mid_transfer(
    own_server: Sshd, large: Path, remote_to: Make, client: str
) -> None:
    remote, url = remote_to(own_server, limit_s=1.0, client=client), own_server.url_of(large)
    with FileSink(large.with_name("sink")) as sink, trio.fail_after(30):
        # On a busy machine the login alone may take longer than a server may be silent.
        while True:
            try:
                await remote.stat(url)
                break
            except (DeadlineExceeded, RemoteUnavailable):
                continue
        async with trio.open_nursery() as nursery:

            async def freeze() -> None:
                await sink.some_landed.wait()
                own_server.freeze()

            nursery.start_soon(freeze)
            with pytest.raises(DeadlineExceeded, match="did not answer within"):
                await remote.fetch(url, Span(0, LARGE), sink=sink, validator=None)
        assert 0 < sink.spans[-1].stop < LARGE


async def test_a_cut_connection_goes_unnoticed_once(
    own_server: Sshd, directory: Path, remote_to: Make, client: str
) -> None:
    data = random.Random(1).randbytes(64 * MIB)
    (directory / "object").write_bytes(data)
    remote, url = remote_to(own_server, client=client), own_server.url_of(directory / "object")
    with FileSink(directory / "sink") as sink:
        async with trio.open_nursery() as nursery:

            async def cut() -> None:
                await sink.some_landed.wait()
                assert own_server.kill_sessions() > 0

            nursery.start_soon(cut)
            span = Span(0, len(data))
            await remote.fetch(url, span, sink=sink, validator=None)
        assert sink.bytes_of(span) == data
    assert own_server.log().count("Accepted publickey") >= 2


async def test_a_batch_survives_a_cut_connection(
    own_server: Sshd, directory: Path, remote_to: Make, client: str
) -> None:
    remote = remote_to(own_server, client=client)
    (directory / "x").write_bytes(b"x")
    items = [Item(own_server.url_of(directory / "x"))] * 1000
    assert len(await remote.fetch_batch(items[:1])) == 1
    async with trio.open_nursery() as nursery:

        async def fetch() -> None:
            for result in await remote.fetch_batch(items):
                assert getattr(result, "data", result) == b"x"

        nursery.start_soon(fetch)
        own_server.freeze()
        await trio.testing.wait_all_tasks_blocked(0.05)
        own_server.kill_sessions()
        own_server.thaw()


async def test_an_engine_that_is_killed_is_replaced(
    my_server: Sshd, large: Path, remote_to: Make
) -> None:
    remote, url = remote_to(my_server), my_server.url_of(large)
    with FileSink(large.with_name("sink")) as sink:
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await sink.some_landed.wait()
                pid = engine_pid()
                clients = children(pid)
                assert clients, "no ssh was running"
                os.kill(pid, signal.SIGKILL)
                for client in clients:
                    wait_until(lambda client=client: not is_running(client), "ssh ends")  # type: ignore[misc]

            nursery.start_soon(kill)
            with pytest.raises(RemoteUnavailable, match="is started again"):
                await remote.fetch(url, Span(0, LARGE), sink=sink, validator=None)
    assert (await remote.stat(url)).size_bytes == LARGE


async def test_closing_leaves_no_process(my_server: Sshd, large: Path, remote_to: Make) -> None:
    remote = remote_to(my_server)
    await remote.stat(my_server.url_of(large))
    pid = engine_pid()
    (client,) = children(pid)
    await remote.aclose()
    await remote.aclose()
    assert not is_running(pid)
    assert not is_running(client)
    with pytest.raises(RemoteUnavailable, match="was closed"):
        await remote.stat(my_server.url_of(large))


async def test_closing_while_the_server_is_silent(
    own_server: Sshd, large: Path, remote_to: Make, client: str
) -> None:
    remote = remote_to(own_server, client=client)
    await remote.stat(own_server.url_of(large))
    pids = [engine_pid(), *children(engine_pid())]
    assert len(pids) == (2 if client == "openssh" else 1)
    own_server.freeze()
    with trio.fail_after(10):
        await remote.aclose()
    assert not any(is_running(pid) for pid in pids)


async def test_a_cancelled_fetch_writes_no_more(
    my_server: Sshd, large: Path, remote_to: Make, client: str
) -> None:
    remote, url = remote_to(my_server, client=client), my_server.url_of(large)
    for _ in range(5):
        with FileSink(large.with_name("sink")) as sink:
            async with trio.open_nursery() as nursery:

                async def cancel(sink: FileSink, scope: trio.CancelScope) -> None:
                    await sink.some_landed.wait()
                    scope.cancel()

                nursery.start_soon(cancel, sink, nursery.cancel_scope)
                await remote.fetch(url, Span(0, LARGE), sink=sink, validator=None)
            landed = sink.spans[-1].stop
            assert landed < LARGE
            # Whatever would still be written must not appear beyond the end of the file.
            os.ftruncate(sink.fd, 0)
            await remote.stat(url)
            assert os.fstat(sink.fd).st_size == 0


async def test_an_engine_that_hangs_holds_nobody(
    my_server: Sshd, large: Path, remote_to: Make, client: str
) -> None:
    """Cancelling ends in bounded time even when the engine does not react."""
    remote, url = remote_to(my_server, client=client), my_server.url_of(large)
    with FileSink(large.with_name("sink")) as sink, trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await sink.some_landed.wait()
                os.kill(engine_pid(), signal.SIGSTOP)
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            await remote.fetch(url, Span(0, LARGE), sink=sink, validator=None)
        assert (await remote.stat(url)).size_bytes == LARGE


async def test_no_byte_of_a_changed_object_lands(
    my_server: Sshd, directory: Path, remote_to: Make
) -> None:
    """The object is rewritten in place while it is fetched."""
    path = directory / "object"
    path.write_bytes(b"o" * LARGE)
    os.utime(path, (1, 1))
    remote, url = remote_to(my_server), my_server.url_of(path)
    with FileSink(directory / "sink") as sink:
        async with trio.open_nursery() as nursery:

            async def rewrite() -> None:
                await sink.some_landed.wait()
                with path.open("r+b") as file:
                    file.write(b"n" * LARGE)

            nursery.start_soon(rewrite)
            with pytest.raises(ObjectChanged):
                await remote.fetch(
                    url, Span(0, LARGE), sink=sink, validator="mtime:1:" + str(LARGE)
                )
        landed = Span(0, sink.spans[-1].stop)
        assert landed.stop < LARGE
        assert sink.bytes_of(landed).count(b"o") == landed.stop


async def test_a_sink_that_takes_no_bytes(my_server: Sshd, large: Path, remote_to: Make) -> None:
    remote, url = remote_to(my_server), my_server.url_of(large)
    with FileSink(Path("/dev/full")) as sink, pytest.raises(CacheFailed, match="No space left"):
        await remote.fetch(url, Span(0, LARGE), sink=sink, validator=None)
    assert (await remote.stat(url)).size_bytes == LARGE
