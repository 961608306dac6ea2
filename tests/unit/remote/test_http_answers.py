import pytest
from urllib3 import HTTPHeaderDict

from stagefs.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    RangesRefused,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import Span
from stagefs.remote.http_answers import (
    answer_to_range,
    check_version,
    described,
    refusal,
    retry_after_s,
    strong_etag,
)

URL = "http://h/x"
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
DATE_S = 784111777


def headers(**values: str) -> HTTPHeaderDict:
    return HTTPHeaderDict({name.replace("_", "-"): value for name, value in values.items()})


@pytest.mark.parametrize(
    ("given", "validator"),
    [
        (headers(ETag='"abc"', Last_Modified=DATE), 'etag:"abc"'),
        (headers(ETag='W/"abc"', Last_Modified=DATE), f'modified:{DATE_S}:7:W/"abc"'),
        (headers(Last_Modified=DATE), f"modified:{DATE_S}:7:"),
        (headers(ETag="unquoted"), "modified::7:unquoted"),
        (headers(Last_Modified="yesterday"), "modified::7:"),
        (headers(), "modified::7:"),
    ],
)
def test_validators(given: HTTPHeaderDict, validator: str) -> None:
    info = described(URL, given, 7)
    assert info.validator == validator
    check_version(info, validator)
    check_version(info, None)


def test_only_strong_etags_are_sent() -> None:
    assert strong_etag('etag:"abc"') == '"abc"'
    assert strong_etag('modified:1:7:W/"abc"') is None
    assert strong_etag(None) is None


@pytest.mark.parametrize(
    "validator",
    [
        'etag:"other"',
        f"modified:{DATE_S}:8:",
        f"modified:{DATE_S + 1}:7:",
        "modified::7:",
        "mtime:1:7",
        "",
    ],
)
def test_other_versions_are_refused(validator: str) -> None:
    info = described(URL, headers(ETag='"abc"', Last_Modified=DATE), 7)
    with pytest.raises(ObjectChanged):
        check_version(info, validator)


def test_listings_and_answers_are_comparable() -> None:
    info = described(URL, headers(ETag='"abc"', Last_Modified=DATE), 7)
    check_version(info, f"modified:{DATE_S}:7:")


def test_another_weak_tag_is_another_version() -> None:
    info = described(URL, headers(ETag='W/"abc"', Last_Modified=DATE), 7)
    check_version(info, f"modified:{DATE_S}:7:")
    with pytest.raises(ObjectChanged):
        check_version(info, f'modified:{DATE_S}:7:W/"def"')


def test_partial_answer() -> None:
    given = headers(ETag='"a"', Content_Range="bytes 2-4/10", Content_Length="3")
    info = answer_to_range(URL, 206, given, Span(2, 3), 'etag:"a"')
    assert (info.size_bytes, info.ranges) == (10, True)


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 2-4/*",
        "bytes */10",
        "bytes 0-2/10",
        "bytes 2-5/10",
        "bytes 2-3/10",
        "items 2-4/10",
    ],
)
def test_answers_that_are_not_what_was_asked_for(content_range: str) -> None:
    with pytest.raises(RemoteError) as caught:
        answer_to_range(URL, 206, headers(Content_Range=content_range), Span(2, 3), None)
    assert type(caught.value) is RemoteError


def test_answer_that_contradicts_itself() -> None:
    given = headers(Content_Range="bytes 2-4/10", Content_Length="4")
    with pytest.raises(RemoteError, match="contradicts"):
        answer_to_range(URL, 206, given, Span(2, 3), None)


def test_partial_answer_of_a_shorter_object() -> None:
    given = headers(Content_Range="bytes 2-3/4", Content_Length="2")
    with pytest.raises(ObjectChanged, match="only 4 bytes"):
        answer_to_range(URL, 206, given, Span(2, 3), None)


def test_partial_answer_of_another_version() -> None:
    given = headers(ETag='"b"', Content_Range="bytes 2-4/10")
    with pytest.raises(ObjectChanged):
        answer_to_range(URL, 206, given, Span(2, 3), 'etag:"a"')


def test_whole_answer() -> None:
    given = headers(ETag='"a"', Content_Length="10")
    assert not answer_to_range(URL, 200, given, Span(0, 10), 'etag:"a"').ranges
    for span in (Span(0, 9), Span(1, 9)):
        with pytest.raises(RangesRefused):
            answer_to_range(URL, 200, given, span, 'etag:"a"')
    with pytest.raises(ObjectChanged):
        answer_to_range(URL, 200, given, Span(0, 11), None)
    # A changed object is told as such, not as a server without ranges.
    with pytest.raises(ObjectChanged):
        answer_to_range(URL, 200, given, Span(0, 5), 'etag:"b"')


def test_whole_answer_of_unknown_length() -> None:
    with pytest.raises(RemoteError, match="no length"):
        answer_to_range(URL, 200, headers(), Span(0, 10), None)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RemoteError),
        (401, AccessDenied),
        (403, AccessDenied),
        (407, AccessDenied),
        (404, ObjectMissing),
        (410, ObjectMissing),
        (412, ObjectChanged),
        (429, RemoteUnavailable),
        (500, RemoteUnavailable),
        (501, RemoteError),
        (503, RemoteUnavailable),
    ],
)
def test_refusals(status: int, error: type[Exception]) -> None:
    found = refusal(URL, status, headers())
    assert type(found) is error
    assert URL in str(found)


def test_range_beyond_the_end() -> None:
    given = headers(Content_Range="bytes */4")
    found = refusal(URL, 416, given, span=Span(5, 2))
    assert isinstance(found, ObjectChanged)
    assert "only 4 bytes" in str(found)


@pytest.mark.parametrize(
    ("given", "wish_s"),
    [
        (headers(Retry_After="7"), 7.0),
        (headers(Retry_After="99999999"), 3600.0),
        (headers(Retry_After=DATE, Date="Sun, 06 Nov 1994 08:49:07 GMT"), 30.0),
        (headers(Retry_After=DATE), 0.0),
        (headers(Retry_After="soon"), None),
        (headers(Retry_After="-5"), None),
        (headers(), None),
    ],
)
def test_retry_after(given: HTTPHeaderDict, wish_s: float | None) -> None:
    assert retry_after_s(given) == wish_s
