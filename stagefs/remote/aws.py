"""Where S3 credentials, region and endpoint come from: settings, environment, ~/.aws.

The files are read as the AWS tools write them (``[profile name]`` sections in ``config``, plain
ones in ``credentials``); roles, SSO and credential processes are not.  Where nothing is found
here, the identity of the machine is asked for: by obstore for reading, in ``aws_machine`` for
writing.  Never logged.
"""

import configparser
from pathlib import Path

import msgspec

from stagefs.errors import AccessDenied
from stagefs.remote.settings import RemoteSettings

DEFAULT_PROFILE = "default"
DEFAULT_REGION = "us-east-1"
# As the AWS tools call it: where a machine's own keys are asked for.
MACHINE_ENDPOINT_NAME = "AWS_EC2_METADATA_SERVICE_ENDPOINT"


class Keys(msgspec.Struct, frozen=True):
    """What signs a request."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "Keys(...)"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of ~/.aws say of one profile."""

    keys: Keys | None = None
    region: str | None = None
    endpoint: str | None = None


def endpoint(settings: RemoteSettings, profile: Profile) -> str | None:
    """None: the endpoint of AWS itself."""
    environment = settings.environment.get("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return settings.s3.endpoint or environment or profile.endpoint


def region(settings: RemoteSettings, profile: Profile) -> str:
    environment = settings.environment.get("AWS_REGION", "AWS_DEFAULT_REGION")
    return settings.s3.region or environment or profile.region or DEFAULT_REGION


def keys_of_environment(settings: RemoteSettings) -> Keys | None:
    """Keys in the environment give way to a profile that the configuration names."""
    get = settings.environment.get
    key, secret = get("AWS_ACCESS_KEY_ID"), get("AWS_SECRET_ACCESS_KEY")
    if settings.s3.profile is not None or key is None or secret is None:
        return None
    return Keys(key, secret, get("AWS_SESSION_TOKEN"))


def read_profile(settings: RemoteSettings) -> Profile:
    """The profile in force.  Raises AccessDenied when one is named that does not exist."""
    named = settings.s3.profile or settings.environment.get("AWS_PROFILE")
    name = named or DEFAULT_PROFILE
    credentials = _section(_file(settings, "AWS_SHARED_CREDENTIALS_FILE", "credentials"), name)
    config_name = name if name == DEFAULT_PROFILE else f"profile {name}"
    config = _section(_file(settings, "AWS_CONFIG_FILE", "config"), config_name)
    if named is not None and not credentials and not config:
        raise AccessDenied(
            f"The AWS profile {named!r} is not in ~/.aws/credentials or ~/.aws/config: "
            "name another in [remote.s3] profile or AWS_PROFILE."
        )
    both = config | credentials
    key, secret = both.get("aws_access_key_id"), both.get("aws_secret_access_key")
    # An empty token is none; sent, it would be refused.
    token = both.get("aws_session_token") or None
    return Profile(
        keys=Keys(key, secret, token) if key and secret else None,
        region=both.get("region"),
        endpoint=both.get("endpoint_url"),
    )


def _file(settings: RemoteSettings, variable: str, name: str) -> Path | None:
    named = settings.environment.get(variable)
    if named is not None:
        return Path(named)
    return None if settings.home is None else settings.home / ".aws" / name


def _section(path: Path | None, name: str) -> dict[str, str]:
    if path is None:
        return {}
    # Values may hold '%', and nested settings repeat keys.
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, configparser.Error, UnicodeDecodeError) as exc:
        # The parser's own message quotes the line, which may hold the secret.
        raise AccessDenied(f"The file {path} cannot be read: mend it.") from exc
    return dict(parser[name]) if parser.has_section(name) else {}
