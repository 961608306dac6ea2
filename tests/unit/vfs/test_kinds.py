"""What a kind is, and how the orders of kinds are kept."""

import json
from pathlib import Path

from stagefs.vfs.kinds import KINDS_MAX, ORDER_MAX, Orders, in_order, kind_of, write


def kind(*names: str) -> str:
    return kind_of(in_order(names))


def test_a_kind_is_its_input_names_without_numbers() -> None:
    assert kind("b", "a") == kind("a", "b")
    assert kind("sample_0007.bam", "ref.fa") == kind("ref.fa", "sample_12.bam")
    assert kind("a", "b") != kind("a", "c")
    assert kind("a", "b") != kind("a", "b", "b1")
    assert kind("a1", "a2") != kind("a1")
    assert in_order(["in10", "in9", "b/2", "in010"]) == ["b/2", "in9", "in010", "in10"]
    # A name may be longer than a number that int() takes from text is, and not be UTF-8.
    assert kind("1" * 255) == kind("2" * 255)
    assert kind("\udcff") != kind("\udcfe")


def test_orders_outlive_the_daemon_and_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "kinds.json"
    assert len(Orders.read(path)) == 0
    orders = Orders()
    for number in range(KINDS_MAX + 10):
        orders.put(kind(f"{'x' * number}"), range(2 * ORDER_MAX))
    orders.put(kind("mine", "yours"), [1, 0])
    write(path, orders.text())
    found = Orders.read(path)
    assert len(found) == KINDS_MAX
    assert found.of(kind("mine", "yours")) == (1, 0)
    assert found.of(kind("x" * 500)) == tuple(range(ORDER_MAX))
    assert found.of(kind("x")) == (), "the oldest kinds stay"
    assert path.stat().st_size < KINDS_MAX * 1100
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_damaged_or_newer_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "kinds.json"
    for text in (
        "",
        "[]",
        "{",
        json.dumps({"format": 2, "kinds": {"a": [0]}}),
        json.dumps({"format": 1, "kinds": {"a": [0, 0]}}),
        json.dumps({"format": 1, "kinds": {"a": ["0"]}}),
        json.dumps({"format": 1, "kinds": {"a": [-1]}}),
        json.dumps({"format": 1, "kinds": {"a": {}}}),
        json.dumps({"format": 1, "kinds": []}),
    ):
        path.write_text(text)
        assert len(Orders.read(path)) == 0, text
