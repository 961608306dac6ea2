from pathlib import Path

import pytest

from stagefs.config import S3Settings
from stagefs.errors import AccessDenied
from stagefs.remote.aws import Keys, endpoint, keys_of_environment, read_profile, region
from stagefs.remote.settings import Environment, RemoteSettings

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "S3cret"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id=d\naws_secret_access_key=ds\n"
        "[lab]\naws_access_key_id=l\naws_secret_access_key=l%s\naws_session_token=lt\n"
    )
    (tmp_path / ".aws/config").write_text(
        "[default]\nregion = north\n"
        "[profile lab]\nregion = south\nendpoint_url = https://s3.lab\ns3 =\n  x = 1\n"
        "[profile roles]\nrole_arn = arn:1\n"
    )
    return tmp_path


def settings(
    home: Path | None = None, s3: S3Settings | None = None, **environment: str
) -> RemoteSettings:
    return RemoteSettings(home=home, s3=s3 or S3Settings(), environment=Environment(environment))


def test_nothing_anywhere() -> None:
    nothing = settings()
    profile = read_profile(nothing)
    assert profile.keys is None
    assert keys_of_environment(nothing) is None
    assert endpoint(nothing, profile) is None
    assert region(nothing, profile) == "us-east-1"


def test_default_profile(home: Path) -> None:
    profile = read_profile(settings(home))
    assert profile.keys == Keys("d", "ds")
    assert profile.region == "north"


@pytest.mark.parametrize("by", ["setting", "environment"])
def test_named_profile(home: Path, by: str) -> None:
    if by == "setting":
        found = read_profile(settings(home, S3Settings(profile="lab"), AWS_PROFILE="absent"))
    else:
        found = read_profile(settings(home, AWS_PROFILE="lab"))
    assert found.keys == Keys("l", "l%s", "lt")
    assert (found.region, found.endpoint) == ("south", "https://s3.lab")


def test_profile_without_keys(home: Path) -> None:
    assert read_profile(settings(home, AWS_PROFILE="roles")).keys is None


def test_absent_profile_is_told(home: Path) -> None:
    with pytest.raises(AccessDenied, match="'absent'"):
        read_profile(settings(home, AWS_PROFILE="absent"))


def test_what_counts_most(home: Path) -> None:
    profile = read_profile(settings(home, AWS_PROFILE="lab"))
    environment = settings(
        home,
        AWS_ENDPOINT_URL="https://general",
        AWS_ENDPOINT_URL_S3="https://s3",
        AWS_DEFAULT_REGION="west",
    )
    assert endpoint(environment, profile) == "https://s3"
    assert region(environment, profile) == "west"
    set_up = settings(
        home, S3Settings(endpoint="https://site", region="east"), AWS_ENDPOINT_URL="https://general"
    )
    assert endpoint(set_up, profile) == "https://site"
    assert region(set_up, profile) == "east"
    assert endpoint(settings(home), profile) == "https://s3.lab"


def test_keys_of_the_environment() -> None:
    assert keys_of_environment(settings(None, None, **KEYS)) == Keys("key", "S3cret")
    with_token = settings(None, None, **KEYS, AWS_SESSION_TOKEN="t")
    assert keys_of_environment(with_token) == Keys("key", "S3cret", "t")
    assert keys_of_environment(settings(AWS_ACCESS_KEY_ID="key")) is None
    # The configuration names a profile: that is meant, not what the shell happens to hold.
    assert keys_of_environment(settings(None, S3Settings(profile="lab"), **KEYS)) is None


def test_files_named_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("[default]\naws_access_key_id=f\naws_secret_access_key=fs\n")
    assert read_profile(settings(AWS_SHARED_CREDENTIALS_FILE=str(path))).keys == Keys("f", "fs")


def test_broken_file_is_told_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("aws_secret_access_key=S3cret\n")
    with pytest.raises(AccessDenied) as caught:
        read_profile(settings(AWS_SHARED_CREDENTIALS_FILE=str(path)))
    assert str(path) in str(caught.value)
    assert "S3cret" not in str(caught.value)


def test_keys_do_not_show() -> None:
    assert "S3cret" not in repr(Keys("key", "S3cret", "t0ken"))
    assert "S3cret" not in str(Keys("key", "S3cret", "t0ken"))
