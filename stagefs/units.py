"""Sizes and times as people write them: ``10GiB``, ``30s``.  Pure functions on text."""

import re

_SIZE_UNITS = {
    "": 1, "B": 1,
    "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_DURATION_UNITS = {
    "ms": 0.001,
    "": 1.0,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """``10GiB`` (also 10G), ``500MB`` (decimal) or plain bytes.  Raises ValueError."""
    match = _NUMBER.fullmatch(text)
    unit = _SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size: write a number with KiB, MiB, GiB or TiB")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def parse_duration(text: str) -> float:
    """``30s``, ``250ms``, ``5m``, ``2h``, ``1d`` or plain seconds.  Raises ValueError."""
    match = _NUMBER.fullmatch(text)
    unit = _DURATION_UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no duration: write a number with ms, s, m, h or d")
    return float(match[1]) * unit


def size_text(size_bytes: int) -> str:
    """The shortest exact text of a size: ``1MiB``, ``1536KiB``, ``1000B``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        factor = _SIZE_UNITS[unit.upper()]
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"
