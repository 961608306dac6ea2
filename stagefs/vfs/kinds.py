"""Kinds of tasks, and the order in which tasks of a kind first use their inputs.

Two sandboxes are of one kind when their inputs have the same names, numbers apart: that is so
for sandboxes of one template, for each ``stagefs run`` with the same ``--in``, and for a pilot's
tasks that each have ``sample_0007.bam`` and ``model.bin`` with another number.  The inputs of a
kind are numbered by their names in order, numbers counting as numbers; an order is a row of
these places.

Kept in one small file, written whole under another name first; a file that is damaged or of
another format is as good as none, because all that it saves is waiting.  No concurrency of its
own: ``text`` is made where orders change, ``write`` may run in a worker thread.
"""

import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FORMAT = 1
KINDS_MAX = 1000
# Of a task with more inputs the first so many that it uses are remembered: a kind takes a few
# hundred bytes, and never more than a kibibyte or so.
ORDER_MAX = 256
_NUMBERS = re.compile(r"[0-9]+")


def in_order(names: Iterable[str]) -> list[str]:
    """Input names as a kind numbers them: ``in2`` before ``in10``."""
    return sorted(names, key=_key)


def _key(name: str) -> tuple[str, list[int], str]:
    return _NUMBERS.sub("#", name), [int(number) for number in _NUMBERS.findall(name)], name


def kind_of(ordered: Sequence[str]) -> str:
    """The kind of a task with these inputs, which are ``in_order``."""
    text = "\0".join(_NUMBERS.sub("#", name) for name in ordered)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Orders:
    """Of the KINDS_MAX kinds that were seen last.  ``changed``: since the last ``text``."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self.changed = False

    def __len__(self) -> int:
        return len(self._by_kind)

    def of(self, kind: str) -> tuple[int, ...]:
        """Empty for a kind that is not known."""
        return self._by_kind.get(kind, ())

    def put(self, kind: str, order: Sequence[int]) -> None:
        found = tuple(order[:ORDER_MAX])
        if self._by_kind.get(kind) != found:
            self.changed = True
        self._by_kind[kind] = found
        self._by_kind.move_to_end(kind)
        if len(self._by_kind) > KINDS_MAX:
            self._by_kind.popitem(last=False)

    def text(self) -> str:
        self.changed = False
        return json.dumps({"format": FORMAT, "kinds": self._by_kind}, separators=(",", ":"))

    @classmethod
    def read(cls, path: Path) -> "Orders":
        orders = cls()
        try:
            kept = json.loads(path.read_bytes())
            if kept["format"] == FORMAT:
                for kind, order in kept["kinds"].items():
                    orders.put(str(kind), _places(order))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is of no use, tasks are watched anew: %s", path, error)
            orders = cls()
        orders.changed = False
        return orders


def _places(order: object) -> list[int]:
    """Raises ValueError unless these are different places."""
    if isinstance(order, list) and len(set(order)) == len(order):
        places = [place for place in order if type(place) is int and place >= 0]
        if len(places) == len(order):
            return places
    raise ValueError(f"{str(order)[:40]!r} is no order")


def write(path: Path, text: str) -> None:
    """Raises OSError."""
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    new.replace(path)
