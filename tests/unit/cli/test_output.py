"""Long output: written some at a time, and all of it."""

import json
from collections.abc import Iterator

import msgspec
import pytest

from stagefs.cli.output import LINES_AT_ONCE, print_json_list, print_lines
from stagefs.errors import NoDaemon


class Counted(msgspec.Struct):
    number: int


def counted(count: int, *, fails: bool = False) -> Iterator[Counted]:
    yield from map(Counted, range(count))
    if fails:
        raise NoDaemon("It has ended.")


@pytest.mark.parametrize(
    "count", [0, 1, LINES_AT_ONCE - 1, LINES_AT_ONCE, 2 * LINES_AT_ONCE, 2 * LINES_AT_ONCE + 1]
)
def test_all_of_a_long_list_is_printed(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_json_list(counted(count))
    assert json.loads(capsys.readouterr().out) == [{"number": n} for n in range(count)]
    print_lines(str(one.number) for one in counted(count))
    assert capsys.readouterr().out == "".join(f"{n}\n" for n in range(count))


def test_what_came_before_an_error_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    count = LINES_AT_ONCE + 2
    with pytest.raises(NoDaemon):
        print_lines(str(one.number) for one in counted(count, fails=True))
    assert capsys.readouterr().out == "".join(f"{n}\n" for n in range(count))
