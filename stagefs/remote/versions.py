"""Whether an answer is about a given version: validators compared as far as they can be.

A listing often knows less than an answer about one object: an http index has modification
time and size (``modified:<s>:<bytes>:<weak etag>``) where a HEAD has an ETag too.  Raw
fingerprints of different kinds are never compared; what both tell is.
"""

from stagefs.model import ObjectInfo

MODIFIED = "modified:"


def is_version(answer: ObjectInfo, validator: str) -> bool:
    """Whether ``answer`` is of the version that ``validator`` stands for, as far as it tells."""
    if answer.validator == validator:
        return True
    if not validator.startswith(MODIFIED):
        return False
    _, modified, size, tag = validator.split(":", 3)
    found = "" if answer.mtime_ns is None else str(answer.mtime_ns // 1_000_000_000)
    found_tag = answer.validator.split(":", 3)[3] if answer.validator.startswith(MODIFIED) else ""
    same_tag = not tag or not found_tag or tag == found_tag
    return same_tag and (modified, size) == (found, str(answer.size_bytes))
