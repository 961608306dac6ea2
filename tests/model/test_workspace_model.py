"""Any sequence of operations in a mount answers and leaves what it does in a plain directory.

Links of staged files are in it, which to the plain directory are copies; so is publishing, and
in one of the runs the daemon dies by SIGKILL between operations.
"""

import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model import worker
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import content

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
LONG = settings.get_current_profile_name() == "long"
STAGED_SIZES = (0, 10, 5000, MIB + 5, 5 * MIB // 2)
STAGED_TIME_S = 1_300_000_000
SLOTS = st.integers(0, 2)
NAMES = st.sampled_from(["a", "b", "c"])
# Two files that are linked are always there to be written to.
PATHS = st.one_of(
    st.sampled_from(["s", "t"]), NAMES, st.builds("/".join, st.lists(NAMES, min_size=2, max_size=3))
)
TAGS = st.integers(0, 255)
OFFSETS = st.one_of(
    st.integers(0, 9000), st.sampled_from([4095, MIB - 1, MIB, 2 * MIB - 7, 3 * MIB])
)
SIZES = st.one_of(st.integers(0, 9000), st.sampled_from([4096, MIB, MIB + 1]))
FILE_MODES = st.sampled_from([0o644, 0o600, 0o755, 0o444, 0o4755, 0o2755])
DIRECTORY_MODES = st.sampled_from([0o755, 0o700, 0o2755, 0o1777])
# An atime of 0 becomes 1 ns.
TIMES = st.integers(1, worker.SET_NS_MAX - 1)
XATTRS = st.sampled_from(["user.a", "user.b"])
OPEN_FLAGS = st.builds(
    lambda access, more: access | more,
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]),
    st.sampled_from(
        [0, 0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_APPEND, os.O_TRUNC, os.O_NOFOLLOW]
    ),
).filter(lambda flags: flags & worker.WRITES or not flags & os.O_TRUNC)


