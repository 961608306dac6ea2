"""What a Slurm job's comment asks for."""

import pytest

from stagefs.errors import InvalidManifest
from stagefs.integrations.batch_requests import PathMap
from stagefs.integrations.slurm import request_of


@pytest.mark.parametrize("comment", ["", "my run", "for stagefs: in:a=b"])
def test_another_comment_asks_for_nothing(comment: str) -> None:
    assert request_of(comment) is None


def test_the_words_of_a_comment() -> None:
    assert request_of("stagefs:") == {}
    said = "stagefs:in:a=https://h/a  in:b%20c=ssh://h/b manifest:job.toml out:*.log=ssh://h/7/"
    assert request_of(said) == {
        "STAGEFS_IN": "a=https://h/a b%20c=ssh://h/b",
        "STAGEFS_OUT": "*.log=ssh://h/7/",
        "STAGEFS_MANIFEST": "job.toml",
    }


@pytest.mark.parametrize(
    "comment", ["stagefs: a=https://h/a", "stagefs: in:", "stagefs: input:a=b", "stagefs: in"]
)
def test_a_word_that_declares_nothing(comment: str) -> None:
    with pytest.raises(InvalidManifest, match="declares nothing: write in:NAME=URL"):
        request_of(comment)


def test_two_manifests() -> None:
    with pytest.raises(InvalidManifest, match="more than one manifest"):
        request_of("stagefs: manifest:a manifest:b")


def test_a_directory_of_any_host() -> None:
    paths = PathMap({"*:/home": "ssh://login/home", "one:/home/x": "ssh://one/x"}, "here")
    assert paths.shared("", "/home/me/a b") == "ssh://login/home/me/a%20b"
    assert paths.shared("two", "/home/x/y") == "ssh://login/home/x/y"
    assert paths.shared("one", "/home/x/y") == "ssh://one/x/y"
    assert paths.shared("two", "/nfs/y") == "file:///nfs/y"
