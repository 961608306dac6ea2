"""Patterns of outputs: what they match, compared with Python's own glob on real directories."""

import glob
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagefs import globs

NAMES = st.sampled_from(["a", "b", "ab", ".h", "a.b", "[x]", "x*"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(tuple)
PATTERN_PARTS = st.sampled_from(["a", "*", "?", "**", "a*", "[ab]", ".*", "*.b", "[[]x]", "[!a]"])
PATTERNS = st.lists(PATTERN_PARTS, min_size=1, max_size=4)


@given(st.sets(PATHS, max_size=12), PATTERNS)
def test_matches_what_the_shell_would(paths: set[tuple[str, ...]], parts: list[str]) -> None:
    if parts[-1] == "**":
        parts = [*parts, "*"]
    with tempfile.TemporaryDirectory() as top:
        for path in paths:
            Path(top, *path).mkdir(parents=True, exist_ok=True)
        there = {tuple(path.relative_to(top).parts) for path in Path(top).rglob("*")}
        expected = {
            tuple(Path(found).parts)
            for found in glob.glob("/".join(parts), root_dir=top, recursive=True)
        }
    pattern = globs.parse("/".join(parts))
    assert {path for path in there if pattern.matches(path)} == expected


@given(PATHS, PATTERNS)
def test_pruning_loses_nothing(path: tuple[str, ...], parts: list[str]) -> None:
    pattern = globs.parse("/".join(parts))
    if pattern.matches(path):
        for count in range(len(path)):
            assert pattern.may_match_below(path[:count])


def test_pruning_prunes() -> None:
    pattern = globs.parse("out/*/x")
    assert pattern.may_match_below(())
    assert pattern.may_match_below(("out", "1"))
    assert not pattern.may_match_below(("in",))
    assert not pattern.may_match_below(("out", "1", "x"))


def test_depth_at_the_end_is_everything_below() -> None:
    assert globs.parse("out/**").matches(("out", "a", "b"))
    assert not globs.parse("out/**").matches(("out",))
    assert globs.parse("**").matches(("a", "b", "c"))
    assert not globs.parse("**").matches((".git", "config"))


def test_literal() -> None:
    assert globs.parse("./out//x").is_literal
    assert str(globs.parse("./out//x")) == "out/x"
    assert not globs.parse("out/[x]").is_literal


@pytest.mark.parametrize(
    "wrong", ["", "/", "/etc/passwd", "../x", "a/../../x", ".", "a\0b", "x/" * 200]
)
def test_patterns_that_lead_out_or_nowhere_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="the pattern"):
        globs.parse(wrong)
