"""The parts of `make dist`.  See relocatable.__main__."""


class DistFailed(Exception):
    """One sentence for who called `make dist`."""
