"""Mounts made by the supervisor with the tiny daemon, for tests of the supervisor alone."""

from tests.support.fuse_fixtures import new_supervised

__all__ = ["new_supervised"]
