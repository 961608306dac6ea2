"""File-system semantics on plain values: what lookup, open, read, link, rename mean here.

``vfs.py`` (class Vfs) is the face that the FUSE layer calls; ``bindings.py`` shows remote
directories; ``virtual.py`` is ``.stagefs/``; ``attributes.py`` the ``user.stagefs.*`` names.
Knows no FUSE binding.
"""
