"""Remotes: one interface (base.py), one file per protocol, wrappers for retry and limits."""
