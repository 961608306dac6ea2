"""What scp's words mean to ``stagefs copy``."""

import pytest

from stagefs.copying.request import CopyRequest, Place, handed_over, received
from stagefs.errors import InvalidName, NoDaemon, StageFSError
from stagefs.integrations.batch_requests import PathMap
from stagefs.integrations.copy_words import Reading, concerns_login, ssh_lines

MAP = PathMap({"submit:/home": "ssh://files/home", "submit:/nfs": "file:///mnt/nfs"}, "node7.hpc")
HERE = Reading(MAP, user="me", home="/home/me")


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("plain", Place(path="plain")),
        ("./odd:name", Place(path="./odd:name")),
        ("/a/b:c", Place(path="/a/b:c")),
        ("host:/a/b c", Place(url="ssh://host/a/b%20c")),
        ("you@host:/a", Place(url="ssh://you@host/a")),
        ("host:a", Place(url="ssh://host/~/a")),
        ("host:~/a", Place(url="ssh://host/~/a")),
        ("host:", Place(url="ssh://host/~")),
        ("[::1]:/a", Place(url="ssh://[::1]/a")),
        ("scp://you@host:22/a", Place(url="ssh://you@host:22/a")),
        ("https://host/a:b", Place(url="https://host/a:b")),
        ("file:///a%20b", Place(path="/a b")),
        ("submit:/home/x", Place(url="ssh://files/home/x")),
        ("submit:/nfs/x", Place(path="/mnt/nfs/x")),
        ("node7:/a", Place(path="/a")),
        ("me@node7.hpc:a", Place(path="/home/me/a")),
        ("you@node7:/a", Place(url="ssh://you@node7/a")),
    ],
)
def test_places(word: str, place: Place) -> None:
    assert HERE.source(word) == place
    assert HERE.target(word) == place


def test_port_is_of_logins_and_makes_them_real() -> None:
    reading = Reading(MAP, user="me", home="/home/me", port=2222)
    assert reading.source("node7:/a").url == "ssh://node7:2222/a"
    assert reading.source("https://host/a").url == "https://host/a"


def test_backslashes_are_as_pbs_writes_them() -> None:
    assert HERE.source(r"host:/a\ b") == Place(url="ssh://host/a%5C%20b", is_pattern=True)
    assert HERE.target(r"host:/a\ b") == Place(url="ssh://host/a%20b")
    assert HERE.target(r"host:/a\b") == Place(url="ssh://host/a%5Cb")
    assert HERE.source(r"a\ b*") == Place(path=r"a\ b*"), "a shell has been at local names"


def test_names_of_a_mount() -> None:
    reading = Reading(MAP, user="me", home="/home/me", mountpoint="/mnt/s")
    assert reading.source("staging:///a b/c") == Place(path="/mnt/s/staging/a b/c")
    with pytest.raises(NoDaemon):
        HERE.source("staging:///a")


@pytest.mark.parametrize("word", ["", "-oProxyCommand=x:/a", "-l@host:/a", "host:/a/../b"])
def test_refused(word: str) -> None:
    with pytest.raises(StageFSError):
        HERE.source(word)


def test_options_become_lines_of_a_configuration() -> None:
    lines = ssh_lines(
        identities=["/k"], options=["StrictHostKeyChecking no", "User=x"], family="inet"
    )
    assert lines == [
        "StrictHostKeyChecking no",
        "User=x",
        'IdentityFile "/k"',
        "AddressFamily inet",
    ]
    for odd in ("User=x\nProxyCommand=y", "nothing", ""):
        with pytest.raises(InvalidName):
            ssh_lines(options=[odd])
    assert not concerns_login(["StrictHostKeyChecking no", "batchmode=yes"])
    assert concerns_login(["User=x"])


def test_requests_keep_names_that_are_no_text() -> None:
    request = CopyRequest(sources=[Place(path="a\udcff")], target=Place(url="ssh://h/b"))
    assert received(handed_over(request)) == request
