"""What ``command://`` promises beyond the contract: programs are run as they stand, and ended."""

import os
from pathlib import Path

import msgspec
import pytest
import trio

from stagefs.config import CommandSettings
from stagefs.errors import (
    AccessDenied,
    InvalidUrl,
    NameExists,
    NotSupported,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import Span
from stagefs.remote.command import CommandRemote
from stagefs.remote.credentials import CredentialStore
from tests.contract.subjects import SETTINGS
from tests.contract.test_put import put_bytes
from tests.contract.test_remote_contract import fetched
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


def remote(tmp_path: Path, table: str, *, name: str = "tape") -> CommandRemote:
    programs = tmp_path / "programs.toml"
    programs.write_text(table)
    programs.chmod(0o644)
    command = CommandSettings(programs=str(programs))
    settings = msgspec.structs.replace(SETTINGS, command=command)
    return CommandRemote(f"command://{name}", settings, CredentialStore(None))


def failing(tmp_path: Path, code: int, said: str = "") -> CommandRemote:
    script = tmp_path / f"fails{code}"
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' 'earlier' '{said}' >&2\nexit {code}\n")
    script.chmod(0o755)
    return remote(tmp_path, f'[tape]\nstat = ["{script}"]\nget = ["{script}"]\n')


async def test_no_shell_sees_the_words(tmp_path: Path) -> None:
    echo = tmp_path / "echo"
    echo.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >{tmp_path}/said\necho 1 v\n')
    echo.chmod(0o755)
    driver = remote(tmp_path, f'[tape]\nstat = ["{echo}", "{{path}}", "a {{url}}"]\nget = ["x"]\n')
    await driver.stat("command://tape/$(id);`id`%20{url}%0A")
    said = (tmp_path / "said").read_text()
    assert said == ("/$(id);`id` {url}\n|a command://tape/$(id);`id`%20{url}%0A|"), (
        "words were interpreted, or replaced twice"
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (66, ObjectMissing),
        (73, NameExists),
        (77, AccessDenied),
        (75, RemoteUnavailable),
        (69, RemoteUnavailable),
        (3, RemoteError),
    ],
)
async def test_exit_codes(tmp_path: Path, code: int, error: type[StageFSError]) -> None:
    driver = failing(tmp_path, code, "the robot is on strike")
    with pytest.raises(error) as caught:
        await driver.stat("command://tape/x")
    assert type(caught.value) is error
    assert "the robot is on strike" in str(caught.value)
    assert "earlier" not in str(caught.value)


@pytest.mark.parametrize("answer", ["", "12", "x v", "1 v more", "-1 v"])
async def test_a_stat_program_that_prints_something_else(tmp_path: Path, answer: str) -> None:
    driver = remote(tmp_path, f'[tape]\nstat = ["echo", "{answer}"]\nget = ["x"]\n')
    with pytest.raises(RemoteError, match="neither SIZE and VERSION"):
        await driver.stat("command://tape/x")


async def test_a_get_program_that_prints_too_little_or_too_much(tmp_path: Path) -> None:
    for text, error in (("1234", RemoteUnavailable), ("1234567", RemoteError)):
        driver = remote(
            tmp_path, f'[tape]\nstat = ["echo", "9", "v"]\nget = ["printf", "{text}"]\n'
        )
        with pytest.raises(error):
            await fetched(driver, "command://tape/x", Span(0, 6), tmp_path / "sink")


async def test_a_program_ends_with_its_call(tmp_path: Path) -> None:
    """And so does what it has started."""
    script = tmp_path / "stalls"
    script.write_text(
        f"#!/bin/sh\nsleep 1000 &\necho $! >{tmp_path}/new\n"
        f"mv {tmp_path}/new {tmp_path}/pid\nwait\n"
    )
    script.chmod(0o755)
    driver = remote(tmp_path, f'[tape]\nstat = ["{script}"]\nget = ["x"]\n')
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.stat, "command://tape/x")
        await trio.to_thread.run_sync(wait_until, (tmp_path / "pid").exists, "the program")
        nursery.cancel_scope.cancel()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not _lives(pid), "the end of what the program started")


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_what_is_not_configured(tmp_path: Path) -> None:
    driver = remote(tmp_path, '[tape]\nstat = ["echo", "1 v"]\nget = ["x"]\n')
    with pytest.raises(NotSupported, match="no list program"):
        await anext(driver.list("command://tape/x"))
    with pytest.raises(NotSupported, match="no put program"):
        await put_bytes(driver, "command://tape/x", b"1", tmp_path / "source", overwrite=True)
    with pytest.raises(RemoteError, match="cannot be run"):
        await fetched(driver, "command://tape/x", Span(0, 1), tmp_path / "sink")


def test_files_of_programs(tmp_path: Path) -> None:
    good = '[tape]\nstat = ["x"]\nget = ["x"]\n'
    with pytest.raises(InvalidUrl, match=r"no table \[disk\]"):
        remote(tmp_path, good, name="disk")
    for table, said in (
        ("[tape", "not TOML"),
        ('[tape]\nstat = ["x"]\n', "not usable"),
        (good + 'fetch = ["x"]\n', "not usable"),
        ('[tape]\nstat = "x"\nget = ["x"]\n', "not usable"),
    ):
        with pytest.raises(RemoteError, match=said):
            remote(tmp_path, table)
    with pytest.raises(InvalidUrl, match=r"\[remote.command\] programs"):
        CommandRemote("command://tape", SETTINGS, CredentialStore(None))


def test_a_file_that_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    programs = tmp_path / "programs.toml"
    programs.write_text('[tape]\nstat = ["x"]\nget = ["x"]\n')
    os.chmod(programs, 0o666)
    command = CommandSettings(programs=str(programs))
    settings = msgspec.structs.replace(SETTINGS, command=command)
    with pytest.raises(RemoteError, match="not trusted"):
        CommandRemote("command://tape", settings, CredentialStore(None))
