"""Objects: reading remote bytes through the cache; the one place that knows both sides.

``objects.py`` (class Objects) is the face.  ``content.py`` is one open object, ``contents.py``
the table of them; ``preparing.py`` gets one ready, ``fetching.py`` brings chunks, ``small.py``
small files in batches; ``readahead.py`` decides how far ahead, ``room.py`` keeps the capacity,
``proving.py`` checks declared checksums, ``volatile.py`` holds bytes when the cache disk
cannot; ``asking.py`` asks for versions, ``sharing.py`` is work that several readers wait for.
"""
