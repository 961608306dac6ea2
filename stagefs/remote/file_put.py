"""Writing and removing objects of ``file://``: written beside the name, verified, made durable,
then given the name.

A symbolic link of that name is replaced, not followed, as ``mv`` does it.  Without
``overwrite`` the name is given with link(2), which cannot replace, or where the file system
has no hard links with renameat2(RENAME_NOREPLACE).  Runs in worker threads; a call that nobody
waits for any more ends at its next step and removes what it made.
"""

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from itertools import islice

from stagefs.errors import (
    AccessDenied,
    NoSpace,
    NotSupported,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, Checksum
from stagefs.remote.source import Proof, Source, exists, same_content
from stagefs.remote.temporaries import NAMES_MAX, Leftovers, temporary_name, token_of
from stagefs.remote.threads import SourceCall

# The size of one step, of which each is progress and after which a stopped call ends.
STEP_BYTES = 4 * MIB
# So much is written before it is made durable: one fsync of everything could take longer than
# a server may be silent.
DIRTY_BYTES_MAX = 64 * MIB
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class FilePut:
    """One put, in its worker thread."""

    def __init__(
        self,
        call: SourceCall[os.stat_result],
        *,
        url: str,
        path: str,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
    ) -> None:
        self._call = call
        self._url = url
        self._path = path
        self._directory, _, self._name = path.rpartition("/")
        self._directory = self._directory or "/"
        self._overwrite = overwrite
        self._checksum = checksum
        self._mode = mode
        self._source = Source(call.source, url=url, size_bytes=size_bytes)

    def run(self, leftovers: Leftovers) -> os.stat_result:
        """What the new file is.  Raises StageFSError, CallStopped."""
        try:
            if self._is_done():
                # By a try that died before it could remove its temporary file, perhaps.
                self._remove_leftovers(leftovers, token_of(self._url, self._source.fd))
            else:
                self._write(leftovers)
            return os.stat(self._path)
        except OSError as exc:
            raise translated(exc, self._url) from exc

    def _write(self, leftovers: Leftovers) -> None:
        self._make_directories()
        token = token_of(self._url, self._source.fd)
        self._remove_leftovers(leftovers, token)
        with self._temporary(leftovers, token) as (fd, temporary):
            self._copy(fd)
            self._finish(fd)
            self._call.checkpoint()
            self._name_it(temporary)
        _sync_directory(self._directory)

    def _is_done(self) -> bool:
        """Whether an object with this very content is there.  Raises NameExists when one with
        another content is there and may not be replaced."""
        if not os.path.lexists(self._path):
            return False
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path)
            if not stat.S_ISREG(found.st_mode):
                what = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
                raise RemoteError(f"{self._url} is {what}: name a file to write.")
        if self._overwrite:
            return False
        if not self._equals_existing():
            raise exists(self._url)
        return True

    def _equals_existing(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != self._source.size_bytes:
                return False
            return same_content(self._source, fd, at_each_step=self._call.moved)
        finally:
            os.close(fd)

    def _make_directories(self) -> None:
        missing = []
        directory = self._directory
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = directory.rpartition("/")[0] or "/"
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory)
            _sync_directory(directory.rpartition("/")[0] or "/")

    def _remove_leftovers(self, leftovers: Leftovers, token: str) -> None:
        if leftovers.unknown(self._directory):
            # A directory that may be written need not be readable.
            with contextlib.suppress(PermissionError), os.scandir(self._directory) as entries:
                leftovers.add(self._directory, (entry.name for entry in islice(entries, NAMES_MAX)))
            leftovers.looked_through(self._directory)
        for name in leftovers.take(self._directory, token):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._directory}/{name}")

    @contextlib.contextmanager
    def _temporary(self, leftovers: Leftovers, token: str) -> Iterator[tuple[int, str]]:
        name = temporary_name(self._name, token)
        path = f"{self._directory}/{name}"
        fd = os.open(path, _NEW_FILE, 0o666)
        try:
            yield fd, path
        finally:
            os.close(fd)
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError:
                leftovers.add(self._directory, [name])

    def _copy(self, fd: int) -> None:
        size = self._source.size_bytes
        done = dirty = 0
        while done < size:
            count = self._copy_step(fd, done, min(STEP_BYTES, size - done))
            done += count
            dirty += count
            if dirty >= DIRTY_BYTES_MAX:
                self._call.moved()
                os.fdatasync(fd)
                dirty = 0
            self._call.moved(count)

    def _copy_step(self, fd: int, offset: int, length: int) -> int:
        """In the kernel where it can: that shares extents, or lets a server copy.  Errors are met
        again, and told apart, by reading and writing."""
        with contextlib.suppress(OSError):
            count = os.copy_file_range(self._source.fd, fd, length, offset, offset)
            if count:
                return count
        piece = memoryview(self._source.read(offset, min(length, MIB)))
        return os.pwrite(fd, piece, offset)

    def _finish(self, fd: int) -> None:
        """Durable, of the right size, and what was declared."""
        if self._mode is not None:
            os.fchmod(fd, self._mode & 0o777)
        self._call.moved()
        os.fsync(fd)
        stored = os.fstat(fd).st_size
        if stored != self._source.size_bytes:
            raise RemoteUnavailable(
                f"{self._url} was not written: the file system stored {stored} of "
                f"{self._source.size_bytes} bytes; try again."
            )
        if self._checksum is None:
            return
        proof = Proof(self._checksum, url=self._url)
        offset = 0
        while offset < stored:
            piece = os.pread(fd, min(MIB, stored - offset), offset)
            if not piece:
                break
            proof.update(piece)
            offset += len(piece)
            self._call.moved()
        proof.check()

    def _name_it(self, temporary: str) -> None:
        if self._overwrite:
            os.rename(temporary, self._path)
            return
        try:
            os.link(temporary, self._path, follow_symlinks=False)
        except FileExistsError:
            if not self._equals_existing():
                raise exists(self._url) from None
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
            self._rename_without_replacing(temporary)

    def _rename_without_replacing(self, temporary: str) -> None:
        failed = _libc.renameat2(
            _AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(self._path), _RENAME_NOREPLACE
        )
        number = ctypes.get_errno() if failed else 0
        if number == errno.EEXIST:
            if not self._equals_existing():
                raise exists(self._url)
        elif number in (errno.EINVAL, errno.ENOSYS):
            raise NotSupported(
                f"{self._url} was not written: its file system cannot give a name without "
                "replacing one; allow that with --overwrite."
            )
        elif number:
            raise OSError(number, os.strerror(number))


