"""Holds the FUSE device of one mount, so that the mount outlives its daemon.

For: mounting, answering the kernel's INIT, starting a daemon, starting the next one when
it dies (with every request that was in flight), unmounting at the end of a lifetime.
Not for: anything about files.  It reads no configuration, imports nothing of StageFS and
is imported by nothing: it is run as ``python -m stagefs.supervisor`` and must go on when
everything else is broken.

One thread, one poll loop (``loop.Supervisor``).  Anything that can block in the kernel
(stat on a mount, umount) is done in a forked child with a deadline (``children``).
"""
