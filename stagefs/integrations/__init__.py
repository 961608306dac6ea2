"""One module for each system that StageFS serves, over ``control`` only.

A module here imports its system when it is first used, never when it is imported, and says
which versions it was tried with (``TESTED_WITH``).  The one for fsspec imports it at once:
fsspec itself asks for it, when ``staging://`` is first used.
"""
