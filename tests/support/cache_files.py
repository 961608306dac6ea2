"""The files of a cache directory, for tests that damage them."""

from pathlib import Path

TRAILER_BYTES_MAX = 64 << 10


def object_file(cache: Path, size_bytes: int) -> Path:
    """The file of the one object of that size: data first, a small trailer behind."""
    found = [
        path
        for path in (cache / "objects").rglob("*")
        if path.is_file() and size_bytes < path.stat().st_size < size_bytes + TRAILER_BYTES_MAX
    ]
    assert len(found) == 1, found
    return found[0]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def disk_bytes(directory: Path) -> int:
    """What the files really take."""
    total = 0
    for path in directory.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # evicted while we look
            continue
        total += status.st_blocks * 512
    return total
