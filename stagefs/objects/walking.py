"""Noticing that a task goes through a directory file by file, and fetching ahead of it.

A task that read two neighbours usually wants the rest: the names that follow are fetched,
four at first, twice as many each time, and more whenever it has passed half of what was
fetched ahead.  A jump begins anew.  Trio thread; at most WALKS_MAX directories are watched.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from stagefs.model import Inode
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace

WALKS_MAX = 1024
AHEAD_FIRST = 4
# Names that a walk may skip and still be one: a task that reads every third file.
SKIPPED_MAX = 16

Place = tuple[Inode, int]
"""A directory, and the cookie of a name in it."""


class Walk:
    """``cookie`` is where the task was last, ``until`` how far names were fetched ahead, and
    ``left`` how many of these it has not read yet.  ``ended``: no name came after these."""

    __slots__ = ("ahead", "cookie", "ended", "left", "until")

    def __init__(self, cookie: int) -> None:
        self.cookie = cookie
        self.until = cookie
        self.ahead = 0
        self.left = 0
        self.ended = False


class Walks:
    """``fetch_ahead`` starts to fetch those nodes for which that is worth it, and says how many."""

    def __init__(
        self,
        namespace: Namespace,
        *,
        ahead_max: int,
        fetch_ahead: Callable[[Sequence[tuple[Node, Place]]], int],
    ) -> None:
        self._namespace = namespace
        self._ahead_max = ahead_max
        self._fetch_ahead = fetch_ahead
        self._walks: OrderedDict[Inode, Walk] = OrderedDict()

    def missed(self, inode: Inode) -> None:
        """A task waits for this file, which nobody fetched ahead."""
        place = self._namespace.place(inode)
        if place is None:
            return
        directory, cookie = place
        walk = self._walks.get(directory)
        if walk is None:
            self._walks[directory] = Walk(cookie)
            if len(self._walks) > WALKS_MAX:
                self._walks.popitem(last=False)
        elif self._follows(directory, walk, cookie):
            walk.cookie, walk.left = cookie, 0
            walk.until = max(walk.until, cookie)
            self._go_on(directory, walk)
        else:
            self._walks[directory] = Walk(cookie)

    def reached(self, place: Place) -> None:
        """A task reads a file that was fetched ahead of it."""
        directory, cookie = place
        walk = self._walks.get(directory)
        if walk is None or not walk.ahead or walk.ended:
            return
        walk.cookie = max(walk.cookie, cookie)
        walk.left -= 1
        if walk.left <= walk.ahead // 2:
            self._go_on(directory, walk)

    def _follows(self, directory: Inode, walk: Walk, cookie: int) -> bool:
        if walk.cookie < cookie <= walk.until:
            return True
        from_here = max(walk.cookie, walk.until)
        following = self._namespace.page(directory, from_here, SKIPPED_MAX)
        return any(cookie == next_cookie for next_cookie, _name, _node in following)

    def _go_on(self, directory: Inode, walk: Walk) -> None:
        walk.ahead = min(max(AHEAD_FIRST, walk.ahead * 2), self._ahead_max)
        following = self._namespace.upcoming(directory, walk.until, walk.ahead)
        walk.ended = len(following) < walk.ahead
        if following:
            walk.until = following[-1][0]
            walk.left += self._fetch_ahead(
                [(node, (directory, cookie)) for cookie, _name, node in following]
            )
