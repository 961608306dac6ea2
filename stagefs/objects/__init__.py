"""Objects: reading remote bytes through the cache.

The one place that knows both the cache and the remotes.  ``objects.py`` (class Objects) is
the face; ``content.py`` is one open object; ``readahead.py`` decides what to fetch and when;
``volatile.py`` holds bytes in memory when the cache disk cannot; ``small.py`` fetches small
files in batches.
"""
