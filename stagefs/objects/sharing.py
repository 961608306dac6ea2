"""Work that several readers wait for, done once: in the nursery, so that a reader who gives up
does not take it along.  Its error reaches all who wait.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from stagefs.errors import RemoteError, StageFSError
from stagefs.objects.content import Content, Counters, Shared

log = logging.getLogger(__name__)


class Sharing:
    def __init__(self, nursery: trio.Nursery, counters: Counters) -> None:
        self._nursery = nursery
        self._counters = counters

    async def run(
        self, content: Content, name: str, work: Callable[[Content], Awaitable[None]]
    ) -> None:
        """Wait for ``work`` on ``content``, which is started unless it is under way."""
        await self.begin(content, name, work).wait()

    def begin(
        self, content: Content, name: str, work: Callable[[Content], Awaitable[None]]
    ) -> Shared:
        shared = content.shared.get(name)
        if shared is None:
            shared = content.shared[name] = Shared()
            self._nursery.start_soon(self._work, content, name, shared, work)
        return shared

    async def _work(
        self,
        content: Content,
        name: str,
        shared: Shared,
        work: Callable[[Content], Awaitable[None]],
    ) -> None:
        try:
            await work(content)
        except StageFSError as error:
            shared.error = error
        except Exception as error:
            self._counters.unexpected += 1
            log.exception("%s of %s failed unexpectedly", name, content.url)
            shared.error = RemoteError(f"reading {content.url} failed unexpectedly ({error!r})")
        finally:
            del content.shared[name]
            shared.event.set()
