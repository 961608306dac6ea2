"""Settings: where they come from, which one wins, and what is refused."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from stagefs.config import (
    KEYS,
    Loaded,
    Settings,
    load_settings,
    load_with_sources,
    parse_assignments,
    parse_lifetime,
    settings_from,
    value_text,
    variable_name,
    walk,
)
from stagefs.errors import InvalidConfig
from stagefs.units import parse_duration, parse_size, size_text

CHECKOUT = Path(__file__).parents[3]
PACKAGED = CHECKOUT / "mount/stagefs.conf"
DOCUMENTATION = CHECKOUT / "docs/CONFIGURATION.md"


def load(tmp_path: Path, environment: Mapping[str, str] | None = None, /, **files: str) -> Loaded:
    """``dropin``, ``dropin2``, ``site``, ``user``, ``config``: the text of each file."""
    places = {
        "dropin": tmp_path / "etc/conf.d/10-a.conf",
        "dropin2": tmp_path / "etc/conf.d/20-b.conf",
        "site": tmp_path / "etc/stagefs.conf",
        "user": tmp_path / "home/.config/stagefs/stagefs.conf",
        "config": tmp_path / "mine.conf",
    }
    for name, text in files.items():
        places[name].parent.mkdir(parents=True, exist_ok=True)
        places[name].write_text(text)
    return load_with_sources(
        config_file=places["config"] if "config" in files else None,
        environment={"HOME": str(tmp_path / "home"), **(environment or {})},
        site_directory=tmp_path / "etc",
    )


def test_each_place_wins_over_the_one_before(tmp_path: Path) -> None:
    def text(seconds: int) -> str:
        return f"[read]\nread_deadline_s = {seconds}"

    places = {}
    for number, name in enumerate(["dropin", "dropin2", "site", "user", "config"], start=1):
        places[name] = text(number)
        loaded = load(tmp_path, None, **places)
        assert loaded.settings.read.read_deadline_s == number, name
    by_environment = load(tmp_path, {"STAGEFS_READ_READ_DEADLINE_S": "6"}, **places)
    assert by_environment.settings.read.read_deadline_s == 6
    sources = {value.key: value.source for value in by_environment.values}
    assert sources["read.read_deadline_s"] == "STAGEFS_READ_READ_DEADLINE_S"
    assert sources["log.level"] == "default"
    by_command_line = load_settings(
        overrides={"read.read_deadline_s": "7"},
        environment={"STAGEFS_READ_READ_DEADLINE_S": "6"},
        site_directory=tmp_path,
    )
    assert by_command_line.read.read_deadline_s == 7


def test_places_are_merged_key_by_key(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        site='[cache]\ncapacity_bytes = "10GiB"\nchunk_bytes = "2MiB"',
        user='[cache]\nchunk_bytes = "4MiB"\n[remote.ssh]\nconfig = "/x"',
    ).settings
    assert settings.cache.capacity_bytes == 10 << 30
    assert settings.cache.chunk_bytes == 4 << 20
    assert settings.remote.ssh.config == "/x"


def test_auto_takes_a_setting_back(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        site='[cache]\ncapacity_bytes = "10GiB"',
        user='[cache]\ncapacity_bytes = "auto"',
    ).settings
    assert settings.cache.capacity_bytes is None


def test_xdg_config_home_is_where_the_user_keeps_his(tmp_path: Path) -> None:
    (tmp_path / "stagefs").mkdir()
    (tmp_path / "stagefs/stagefs.conf").write_text('[log]\nlevel = "debug"')
    settings = load_settings(
        environment={"XDG_CONFIG_HOME": str(tmp_path)}, site_directory=tmp_path / "none"
    )
    assert settings.log.level == "debug"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[cache]\ncapacity = 5",
            r"Unknown setting cache\.capacity in .*/etc/stagefs\.conf.*cache\.capacity_",
        ),
        ("[cach]\nchunk_bytes = 5", r"Unknown setting cach in .*did you mean"),
        ("[cache]\nchunk_bytes = 'big'", r"cache\.chunk_bytes in .*'big' is no size"),
        ("[cache]\nchunk_bytes = 1.5", r"cache\.chunk_bytes in .*Expected `int`"),
        ("[cache]\nchunk_bytes = 1000000", "power of two"),
        ("[cache]\nhigh_watermark = 1.5", "cache.high_watermark"),
        ("[cache]\nlow_watermark = 0.99", "low_watermark in .*stagefs.conf must be below"),
        ("[read]\nread_deadline_s = -1", "read.read_deadline_s"),
        ("[read]\nread_deadline_s = '5 parsecs'", "is no duration"),
        ("[namespace]\ndefault_file_mode = '0999'", "default_file_mode"),
        ("[mount]\nallow_other = 'yes'", "Expected `bool`"),
        ("[mount]\nlifetime = 'long'", "'long' is no lifetime: write pid:N, job or forever"),
        ("[log]\nlevel = 'loud'", "log.level"),
        ("[cache\n", r"/etc/stagefs\.conf is not TOML"),
        ("cache = 5", "Unknown setting cache in"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_in_one_sentence(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(InvalidConfig, match=said) as caught:
        load(tmp_path, site=text)
    assert "\n" not in str(caught.value)


def test_config_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"Cannot read the configuration .*/none: No such file"):
        load_settings(config_file=tmp_path / "none", environment={}, site_directory=tmp_path)


def test_misspelt_variable_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="did you mean STAGEFS_CACHE_CAPACITY_BYTES"):
        load(tmp_path, {"STAGEFS_CACHE_CAPACTIY_BYTES": "1GiB"})


def test_variables_that_are_no_settings_are_left_alone(tmp_path: Path) -> None:
    plain = load(tmp_path).settings
    assert load(tmp_path, {"STAGEFS_MOUNT": "/mnt", "STAGEFSX": "1"}).settings == plain


def test_variables_are_text_of_any_type(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        {
            "STAGEFS_MOUNT_ALLOW_OTHER": "true",
            "STAGEFS_CAPACITY": "3GiB",
            "STAGEFS_REMOTE_ATTEMPTS": "7",
            "STAGEFS_SSH_CONFIG": "/tmp/ssh",
            "STAGEFS_CACHE_CAPACITY_SHARE": "0.25",
        },
    ).settings
    assert settings.mount.allow_other is True
    assert settings.cache.capacity_bytes == 3 << 30
    assert settings.remote.attempts == 7
    assert settings.remote.ssh.config == "/tmp/ssh"
    assert settings.cache.capacity_share == 0.25


def test_every_effective_value_reads_back(tmp_path: Path) -> None:
    values = load(tmp_path).values
    assert [value.key for value in values] == list(KEYS)
    again = load_settings(
        overrides={value.key: value.text for value in values},
        environment={},
        site_directory=tmp_path / "none",
    )
    assert again == Settings()


@pytest.mark.parametrize("seconds", ["0s", "0.25s", "1234567.5s", "604800s"])
def test_times_read_back(seconds: str) -> None:
    settings = settings_from([f"read.read_deadline_s={seconds}"])
    assert dict(walk(settings))["read.read_deadline_s"] == parse_duration(seconds)
    assert value_text("read.read_deadline_s", settings.read.read_deadline_s) == seconds


def test_daemon_reads_neither_files_nor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEFS_LOG_LEVEL", "debug")
    assert settings_from([]) == Settings()
    assert settings_from(["log.level=error"]).log.level == "error"


def test_assignments_of_the_command_line() -> None:
    assert parse_assignments(["log.level=debug", "remote.ssh.config=a=b"]) == {
        "log.level": "debug",
        "remote.ssh.config": "a=b",
    }
    with pytest.raises(InvalidConfig, match="write KEY=VALUE"):
        parse_assignments(["debug"])


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("10GiB", 10 << 30),
        ("10G", 10 << 30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        ("0", 0),
        ("7b", 7),
        ("2tib", 2 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes
    assert parse_size(size_text(size_bytes)) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "10 GiB x", "-1", "1e9", "ten", "10Gi"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("250ms", 0.25), ("5m", 300), ("2h", 7200), ("1.5", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_lifetimes() -> None:
    assert parse_lifetime("pid:42").pid == 42
    assert parse_lifetime("job").kind == "job"
    for text in ("pid:", "pid:-1", "pid:x", "pid:0", ""):
        with pytest.raises(InvalidConfig, match="is no lifetime"):
            parse_lifetime(text)


def test_packaged_file_shows_every_setting_with_its_default() -> None:
    """Uncommented, mount/stagefs.conf is the defaults: no more, no less, in the same order."""
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", PACKAGED.read_text())
    shown = []

    def collect(table: dict[str, object], prefix: str) -> None:
        for name, value in table.items():
            if isinstance(value, dict) and f"{prefix}{name}" not in KEYS:
                collect(value, f"{prefix}{name}.")
            else:
                shown.append(
                    (
                        f"{prefix}{name}",
                        str(value).lower() if value in (True, False) else str(value),
                    )
                )

    collect(tomllib.loads(uncommented), "")
    defaults = [(key, value_text(key, value)) for key, value in walk(Settings())]
    assert sorted(shown) == sorted(defaults)


def test_packaged_file_changes_nothing_as_it_is(tmp_path: Path) -> None:
    assert load(tmp_path, site=PACKAGED.read_text()).settings == Settings()


def test_documentation_names_every_setting_with_its_default_and_variable() -> None:
    text = DOCUMENTATION.read_text()
    for key, value in walk(Settings()):
        row = re.search(rf"^\| `{re.escape(key)}` \| `([^`]+)` \|", text, re.MULTILINE)
        assert row is not None, f"{key} is not in docs/CONFIGURATION.md"
        assert row[1] == value_text(key, value), f"the default of {key} in docs/CONFIGURATION.md"
    for name in re.findall(r"`(STAGEFS_[A-Z_]+[A-Z])`", text):
        known = {variable_name(key) for key in KEYS} | {
            "STAGEFS_MOUNT",
            "STAGEFS_SSH_CONFIG",
            "STAGEFS_CAPACITY",
            "STAGEFS_LOG_LEVEL",
        }
        assert name in known, f"docs/CONFIGURATION.md names {name}, which means nothing"


def test_the_path_map_is_one_setting_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    written = load(tmp_path, site='[path_map]\n"submit:/home" = "ssh://submit/home"\n')
    expected = {"submit:/home": "ssh://submit/home"}
    assert written.settings.path_map == expected
    (text,) = [value.text for value in written.values if value.key == "path_map"]
    assert settings_from([f"path_map={text}"]).path_map == expected
    with pytest.raises(InvalidConfig, match="path_map"):
        load(tmp_path, site='path_map = { "submit:/home" = 7 }\n')
