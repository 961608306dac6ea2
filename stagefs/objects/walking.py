"""Noticing that a task goes through a directory file by file, and fetching ahead of it.

A task that read two neighbours usually wants the rest: the names that follow are fetched,
four at first, twice as many each time, and more whenever it has passed half of what was
fetched ahead.  A jump begins anew.  One that went through a directory and begins the next, as
`find` does, usually wants that one and those behind it: their files are fetched as they were in
the last, in one directory more at first and in twice as many each time, also where the names
are listed later (``listed``).  Trio thread; at most WALKS_MAX directories are watched.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from stagefs.model import Inode
from stagefs.namespace.node import Node, NodeKind
from stagefs.namespace.store import Namespace

WALKS_MAX = 1024
AHEAD_FIRST = 4
DIRECTORIES_AHEAD_MAX = 16
# Names that a walk may skip and still be one: a task that reads every third file.
SKIPPED_MAX = 16

Place = tuple[Inode, int]
"""A directory, and the cookie of a name in it."""


class Walk:
    """``cookie`` is where the task was last, ``until`` how far names were fetched ahead,
    ``fetched`` how many of them, and ``left`` how many of these it has not read yet.  ``ended``:
    no name came after these.  ``entered``: a task has read here."""

    __slots__ = ("ahead", "cookie", "ended", "entered", "fetched", "left", "until")

    def __init__(self, cookie: int, *, ahead: int = 0) -> None:
        self.cookie = cookie
        self.until = cookie
        self.ahead = ahead
        self.fetched = 0
        self.left = 0
        self.ended = False
        self.entered = False

    @property
    def was_worth_it(self) -> bool:
        """Whether most of what was fetched ahead was read."""
        return self.left * 2 <= self.fetched and self.ahead > 0


class Tour:
    """From directory to directory of one parent: ``cookie`` is that in which the task is, and
    ``walk`` what it does there; ``until`` how far directories were begun, and ``begun`` those."""

    __slots__ = ("ahead", "begun", "cookie", "until", "walk")

    def __init__(self, cookie: int, walk: Walk) -> None:
        self.cookie = cookie
        self.until = cookie
        self.walk = walk
        self.ahead = 0
        self.begun: list[Walk] = []


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
        self._tours: OrderedDict[Inode, Tour] = OrderedDict()

    def missed(self, inode: Inode) -> None:
        """A task waits for this file, which nobody fetched ahead."""
        place = self._namespace.place(inode)
        if place is None:
            return
        directory, cookie = place
        walk = self._walks.get(directory)
        if walk is None or not self._follows(directory, walk, cookie):
            walk = self._watch(directory, Walk(cookie))
            self._enter(directory, walk)
            return
        if not walk.entered:
            self._enter(directory, walk)
        walk.cookie, walk.left = cookie, 0
        walk.until = max(walk.until, cookie)
        self._go_on(directory, walk)

    def reached(self, place: Place) -> None:
        """A task reads a file that was fetched ahead of it."""
        directory, cookie = place
        walk = self._walks.get(directory)
        if walk is None or not walk.ahead:
            return
        walk.cookie = max(walk.cookie, cookie)
        walk.left -= 1
        if not walk.entered:
            self._enter(directory, walk)
        if not walk.ended and walk.left <= walk.ahead // 2:
            self._go_on(directory, walk)

    def listed(self, directory: Inode) -> None:
        """The names of a directory became known."""
        walk = self._walks.get(directory)
        if walk is not None and walk.ahead and not walk.until:
            self._go_on(directory, walk)

    def _watch(self, directory: Inode, walk: Walk) -> Walk:
        self._walks[directory] = walk
        self._walks.move_to_end(directory)
        if len(self._walks) > WALKS_MAX:
            self._walks.popitem(last=False)
        return walk

    def _follows(self, directory: Inode, walk: Walk | Tour, cookie: int) -> bool:
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
            count = self._fetch_ahead(
                [(node, (directory, cookie)) for cookie, _name, node in following]
            )
            walk.fetched += count
            walk.left += count

    # From directory to directory

    def _enter(self, directory: Inode, walk: Walk) -> None:
        """The first read in a directory, as far as is known."""
        walk.entered = True
        above = self._namespace.place(directory)
        if above is None:
            return
        parent, cookie = above
        tour = self._tours.get(parent)
        if tour is None or not self._follows(parent, tour, cookie):
            self._tours[parent] = Tour(cookie, walk)
            self._tours.move_to_end(parent)
            if len(self._tours) > WALKS_MAX:
                self._tours.popitem(last=False)
            return
        last, tour.walk, tour.cookie = tour.walk, walk, cookie
        tour.until = max(tour.until, cookie)
        if not last.was_worth_it:
            tour.ahead = 0
            return
        if not walk.ahead:
            walk.ahead = last.ahead // 2
            self._go_on(directory, walk)
        self._begin_directories(parent, tour)

    def _begin_directories(self, parent: Inode, tour: Tour) -> None:
        tour.ahead = min(max(1, tour.ahead * 2), DIRECTORIES_AHEAD_MAX)
        tour.begun = [walk for walk in tour.begun if not walk.entered]
        for cookie, _name, node in self._namespace.upcoming(parent, tour.cookie, tour.ahead):
            if sum(walk.left for walk in tour.begun) >= self._ahead_max:
                return
            if cookie <= tour.until:
                continue
            tour.until = cookie
            if node.kind is NodeKind.DIRECTORY and node.inode not in self._walks:
                walk = self._watch(node.inode, Walk(0, ahead=tour.walk.ahead // 2))
                tour.begun.append(walk)
                self._go_on(node.inode, walk)
