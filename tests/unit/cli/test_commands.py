"""Commands: what they take, what they print, how they end, what they import."""

import os
import subprocess
import sys
import termios
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from stagefs_cache import stagefs_cache

from stagefs.cli.main import COMMANDS, run, stagefs
from stagefs.cli.names import as_url, declared_checksum
from stagefs.cli.output import human, print_json_list, progress_bar, shown_name
from stagefs.errors import InvalidName
from stagefs.model import Checksum, ChecksumKind
from stagefs.staging.values import Progress

HEX = "0123456789abcdef" * 4


def test_every_command_is_there_and_helps() -> None:
    runner = CliRunner()
    overview = runner.invoke(stagefs, ["--help"])
    for name in COMMANDS:
        assert f"  {name} " in overview.output
        assert runner.invoke(stagefs, [name, "--help"]).exit_code == 0, name


@pytest.mark.parametrize(
    "name",
    sorted(
        set(COMMANDS)
        - {
            "mount",
            "umount",
            "config",
            "queue",
            "remote",
            "replica",
            "prolog",
            "task-prolog",
            "epilog",
            "burst-buffer",
            "copy",
            "run",
            "sandbox",
            "metrics",
            "doctor",
            "completion",
            "top",
        }
    ),
)
def test_commands_about_a_mount_take_the_same_options(name: str) -> None:
    text = CliRunner().invoke(stagefs, [name, "--help"]).output
    assert "--mount MNT" in text
    assert "--json" in text


def test_copy_takes_the_words_of_scp() -> None:
    """It prints nothing, so it has no --json; the mount is named as elsewhere."""
    text = CliRunner().invoke(stagefs, ["copy", "--help"]).output
    assert "--mount MNT" in text
    for letter in "rpPvFioJcS46CBqAORsT3lXD":
        assert f"-{letter}" in text, letter


@pytest.mark.parametrize("name", sorted(stagefs_cache.commands))
def test_cache_commands_take_the_same_options(name: str) -> None:
    text = CliRunner().invoke(stagefs_cache, [name, "--help"]).output
    assert "--mount MNT" in text
    assert "--json" in text


def test_failure_is_one_sentence_and_its_exit_code(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STAGEFS_MOUNT", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run(stagefs, ["status"])
    assert ended.value.code == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"stagefs: {tmp_path} is no StageFS mount")
    assert captured.err.count("\n") == 1


def test_commands_import_neither_trio_nor_drivers() -> None:
    """What a short command costs: 300 ms with httpx and trio, 80 ms without."""
    code = (
        "import sys\n"
        "from stagefs.cli import cache_live, finding, main, mounting, names, run, seeing\n"
        "heavy = {'trio', 'obstore', 'httpx', 'anyio', 'starlette', 'hypercorn', 'pyfuse3', 'rich',"
        " 'paramiko'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_names_that_are_no_text_are_printed_as_they_are() -> None:
    code = (
        "import os, sys; from stagefs.cli.main import run; import click\n"
        "run(click.Command('x', callback=lambda: click.echo(os.fsdecode(b'caf\\xe9'))), [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
    )
    assert done.stdout == b"caf\xe9\n"


def test_paths_become_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_url("https://host/x") == "https://host/x"
    assert as_url("staging:///x") == "staging:///x"
    assert as_url("a b%c#d") == f"file://{tmp_path}/a%20b%25c%23d"
    assert as_url("/x/../y") == "file:///y"
    assert as_url(os.fsdecode(b"caf\xe9")) == f"file://{tmp_path}/caf%E9"


def test_checksums_are_checked_before_anything_is_asked() -> None:
    assert declared_checksum(sha256=None, md5=None, xxh3=None) is None
    assert declared_checksum(sha256=HEX.upper(), md5=None, xxh3=None) == Checksum(
        ChecksumKind.SHA256, HEX
    )
    for wrong in ({"sha256": HEX[:-1]}, {"md5": "x" * 32}, {"xxh3": HEX}):
        with pytest.raises(InvalidName, match="checksum"):
            declared_checksum(**wrong)
    with pytest.raises(InvalidName, match="one checksum"):
        declared_checksum(sha256=HEX, md5=HEX[:32], xxh3=None)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (300_000, "293 KiB"),
        (1536 << 10, "1.5 MiB"),
        (10 << 30, "10 GiB"),
        ((1 << 30) - 1, "1 GiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert human(size_bytes) == text


def test_list_is_one_json_document(capfd: pytest.CaptureFixture[str]) -> None:
    print_json_list([])
    print_json_list([Progress("a", 1, 2), Progress("b", 2, 2)])
    empty, full = capfd.readouterr().out.split("]\n", 1)
    assert empty == "["
    decoded = msgspec.json.decode(full, type=list[Progress])
    assert [line.what for line in decoded] == ["a", "b"]


def test_names_cannot_write_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_name("a\x1b[2J") == "a\x1b[2J"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert shown_name("a\x1b[2Jé") == "a?[2Jé"


def test_no_bar_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as draw:
        draw(Progress("fetching", 1, 2))
    assert capfd.readouterr().err == ""


def test_bar_on_a_terminal() -> None:
    """In a pseudo-terminal of its own: a bar appears once it is worth it, and goes again."""
    code = (
        "from stagefs.cli import output\n"
        "from stagefs.staging.values import Progress\n"
        "output.BAR_AFTER_S = 0\n"
        "with output.progress_bar() as draw:\n"
        "    draw(Progress('fetching', 1 << 20, 4 << 20))\n"
        "    draw(Progress('fetching', 4 << 20, 4 << 20))\n"
    )
    shown = _on_a_terminal([sys.executable, "-c", code])
    assert b"fetching" in shown
    assert b"4.2/4.2 MB" in shown or b"4.0/4.0 MiB" in shown


def _on_a_terminal(command: list[str]) -> bytes:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    variables = {"PATH": os.defpath, "TERM": "xterm", "LANG": "C.UTF-8"}
    with subprocess.Popen(command, stderr=theirs, env=variables) as child:
        os.close(theirs)
        shown = bytearray()
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:
            pass  # EIO: the other end is closed
    os.close(ours)
    assert child.returncode == 0
    return bytes(shown)
