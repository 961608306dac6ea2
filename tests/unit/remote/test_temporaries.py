from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stagefs.remote.temporaries import Leftovers, temporary_name, token_of
from stagefs.remote.url import NAME_BYTES_MAX, is_file_name
from tests.support.source_file import source_file

TOKEN = "0123456789ab"

names = st.text(min_size=1, max_size=300).filter(is_file_name)


@given(names)
def test_names_are_file_names_and_recognized(name: str) -> None:
    made = temporary_name(name, TOKEN)
    assert is_file_name(made)
    assert len(made.encode("utf-8", "surrogateescape")) <= NAME_BYTES_MAX
    assert made.startswith(".")
    assert temporary_name(name, TOKEN) != made, "two tries share a name"
    leftovers = Leftovers()
    leftovers.add("/d", [made, name])
    assert leftovers.take("/d", TOKEN) == [made]


def test_only_one_own_leftovers_are_taken_once() -> None:
    leftovers = Leftovers()
    mine, others = temporary_name("x", TOKEN), temporary_name("x", "ba9876543210")
    leftovers.add("/d", [mine, others, ".x.stagefs-", "x", ".x.stagefs-0123456789ab-xyz"])
    leftovers.add("/e", [mine])
    assert leftovers.take("/d", TOKEN) == [mine]
    assert leftovers.take("/d", TOKEN) == []
    assert leftovers.take("/e", TOKEN) == [mine]


def test_directories_are_unknown_until_looked_through() -> None:
    leftovers = Leftovers()
    leftovers.add("/d", [temporary_name("x", TOKEN)])
    assert leftovers.unknown("/d")
    leftovers.looked_through("/d")
    assert not leftovers.unknown("/d")


def test_tokens_name_file_and_url(tmp_path: Path) -> None:
    with source_file(tmp_path / "a", b"a") as one, source_file(tmp_path / "b", b"a") as two:
        token = token_of("ssh://h/x", one.fd)
        assert token == token_of("ssh://h/x", one.fd)
        assert token != token_of("ssh://h/y", one.fd)
        assert token != token_of("ssh://h/x", two.fd)
