"""Content that must not be lost: files written here, and the queue of what is to be uploaded.

``local`` keeps the real files of the workspace; ``queue`` is the durable list of uploads, with
their files.  Neither knows how a byte gets to a remote: that is ``staging.stageout``'s.
"""
