"""Which new directories are sandboxes: those in ``tasks/``, and those that a pattern of
``[workspace] sandbox_roots`` matches (pilots that lay out their own directories).

Trio thread, never waits.
"""

from stagefs import globs
from stagefs.config import WorkspaceSettings
from stagefs.errors import InvalidConfig
from stagefs.model import Inode
from stagefs.namespace.node import TASKS_INODE, SandboxRow
from stagefs.namespace.store import Namespace

ACTIVE = "active"


class SandboxRoots:
    def __init__(self, namespace: Namespace, settings: WorkspaceSettings) -> None:
        """Raises InvalidConfig for a pattern that can match no directory."""
        self._namespace = namespace
        self._patterns = parse_roots(settings.sandbox_roots)
        self._row = SandboxRow(state=ACTIVE, on_write=settings.on_write, lifetime="task")

    def row(self, parent: Inode, name: str) -> SandboxRow | None:
        """What to keep of the new directory ``name``; None when it is no sandbox."""
        if parent == TASKS_INODE:
            return self._row
        if not self._patterns:
            return None
        path = (*self._namespace.path(parent).strip("/").split("/"), name)
        path = path[1:] if not path[0] else path
        return self._row if any(pattern.matches(path) for pattern in self._patterns) else None


def parse_roots(text: str | None) -> list[globs.Glob]:
    """Patterns of paths in the mount, separated by commas.  Raises InvalidConfig."""
    words = [word.strip().strip("/") for word in (text or "").split(",")]
    try:
        return [globs.parse(word) for word in words if word]
    except ValueError as exc:
        raise InvalidConfig(f"workspace.sandbox_roots = {text}: {exc}.") from exc
