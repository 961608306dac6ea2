"""Asking a remote what it has at a URL: one question at a time for each, shared by all askers.

A question goes on when its askers give up, so that asking again finds the answer sooner.
Trio thread; questions run in the nursery of Objects.
"""

import logging
from collections.abc import Callable

import trio

from stagefs.errors import DeadlineExceeded, RemoteError, StageFSError
from stagefs.model import ObjectInfo
from stagefs.remote.base import Remote

log = logging.getLogger(__name__)


class Question:
    __slots__ = ("answer", "error", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.answer: ObjectInfo | None = None
        self.error: StageFSError | None = None


class Asking:
    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        remote_for: Callable[[str], Remote],
        answer_deadline_s: float,
    ) -> None:
        self._nursery = nursery
        self._remote_for = remote_for
        self._answer_deadline_s = answer_deadline_s
        self._questions: dict[str, Question] = {}

    async def stat(self, url: str) -> ObjectInfo:
        question = self._questions.get(url)
        if question is None:
            question = self._questions[url] = Question()
            self._nursery.start_soon(self._ask, url, question)
        await question.event.wait()
        if question.error is not None:
            raise question.error
        assert question.answer is not None
        return question.answer

    async def stat_soon(self, url: str) -> ObjectInfo:
        with trio.move_on_after(self._answer_deadline_s):
            return await self.stat(url)
        raise DeadlineExceeded(
            f"asking for {url}: no answer within {self._answer_deadline_s:g} s; "
            "the question goes on, try again"
        )

    async def _ask(self, url: str, question: Question) -> None:
        try:
            question.answer = await self._remote_for(url).stat(url)
        except StageFSError as error:
            question.error = error
        except Exception as error:
            log.exception("stat of %s failed unexpectedly", url)
            question.error = RemoteError(f"asking for {url} failed unexpectedly ({error!r})")
        finally:
            question.event.set()
            del self._questions[url]