def remove_file(path: str, url: str) -> None:
    """A link of that name goes, not what it leads to.  Raises StageFSError."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise RemoteError(f"{url} is a directory: only objects are removed.")
        os.unlink(path)
        _sync_directory(os.path.dirname(path) or "/")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        kind = _MEANINGS.get(exc.errno or 0, _ANY_OTHER)[0]
        raise kind(f"{url} cannot be removed ({exc.strerror}).") from exc


def _sync_directory(path: str) -> None:
    """Names are durable after this, where the file system allows asking."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # a directory that may be written and searched, but not read
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(fd)


def translated(exc: OSError, url: str) -> StageFSError:
    """What an error of the target's file system means."""
    why = exc.strerror
    kind, sentence = _MEANINGS.get(exc.errno or 0, _ANY_OTHER)
    return kind(sentence.format(url=url, why=why))


_FULL = (NoSpace, "{url} cannot be written ({why}): free space there, and try again.")
_FORBIDDEN = (
    AccessDenied,
    "{url} may not be written ({why}): mend the permissions of its directory.",
)
_NO_DIRECTORY = (RemoteError, "{url} cannot be written: a name above it is no directory.")
_BAD_NAME = (RemoteError, "{url} cannot be written: the file system refuses its name ({why}).")
_NOT_NOW = (RemoteUnavailable, "{url} cannot be written now ({why}).")
_ANY_OTHER = (RemoteError, "{url} cannot be written ({why}).")
_MEANINGS: dict[int, tuple[type[StageFSError], str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _NO_DIRECTORY),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ), _BAD_NAME),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE, errno.EINTR, errno.ETIMEDOUT), _NOT_NOW),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM), _NOT_NOW),
}
