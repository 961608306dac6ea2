"""obstore's exceptions into StageFS's.

Few of them have a class; the rest describe themselves in words.  Those run over pages and
quote requests, so only status and error code go into a message.  Pure functions.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
    ObjectChanged,
    ObjectMissing,
    RangesRefused,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import Span
from stagefs.remote.batch import shorter
from stagefs.remote.http_answers import BUSY_STATUSES, TRANSIENT_STATUSES

# How obstore says that the whole object came where a range was asked for.
NO_RANGE = "non-partial response"
_STATUS = re.compile(r"status code: (\d{3})")
# Amazon says with HTTP 400 that a session token has expired; others say 403.
EXPIRED_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
)
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")


@contextmanager
def translated(url: str, span: Span | None = None) -> Iterator[None]:
    """Obstore's exceptions into StageFS's.  Their texts run over pages and quote requests, so only
    status and error code are kept."""
    try:
        yield
    except FileNotFoundError as exc:
        code = _CODE.search(str(exc))
        what = "bucket" if code is not None and code[1] in _NO_BUCKET else "object"
        raise ObjectMissing(f"The server has no {what} for {url}.") from exc
    except PreconditionError as exc:
        raise ObjectChanged(
            f"{url} is no longer the version that was asked for: stage it in again with --replace "
            "to read the new one."
        ) from exc
    except (PermissionDeniedError, UnauthenticatedError) as exc:
        raise _denied(url, str(exc)) from exc
    except BaseError as exc:
        raise _of_words(url, str(exc), span) from exc
    except ValueError as exc:
        raise RemoteError(
            f"The key of {url} cannot be asked for: empty segments, '.', '..' and control "
            "characters are not supported."
        ) from exc


def _of_words(url: str, text: str, span: Span | None) -> StageFSError:
    if match := _STATUS.search(text):
        return _of_status(url, int(match[1]), text, span)
    for words, error in _OF_WORDS:
        if any(word in text for word in words):
            return error(url)
    return RemoteError(f"{url} cannot be asked for: the server's answer is not valid.")


def _of_status(url: str, status: int, text: str, span: Span | None) -> StageFSError:
    code = _CODE.search(text)
    if status in (401, 403) or (code is not None and code[1] in EXPIRED_CODES):
        return _denied(url, text)
    match status:
        case 404 | 410:
            return ObjectMissing(f"The server has no {url} (HTTP {status}).")
        case 416 if span is not None:
            return shorter(url, span.stop, 0)
        case _ if status in TRANSIENT_STATUSES:
            return RemoteUnavailable(
                f"The server of {url} cannot answer now (HTTP {status}).",
                busy=status in BUSY_STATUSES,
            )
        case _:
            return RemoteError(f"The server answered the request for {url} with HTTP {status}.")


# The first that fits counts.
_OF_WORDS: tuple[tuple[tuple[str, ...], Callable[[str], StageFSError]], ...] = (
    ((NO_RANGE,), lambda url: RangesRefused(f"The server of {url} sends whole objects only.")),
    # Where obstore looks for the identity of a machine or container when it has no keys.
    (("169.254.169.254", "169.254.170.2"), lambda url: _denied(url, "")),
    (
        ("object with invalid path",),
        lambda url: RemoteError(
            f"{url} cannot be listed: a key in it holds a control character or an empty segment; "
            "rename it, or stage in the objects by their names."
        ),
    ),
    (
        ("kind: Timeout", "TimedOut"),
        lambda url: DeadlineExceeded(
            f"{url} did not answer in time: the server or the way to it is stalled; "
            "try again later."
        ),
    ),
    (
        ("HTTP error", "HttpError"),
        lambda url: RemoteUnavailable(
            f"The connection to the server of {url} failed: check endpoint, port and network."
        ),
    ),
    (
        ("LOCATION",),
        lambda url: RemoteError(
            f"The server redirects {url} elsewhere: set the bucket's region in [remote.s3] region."
        ),
    ),
)


_KEYS = {
    "az": "check the keys (AZURE_STORAGE_* or AZURE_* variables) and [remote.az] account",
    "gs": "check the credentials (GOOGLE_APPLICATION_CREDENTIALS, or [remote.gs] credentials_file)",
    "s3": "check the keys (AWS_* variables, ~/.aws, or [remote.s3] profile)",
}


def _denied(url: str, text: str) -> AccessDenied:
    code = _CODE.search(text)
    hint = _KEYS[url.partition("://")[0]]
    return AccessDenied(
        f"The server refuses {url}{f' ({code[1]})' if code else ''}: {hint}, or set "
        "anonymous = true for public data."
    )
