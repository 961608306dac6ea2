"""Copying with scp's words: what ``stagefs copy`` starts, ``python -m stagefs.copying``."""
