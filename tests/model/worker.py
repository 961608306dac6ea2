"""Carries out operations in two directories at once and says what each answered.

Run as a program of the mount's user: ``worker.py MOUNTED PLAIN STAGING STAGED``.  Each line of
standard input is an operation, ``[name, argument, ...]`` in JSON; the line that answers it is
what the mounted and the plain directory said, and they are the same unless something is wrong.

STAGING and STAGED hold the same files: what is linked from the one directory is copied from
the other.  A link of a staged or published file is, to the plain directory, a copy for each
name; the attribute user.stagefs.state says which files are shared.
"""

import ctypes
import errno
import hashlib
import json
import mmap
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

# What a test set is older than this; anything later is the time of some change.
SET_NS_MAX = 1_500_000_000 * 10**9
STATE = "user.stagefs.state"
OURS = "user.stagefs."
NO_FLAGS, NOREPLACE, EXCHANGE = 0, 1, 2
AT_FDCWD = -100
WRITES = os.O_WRONLY | os.O_RDWR
_libc = ctypes.CDLL(None, use_errno=True)


def pattern(tag: int, size: int) -> bytes:
    """Bytes that tell where they are and which write they came from."""
    unit = hashlib.sha256(b"%d" % tag).digest()[:31]
    return (unit * (size // len(unit) + 1))[:size]


class Side:
    """One of the two directories, and the files that are open in it."""

    def __init__(self, top: str) -> None:
        self.top = top
        self.open_files: dict[int, int] = {}

    def at(self, path: str) -> str:
        return os.path.join(self.top, path)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self.at(path))

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.at(path))

    def readlink(self, path: str) -> str:
        return os.readlink(self.at(path))

    def mkfifo(self, path: str, mode: int) -> None:
        os.mkfifo(self.at(path), mode)

    def mknod(self, path: str, mode: int) -> None:
        os.mknod(self.at(path), stat.S_IFREG | mode)

    def chmod(self, path: str, mode: int) -> None:
        """Directories stay open to the owner: what is in them is to be looked at."""
        more = 0o700 if os.path.isdir(self.at(path)) else 0
        os.chmod(self.at(path), mode | more)

    def utimens(self, path: str, atime_ns: int, mtime_ns: int) -> list[int]:
        os.utime(self.at(path), ns=(atime_ns, mtime_ns))
        found = os.stat(self.at(path))
        return [found.st_atime_ns, found.st_mtime_ns]

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.at(path), size)

    def link(self, old: str, new: str) -> None:
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def rename(self, old: str, new: str, flags: int) -> None:
        names = os.fsencode(self.at(old)), os.fsencode(self.at(new))
        if _libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    def setxattr(self, path: str, name: str, value: str, flags: int) -> None:
        os.setxattr(self.at(path), name, value.encode(), flags)

    def getxattr(self, path: str, name: str) -> str:
        return os.getxattr(self.at(path), name).decode()

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.at(path), name)

    def listxattr(self, path: str, *, follow: bool = True) -> list[str]:
        names = os.listxattr(self.at(path), follow_symlinks=follow)
        # Of all names a security module may have given, those of users.
        return sorted(n for n in names if n.startswith("user.") and not n.startswith(OURS))

    def readdir(self, path: str) -> list[list[object]]:
        with os.scandir(self.at(path)) as entries:
            return sorted(
                [e.name, e.is_dir(follow_symlinks=False), e.is_symlink()] for e in entries
            )

    def put(self, path: str, tag: int, offset: int, size: int, flags: int) -> int:
        fd = os.open(self.at(path), os.O_WRONLY | os.O_NONBLOCK | flags, 0o644)
        try:
            return os.pwrite(fd, pattern(tag, size), offset)
        finally:
            os.close(fd)

    def append(self, path: str, tag: int, size: int) -> int:
        fd = os.open(self.at(path), os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND)
        try:
            # At the end all the same: the offset of a call does not count then.
            return os.pwrite(fd, pattern(tag, size), 0)
        finally:
            os.close(fd)

    def get(self, path: str, offset: int, size: int) -> str:
        fd = os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            data = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"

    def mapped(self, path: str, tag: int, offset: int, size: int, sync: bool) -> int:
        """Write through a mapping, inside the file.  Not to a program with set-id bits, which loses
        them in the mount only (docs/SEMANTICS.md)."""
        with open(self.at(path), "r+b", buffering=0, opener=_nonblocking) as file:
            status = os.fstat(file.fileno())
            length = status.st_size
            if not length or status.st_mode & (stat.S_ISUID | stat.S_ISGID):
                return 0
            offset %= length
            data = pattern(tag, min(size, length - offset))
            with mmap.mmap(file.fileno(), length) as memory:
                memory[offset : offset + len(data)] = data
                if sync:
                    memory.flush()
            return len(data)

    # Open files

    def open(self, slot: int, path: str, flags: int, mode: int) -> None:
        fd = os.open(self.at(path), flags | os.O_NONBLOCK, mode)
        self.close(slot)
        self.open_files[slot] = fd

    def _fd(self, slot: int) -> int:
        if slot not in self.open_files:
            raise OSError(errno.EBADF, "not open")
        return self.open_files[slot]

    def close(self, slot: int) -> None:
        if slot in self.open_files:
            os.close(self.open_files.pop(slot))

    def pwrite(self, slot: int, tag: int, offset: int, size: int) -> int:
        return os.pwrite(self._fd(slot), pattern(tag, size), offset)

    def pread(self, slot: int, offset: int, size: int) -> str:
        data = os.pread(self._fd(slot), size, offset)
        return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)

    def fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._fd(slot), mode)

    def fstat(self, slot: int) -> list[object]:
        found = os.fstat(self._fd(slot))
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        return [stat.filemode(found.st_mode), size, found.st_nlink == 0]

    # All of it

    def tree(self) -> Iterator[str]:
        for directory, names, files in os.walk(self.top, onerror=_raise):
            for name in names + files:
                yield os.path.relpath(os.path.join(directory, name), self.top)

    def facts(self, path: str) -> dict[str, object]:
        found = os.lstat(self.at(path))
        facts: dict[str, object] = {
            "mode": stat.filemode(found.st_mode),
            "nlink": found.st_nlink,
            "mtime": found.st_mtime_ns if found.st_mtime_ns < SET_NS_MAX else "now",
            "owner": [found.st_uid, found.st_gid],
        }
        if not stat.S_ISDIR(found.st_mode):
            facts["size"] = found.st_size
        if stat.S_ISLNK(found.st_mode):
            facts["target"] = os.readlink(self.at(path))
        elif os.access(self.at(path), os.R_OK):
            facts["xattrs"] = [
                [name, self.getxattr(path, name)] for name in self.listxattr(path, follow=False)
            ]
            if stat.S_ISREG(found.st_mode):
                with open(self.at(path), "rb") as file:
                    facts["content"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return facts


class Both:
    def __init__(self, mounted: str, plain: str, staging: str, staged: str) -> None:
        self.mounted = Side(mounted)
        self.plain = Side(plain)
        self.staging = staging
        self.staged = staged

    def apply(self, name: str, *arguments: Any) -> list[object]:
        special = getattr(self, f"_{name}", None)
        if special is not None:
            answers = special(*arguments)
            assert isinstance(answers, list)
            return answers
        return self._each(name, *arguments)

    def _each(self, name: str, *arguments: Any) -> list[object]:
        return [_answer(getattr(side, name), *arguments) for side in (self.mounted, self.plain)]

    def shared(self, path: str) -> bool:
        """Whether the kernel has one inode for this name and others that do not follow it."""
        where = self.mounted.at(path)
        try:
            if not stat.S_ISREG(os.lstat(where).st_mode):
                return False
            return os.getxattr(where, STATE) != b"private"
        except OSError:
            return False

    def _stage(self, number: int, path: str) -> list[object]:
        """A link of a staged file; a copy of it."""

        def copied() -> None:
            target = self.plain.at(path)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            shutil.copy2(f"{self.staged}/{number}", target)

        return [
            _answer(os.link, f"{self.staging}/{number}", self.mounted.at(path)),
            _answer(copied),
        ]

    def _publish(self, path: str, name: str) -> list[object]:
        """All names of a file become links of what is published; copies of it, once more."""
        writing = self._is_written(self.plain.at(path))
        # Only what both can do; the errors of link are tried elsewhere.
        if not stat.S_ISREG(_mode(self.mounted.at(path))) or self.shared(path):
            return ["nothing", "nothing"]
        found = _answer(
            lambda: os.link(self.mounted.at(path), f"{self.staging}/{name}", follow_symlinks=False)
        )
        if found is None:
            self._separate(self.plain.at(path))
        return [found, "EBUSY" if writing else None]

    def _is_written(self, path: str) -> bool:
        try:
            wanted = os.lstat(path)
        except OSError:
            return False
        for fd in self.plain.open_files.values():
            flags = int(_line(f"/proc/self/fdinfo/{fd}", "flags:"), 8)
            if flags & WRITES and os.path.samestat(os.fstat(fd), wanted):
                return True
        return False

    def _separate(self, path: str) -> None:
        wanted = os.lstat(path)
        for other in list(self.plain.tree()):
            where = self.plain.at(other)
            if os.path.samestat(os.lstat(where), wanted):
                directory = os.path.dirname(where)
                times = os.stat(directory)
                fresh = f"{self.plain.top}.fresh"
                shutil.copy2(where, fresh)
                os.rename(fresh, where)
                os.utime(directory, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _link(self, old: str, new: str) -> list[object]:
        if not self.shared(old):
            return self._each("link", old, new)

        def copied() -> None:
            self.plain.link(old, new)
            os.unlink(self.plain.at(new))
            shutil.copy2(self.plain.at(old), self.plain.at(new))

        return [_answer(self.mounted.link, old, new), _answer(copied)]

    def _rename(self, old: str, new: str, flags: int) -> list[object]:
        """Between two names of one file nothing happens."""
        same = self.shared(old) and self.shared(new) and self._same(old, new)
        if same and flags != NOREPLACE:
            return [_answer(self.mounted.rename, old, new, flags), None]
        return self._each("rename", old, new, flags)

    def _same(self, one: str, other: str) -> bool:
        return os.path.samestat(os.lstat(self.mounted.at(one)), os.lstat(self.mounted.at(other)))

    def _truncate(self, path: str, size: int) -> list[object]:
        """To the size it has: a shared file needs no copy for that, and keeps its times."""
        where = os.path.realpath(self.mounted.at(path))
        if self.shared(where) and os.stat(where).st_size == size:
            answer = _answer(self.mounted.truncate, path, size)
            return [answer, answer]
        return self._each("truncate", path, size)

    def _open(self, slot: int, path: str, flags: int, mode: int) -> list[object]:
        """A reader that opened before a copy was made keeps what it had."""
        answers = self._each("open", slot, path, flags, mode)
        if answers == [None, None] and not flags & WRITES:
            where = f"/proc/self/fd/{self.mounted.open_files[slot]}"
            if stat.S_ISREG(os.stat(where).st_mode) and os.getxattr(where, STATE) != b"private":
                fresh = f"{self.plain.top}.fresh"
                shutil.copy2(f"/proc/self/fd/{self.plain.open_files[slot]}", fresh)
                self.plain.close(slot)
                self.plain.open_files[slot] = os.open(fresh, flags | os.O_NONBLOCK)
                os.unlink(fresh)
        return answers

    def _fstat(self, slot: int) -> list[object]:
        """Whether it has a name still can be compared for files that are nobody else's."""
        answers = self._each("fstat", slot)
        if slot in self.mounted.open_files:
            where = f"/proc/self/fd/{self.mounted.open_files[slot]}"
            if stat.S_ISREG(os.stat(where).st_mode) and os.getxattr(where, STATE) != b"private":
                return [answer[:2] for answer in answers if isinstance(answer, list)]
        return answers

    def _facts(self) -> list[object]:
        """Of every name; of links, how many there are is not comparable."""
        found: list[object] = []
        for side in (self.mounted, self.plain):
            said = {path: side.facts(path) for path in sorted(side.tree())}
            for path, facts in said.items():
                if self.shared(path):
                    facts["nlink"] = "shared"
            found.append(said)
        return found

    def _staged(self) -> list[object]:
        """What is staged never changes."""
        found: list[object] = []
        for directory in (self.staging, self.staged):
            side = Side(directory)
            names = sorted(os.listdir(self.staged))
            found.append([side.get(name, 0, 1 << 30) for name in names])
        return found


def _raise(error: OSError) -> None:
    raise error


def _answer(function: Callable[..., object], *arguments: Any) -> object:
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _line(path: str, word: str) -> str:
    with open(path) as file:
        return next(line.split()[1] for line in file if line.startswith(word))


def _nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def main() -> None:
    os.umask(0o022)
    both = Both(*sys.argv[1:])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(both.apply(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
