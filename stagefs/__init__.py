"""StageFS: a staging filesystem for pilots and workflows.  See docs/SEMANTICS.md."""

__version__ = "0.1.0"
