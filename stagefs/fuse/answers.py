"""What surrounds every operation: errors become errnos, and nothing else ever leaves.

pyfuse3 ends the mount on any exception that is not a FUSEError, so ``answers`` maps every
StageFSError to its errno and turns what nobody expected into a logged, counted EIO.
"""

import errno
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from stagefs.errors import StageFSError
from stagefs.measures import Measures

log = logging.getLogger("stagefs.fuse")


class Counting(Protocol):
    """``unexpected`` counts answers of EIO that were defects of ours; ``count_served`` is called
    when a request has its answer: a daemon that serves anything is no failure when it dies."""

    unexpected: int
    measures: Measures

    def count_served(self) -> None: ...


_S = TypeVar("_S", bound=Counting)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def answers(
    method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    name = method.__name__.lstrip("_")

    @functools.wraps(method)
    async def answered(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        begun_ns = time.perf_counter_ns()
        try:
            answer = await method(self, *args, **kwargs)
        except StageFSError as error:
            self.count_served()
            self.measures.answered(name, begun_ns, error.errno)
            if error.log_level >= logging.WARNING:
                log.log(error.log_level, "%s: %s", name, error)
            raise pyfuse3.FUSEError(error.errno) from error
        except pyfuse3.FUSEError as error:
            self.count_served()
            self.measures.answered(name, begun_ns, error.errno)
            raise
        except Exception as error:
            self.unexpected += 1
            self.measures.unexpected += 1
            self.measures.answered(name, begun_ns, errno.EIO)
            log.exception("%s failed unexpectedly", name)
            raise pyfuse3.FUSEError(errno.EIO) from error
        self.count_served()
        self.measures.answered(name, begun_ns)
        return answer

    return answered
