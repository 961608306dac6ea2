"""What tasks of PyOpus do; a worker imports it by its name."""

import hashlib
import os
import signal
from pathlib import Path


def tree(_vm: object) -> dict[str, str]:
    """Everything below the task's directory."""
    found = {}
    for path in sorted(Path().rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[str(path)] = "directory"
        else:
            mode = os.access(path, os.X_OK)
            found[str(path)] = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {mode}"
    return found


def digest(_vm: object, name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def append(_vm: object, name: str) -> str:
    with open(name, "a") as changed:
        changed.write("of this task\n")
    return Path(name).read_text()


def count(_vm: object) -> dict[str, object]:
    """How often a task worked in this directory, and what they made of the input."""
    with open("counted", "a") as counted:
        counted.write("x")
    changed = append(_vm, "input.txt")
    return {
        "times": len(Path("counted").read_text()),
        "input": changed.count("of this task"),
        "number": f"{os.getpid():x}",
        "directory": str(Path.cwd()),
    }


def fall(_vm: object, begun: str) -> None:
    Path(begun).write_text(str(Path.cwd()))
    raise ValueError("the task failed")


def die(_vm: object, begun: str) -> None:
    Path(begun).write_text(str(Path.cwd()))
    os.kill(os.getpid(), signal.SIGKILL)
