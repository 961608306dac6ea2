"""What batch jobs declare in their variables, and where paths of other hosts are found."""

from pathlib import Path

import pytest

from stagefs.errors import InvalidManifest
from stagefs.integrations.batch_requests import PathMap, Submission, declared
from stagefs.staging.manifest import Manifest, Output

HERE = "node7.cluster"
MAP = PathMap(
    {
        "submit:/home": "ssh://submit/home",
        "submit:/home/big": "s3://bucket/big",
        "submit:/nfs/": "file:///mnt/nfs/",
    },
    HERE,
)
SUBMITTED = Submission("submit", "/home/me")


def asked(**variables: str) -> Manifest | None:
    return declared({f"STAGEFS_{name}": text for name, text in variables.items()}, SUBMITTED, MAP)


def inputs(text: str) -> dict[str, str]:
    manifest = asked(IN=text)
    assert manifest is not None
    return manifest.inputs


def test_longest_entry_wins_at_whole_components() -> None:
    assert MAP.mapped("submit", "/home/me/a b") == "ssh://submit/home/me/a%20b"
    assert MAP.mapped("submit.cluster", "/home/big/a b") == "s3://bucket/big/a b"
    assert MAP.mapped("submit", "/home/bigger/x") == "ssh://submit/home/bigger/x"
    assert MAP.mapped("submit", "/nfs/x") == "file:///mnt/nfs/x"
    assert MAP.mapped("submit", "/homes/x") is None
    assert MAP.mapped("other", "/home/x") is None
    assert MAP.mapped("submit", "/home") == "ssh://submit/home"


def test_hosts_that_the_map_does_not_know() -> None:
    assert MAP.shared("other", "/data/x y") == "file:///data/x%20y"
    assert MAP.delegated("other", "/data/x y") == "ssh://other/data/x%20y"
    assert MAP.delegated("node7", "/data/x") == "file:///data/x"
    assert MAP.delegated("", "/data/x") == "file:///data/x"
    # Of two full names each is a host of its own.
    assert MAP.delegated("node7.elsewhere", "/x") == "ssh://node7.elsewhere/x"


def test_pairs_with_blanks_and_commas() -> None:
    assert inputs("a%20b%2Cc=https://h/x%20y  d=near%20by e=/nfs/q") == {
        "a b,c": "https://h/x%20y",
        "d": "ssh://submit/home/me/near%20by",
        "e": "file:///mnt/nfs/q",
    }
    assert inputs("x=s3://bucket/a%20b y=ssh://h/p=q") == {
        "x": "s3://bucket/a b",
        "y": "ssh://h/p=q",
    }


def test_outputs_are_optional_and_replace_what_is_there() -> None:
    manifest = asked(OUT="*.log=ssh://h/logs/ out=made/here")
    assert manifest is not None
    assert manifest.outputs == [
        Output("*.log", "ssh://h/logs/", optional=True, overwrite=True),
        Output("out", "ssh://submit/home/me/made/here", optional=True, overwrite=True),
    ]


def test_a_manifest_is_found_from_where_the_job_was_submitted(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('[inputs]\na = "https://h/a"\n[outputs]\nb = "ssh://h/b"\n')
    manifest = declared(
        {"STAGEFS_MANIFEST": "job.toml", "STAGEFS_IN": "c=https://h/c"},
        Submission("submit", str(tmp_path)),
        MAP,
    )
    assert manifest is not None
    assert manifest.inputs == {"a": "https://h/a", "c": "https://h/c"}
    assert manifest.outputs == [Output("b", "ssh://h/b", optional=True)]


def test_asking_for_nothing() -> None:
    assert asked() is None
    assert asked(IN=" ", OUT="") is None


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"IN": "lonely"}, "STAGEFS_IN holds 'lonely'"),
        ({"IN": "=https://h/x"}, "NAME=URL"),
        ({"IN": "a=https://h/x a=https://h/y"}, "names a twice"),
        ({"OUT": "a="}, "PATTERN=URL"),
        ({"OUT": "a=https://h/x"}, "nothing can be written"),
        ({"IN": "../a=https://h/x"}, "cannot be a name"),
        ({"MANIFEST": "absent.toml"}, "absent.toml cannot be read"),
    ],
)
def test_what_is_wrong_is_named(variables: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidManifest, match=named):
        asked(**variables)