class Worker:
    """The program that carries out operations, and the directories it does it in."""

    def __init__(self, mount: Mounted, top: Path) -> None:
        self.mount = mount
        self._top = top
        self.number = 0
        self._child: subprocess.Popen[bytes] | None = None
        staged = mount.identity.directory(top / "staged")
        for number, size in enumerate(STAGED_SIZES):
            path = staged / str(number)
            path.write_bytes(content(size))
            path.chmod(0o644)
            os.chown(path, mount.identity.uid, mount.identity.gid)
            os.utime(path, (STAGED_TIME_S, STAGED_TIME_S))
            mount.stage_in(f"file://{path}", f"model/{number}")
        mount.identity.directory(top / "plain")

    def begin(self) -> None:
        """Two empty directories."""
        self.number += 1
        number = self.number
        plain = self.mount.identity.directory(self._top / f"plain/{number}")
        self.mount.run("mkdir", f"MNT/tasks/{number}")
        self._child = self.mount.start(
            *("python", "-c", Path(worker.__file__).read_text()),
            *(f"MNT/tasks/{number}", plain, "MNT/staging/model", self._top / "staged"),
            talks=True,
        )

    def ask(self, *operation: object) -> tuple[Any, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(operation).encode() + b"\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            raise AssertionError(f"{operation}: {self.end()}")
        mounted, plain = json.loads(line)
        return mounted, plain

    def end(self) -> str:
        """What it complained of."""
        child, self._child = self._child, None
        if child is None:
            return ""
        try:
            _output, errors = child.communicate(timeout=60)
        finally:
            child.kill()
            child.wait()
        return errors.decode()


class WorkspaceMachine(RuleBasedStateMachine):
    directories: Worker
    kills_max = 0

    def __init__(self) -> None:
        super().__init__()
        self.kills = 0
        self.published = itertools.count()
        self.directories.begin()

    def teardown(self) -> None:
        try:
            self.look()
            self.same("staged")
        finally:
            complaints = self.directories.end()
        assert not complaints

    def same(self, *operation: object) -> None:
        mounted, plain = self.directories.ask(*operation)
        if mounted == plain:
            return
        if isinstance(mounted, dict) and isinstance(plain, dict):
            for path in sorted(mounted.keys() | plain.keys()):
                found, wanted = mounted.get(path), plain.get(path)
                assert found == wanted, f"{path} in the mount, and in a plain directory"
        assert mounted == plain, f"{operation} in the mount, and in a plain directory"

    @initialize(one=st.integers(0, 4), other=st.integers(0, 4), more=st.booleans())
    def begin_with_something(self, one: int, other: int, more: bool) -> None:
        self.same("stage", one, "s")
        self.same("stage", other, "t")
        self.same("mkdir", "a", 0o755)
        if more:
            self.same("stage", one, "a/b")
            self.same("put", "c", 1, 0, 10_000, os.O_CREAT)

    @rule()
    def look(self) -> None:
        self.same("facts")

    @precondition(lambda self: self.kills < self.kills_max)
    @rule()
    def kill(self) -> None:
        self.kills += 1
        self.directories.mount.kill_daemon()
        self.same("facts")

    @rule(number=st.integers(0, len(STAGED_SIZES) - 1), path=PATHS)
    def stage(self, number: int, path: str) -> None:
        self.same("stage", number, path)

    @rule(path=PATHS)
    def publish(self, path: str) -> None:
        self.same("publish", path, f"p{self.directories.number}-{next(self.published)}")

    @rule(path=PATHS, mode=DIRECTORY_MODES)
    def mkdir(self, path: str, mode: int) -> None:
        self.same("mkdir", path, mode)

    @rule(name=st.sampled_from(["rmdir", "unlink", "readlink", "readdir", "listxattr"]), path=PATHS)
    def of_a_path(self, name: str, path: str) -> None:
        self.same(name, path)

    @rule(leads=st.sampled_from(["a", "b", "a/b", "s", "missing", "."]), path=PATHS)
    def symlink(self, leads: str, path: str) -> None:
        self.same("symlink", leads, path)

    @rule(name=st.sampled_from(["mkfifo", "mknod", "chmod"]), path=PATHS, mode=FILE_MODES)
    def with_a_mode(self, name: str, path: str, mode: int) -> None:
        self.same(name, path, mode)

    @rule(path=PATHS, atime_ns=TIMES, mtime_ns=TIMES)
    def utimens(self, path: str, atime_ns: int, mtime_ns: int) -> None:
        self.same("utimens", path, atime_ns, mtime_ns)

    @rule(path=PATHS, size=OFFSETS)
    def truncate(self, path: str, size: int) -> None:
        self.same("truncate", path, size)

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        self.same("link", old, new)

    @rule(
        old=PATHS,
        new=PATHS,
        flags=st.sampled_from(
            [worker.NO_FLAGS, worker.NO_FLAGS, worker.NOREPLACE, worker.EXCHANGE]
        ),
    )
    def rename(self, old: str, new: str, flags: int) -> None:
        self.same("rename", old, new, flags)

    @rule(
        path=PATHS,
        name=XATTRS,
        value=st.sampled_from(["", "v", "w" * 200]),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, path: str, name: str, value: str, flags: int) -> None:
        self.same("setxattr", path, name, value, flags)

    @rule(what=st.sampled_from(["getxattr", "removexattr"]), path=PATHS, name=XATTRS)
    def of_an_xattr(self, what: str, path: str, name: str) -> None:
        self.same(what, path, name)

    @rule(
        path=PATHS,
        tag=TAGS,
        offset=OFFSETS,
        size=SIZES,
        flags=st.sampled_from([0, os.O_CREAT, os.O_TRUNC, os.O_CREAT | os.O_EXCL]),
    )
    def put(self, path: str, tag: int, offset: int, size: int, flags: int) -> None:
        self.same("put", path, tag, offset, size, flags)

    @rule(path=PATHS, tag=TAGS, size=SIZES)
    def append(self, path: str, tag: int, size: int) -> None:
        self.same("append", path, tag, size)

    @rule(path=PATHS, offset=OFFSETS, size=SIZES)
    def get(self, path: str, offset: int, size: int) -> None:
        self.same("get", path, offset, size)

    @rule(path=PATHS, tag=TAGS, offset=OFFSETS, size=SIZES, sync=st.booleans())
    def mapped(self, path: str, tag: int, offset: int, size: int, sync: bool) -> None:
        self.same("mapped", path, tag, offset, size, sync)

    # Open files

    @rule(slot=SLOTS, path=PATHS, flags=OPEN_FLAGS, mode=FILE_MODES)
    def open(self, slot: int, path: str, flags: int, mode: int) -> None:
        self.same("open", slot, path, flags, mode)

    @rule(slot=SLOTS, tag=TAGS, offset=OFFSETS, size=SIZES)
    def pwrite(self, slot: int, tag: int, offset: int, size: int) -> None:
        self.same("pwrite", slot, tag, offset, size)

    @rule(slot=SLOTS, offset=OFFSETS, size=SIZES)
    def pread(self, slot: int, offset: int, size: int) -> None:
        self.same("pread", slot, offset, size)

    @rule(slot=SLOTS, size=OFFSETS)
    def ftruncate(self, slot: int, size: int) -> None:
        self.same("ftruncate", slot, size)

    @rule(name=st.sampled_from(["close", "fsync", "fstat"]), slot=SLOTS)
    def of_an_open_file(self, name: str, slot: int) -> None:
        self.same(name, slot)


@pytest.fixture
def directories(identity: Identity, new_mount: MakeMount, work: Path) -> Iterator[Worker]:
    made = Worker(new_mount(identity), identity.directory(work / "model"))
    yield made
    made.end()


@pytest.mark.timeout(100_000 if LONG else 180)
@pytest.mark.parametrize("kills_max", [0, 2], ids=["undisturbed", "killed"])
def test_same_as_a_plain_directory(directories: Worker, kills_max: int) -> None:
    class Machine(WorkspaceMachine):
        pass

    Machine.directories = directories
    Machine.kills_max = kills_max
    examples = 8 if kills_max else 40
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=settings().max_examples if LONG else examples,
            stateful_step_count=80 if LONG else 50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
