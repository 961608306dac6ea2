"""Manifests: from options, TOML and JSON; what is refused, and with which words."""

import json
from pathlib import Path

import pytest

from stagefs.errors import InvalidManifest
from stagefs.model import OnWrite
from stagefs.staging.manifest import (
    LeaseLifetime,
    Manifest,
    Mirrored,
    Output,
    as_url,
    checked,
    expand_mirrors,
    from_options,
    read_manifest,
)

TOML = """
on_write = "read-only"
persistent = true
lifetime = "pilot"

[inputs]
"ref.fa" = "https://host/ref.fa"
"sub//local" = "data/x y"

[mirrors]
"models/*" = "./models"

[outputs]
"std*" = "staging:///runs/7/"
"r.h5" = { to = "s3://bucket/7.h5", optional = true, overwrite = true }
"t.csv" = ["staging:///runs/7/", { to = "ssh://host/data/", overwrite = true }]
"""


def test_from_options() -> None:
    manifest = from_options(
        inputs=["a=https://host/y?z=1", "b/c=staging:///x"],
        mirrors=["/data/k=v/*=models"],
        outputs=["std*=staging:///runs/7/", "r=file:///out/r"],
        on_write=OnWrite.SHARED,
        persistent=True,
        lifetime=LeaseLifetime.FOREVER,
    )
    assert manifest == Manifest(
        inputs={"a": "https://host/y?z=1", "b/c": "staging:///x"},
        mirrors={"/data/k=v/*": "models"},
        outputs=[Output("std*", "staging:///runs/7/"), Output("r", "file:///out/r")],
        on_write=OnWrite.SHARED,
        persistent=True,
        lifetime=LeaseLifetime.FOREVER,
    )


def test_paths_of_this_machine_become_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = from_options(inputs=["a=x y"], mirrors=["m/*=."], outputs=["*=out/", "r=r"])
    assert manifest.inputs == {"a": f"file://{tmp_path}/x%20y"}
    assert manifest.mirrors == {f"{tmp_path}/m/*": ""}
    assert [output.to for output in manifest.outputs] == [
        f"file://{tmp_path}/out/",
        f"file://{tmp_path}/r",
    ]
    assert as_url("/") == "file:///"


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(TOML)
    manifest = read_manifest(tmp_path / "m.toml")
    assert manifest == Manifest(
        inputs={"ref.fa": "https://host/ref.fa", "sub/local": f"file://{tmp_path}/data/x%20y"},
        mirrors={f"{tmp_path}/models/*": "models"},
        outputs=[
            Output("std*", "staging:///runs/7/"),
            Output("r.h5", "s3://bucket/7.h5", optional=True, overwrite=True),
            Output("t.csv", "staging:///runs/7/"),
            Output("t.csv", "ssh://host/data/", overwrite=True),
        ],
        on_write=OnWrite.READ_ONLY,
        persistent=True,
        lifetime=LeaseLifetime.PILOT,
    )
    document = {
        "inputs": {"ref.fa": "https://host/ref.fa", "sub/local": "data/x y"},
        "mirrors": {"models/*": "models"},
        "outputs": {
            "std*": "staging:///runs/7/",
            "r.h5": {"to": "s3://bucket/7.h5", "optional": True, "overwrite": True},
            "t.csv": ["staging:///runs/7/", {"to": "ssh://host/data/", "overwrite": True}],
        },
        "on_write": "read-only",
        "persistent": True,
        "lifetime": "pilot",
    }
    (tmp_path / "m.json").write_text(json.dumps(document))
    assert read_manifest(tmp_path / "m.json") == manifest


def test_checking_again_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(TOML)
    manifest = read_manifest(tmp_path / "m.toml")
    assert checked(manifest) == manifest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs": ["a"]}, "--in 'a' declares nothing: write --in NAME=URL"),
        ({"inputs": ["=x"]}, "--in '=x'"),
        ({"inputs": ["a="]}, "--in 'a='"),
        ({"inputs": ["a=x", "a=y"]}, "--in names a twice"),
        ({"inputs": ["a=x", "./a=y"]}, "the name a is declared twice"),
        ({"inputs": ["a=x", "a/b=y"]}, "--in 'a/b': a is an input itself"),
        ({"inputs": ["../a=x"]}, r"--in '../a': '../a' cannot be a name"),
        ({"inputs": ["/a=x"]}, "relative to the sandbox"),
        ({"inputs": ["a/=x"]}, "cannot be the name of an input"),
        ({"inputs": ["a=gopher://x/y"]}, "--in 'a': The scheme 'gopher'"),
        ({"mirrors": ["/x"]}, "--mirror '/x' declares nothing: write --mirror GLOB=DIR"),
        ({"mirrors": ["/x=../y"]}, "--mirror '/x'"),
        ({"outputs": ["/etc=file:///x/"]}, "--out '/etc': the pattern begins with '/'"),
        ({"outputs": ["a/../../b=file:///x/"]}, "out of the sandbox"),
        ({"outputs": ["a=https://host/x"]}, "nothing can be written to an https server"),
    ],
)
def test_wrong_options_are_named(options: dict[str, list[str]], words: str) -> None:
    with pytest.raises(InvalidManifest, match=words):
        from_options(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.toml", "[inputs\n", r"m\.toml is not TOML: .*line 1"),
        ("m.json", '{"inputs": {\n"a" 1}}', r"m\.json is not JSON: .*line 2"),
        ("m.json", "\ufffe", "is not JSON"),
        ("m.json", "[" * 100_000, "nested too deeply"),
        ("m.toml", 'on_wirte = "shared"', "unknown field `on_wirte`"),
        ("m.toml", 'on_write = "copy"', r"Invalid enum value 'copy' - at `\$\.on_write`"),
        ("m.toml", "[outputs]\nx = { too = 'y' }", r"m\.toml is not usable: .*outputs"),
        (
            "m.toml",
            "[outputs]\n'../x' = 'staging:///y'",
            r'm\.toml, outputs\."\.\./x": the pattern',
        ),
        ("m.toml", "[inputs]\n'a' = ''", r'm\.toml, inputs\."a": the URL is empty'),
        ("m.toml", "[inputs]\n'a' = 'x://y/'", r'm\.toml, inputs\."a": The scheme'),
    ],
)
def test_wrong_files_are_named_with_the_place(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidManifest, match=words):
        read_manifest(tmp_path / name)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match=r"x\.json cannot be read: No such file"):
        read_manifest(tmp_path / "x.json")


def test_passwords_are_not_told() -> None:
    with pytest.raises(InvalidManifest) as refused:
        from_options(inputs=["a=https://me:secret@/x"])
    assert "secret" not in str(refused.value)


def test_mirrors_are_what_is_there_now(tmp_path: Path) -> None:
    for name in ("dummydir/one", "dummydir/two", "file", ".hidden", "dummydir/.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    manifest = from_options(
        mirrors=[f"{tmp_path}/*=.", f"{tmp_path}/dummydir/*=sub/deep", f"{tmp_path}/absent*=x"]
    )
    assert expand_mirrors(manifest.mirrors) == [
        Mirrored(f"{tmp_path}/dummydir", "dummydir"),
        Mirrored(f"{tmp_path}/file", "file"),
        Mirrored(f"{tmp_path}/dummydir/one", "sub/deep/one"),
        Mirrored(f"{tmp_path}/dummydir/two", "sub/deep/two"),
    ]
    (tmp_path / "one").write_text("")
    with pytest.raises(InvalidManifest, match="would both be one"):
        expand_mirrors({f"{tmp_path}/one": "", f"{tmp_path}/dummydir/one": ""})
