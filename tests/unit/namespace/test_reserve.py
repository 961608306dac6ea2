"""The room that is kept for removing names: taken, given up in pieces, taken again."""

from pathlib import Path

from stagefs.namespace.reserve import RESERVE_BYTES, STEP_BYTES, Reserve


def test_given_up_in_pieces_and_taken_again(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "namespace.sqlite")
    file = tmp_path / "namespace.sqlite.reserve"
    reserve.keep()
    assert file.stat().st_size == RESERVE_BYTES
    assert file.stat().st_blocks * 512 >= RESERVE_BYTES, "a hole keeps no room"
    given = 0
    while reserve.give_up():
        given += STEP_BYTES
        assert file.stat().st_size == RESERVE_BYTES - given
    assert given == RESERVE_BYTES
    reserve.keep()
    assert file.stat().st_size == RESERVE_BYTES


def test_without_a_file_there_is_nothing_to_give(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "namespace.sqlite")
    assert not reserve.give_up()
    reserve = Reserve(tmp_path / "missing" / "namespace.sqlite")
    reserve.keep()
    assert not reserve.give_up()
