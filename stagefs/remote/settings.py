"""What the remotes need to know, as one frozen value.

``from_config`` makes it of the configuration and of the few environment variables that
other tools have made customary (proxies, AWS).  The registry asks ``for_scheme`` for each
driver's own view, in which the scheme's section has overridden the general values; a driver
reads only that.  Plain values, to be used from any thread; the repr shows no credential.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from stagefs.config import (
    AzSettings,
    CommandSettings,
    GsSettings,
    HttpSettings,
    IrodsSettings,
    RemoteDefaults,
    S3Settings,
    SshSettings,
)

Section: TypeAlias = (
    AzSettings
    | CommandSettings
    | GsSettings
    | HttpSettings
    | IrodsSettings
    | S3Settings
    | SshSettings
)

ENVIRONMENT_NAMES = frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CONFIG_FILE",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_TENANT_ID",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "IRODS_ENVIRONMENT_FILE",
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "NO_PROXY",
        "no_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NETRC",
        "BEARER_TOKEN",
        "BEARER_TOKEN_FILE",
        "XDG_RUNTIME_DIR",
        "SSL_CERT_FILE",
    }
)


class Environment(msgspec.Struct, frozen=True):
    """The environment variables that remotes honour.  Holds secrets, so it shows only names."""

    values: Mapping[str, str] = {}

    def get(self, *names: str) -> str | None:
        """The first of these that is set and not empty."""
        return next((self.values[name] for name in names if self.values.get(name)), None)

    def __repr__(self) -> str:
        return f"Environment({', '.join(sorted(self.values))})"


class RemoteSettings(msgspec.Struct, frozen=True, kw_only=True):
    connect_timeout_s: float = 10.0
    answer_timeout_s: float = 20.0
    """From the connection to the first byte of the answer."""
    progress_timeout_s: float = 20.0
    """A transfer that moves no byte for so long has failed."""
    attempts: int = 4
    attempts_deadline_s: float = 90.0
    """No further attempt begins when so much time has passed since the first."""
    backoff_s: float = 0.2
    """Before the second attempt; doubles for each further one, with jitter."""
    backoff_s_max: float = 10.0
    restart_s: float = 30.0
    """For so long a server that went away a moment ago is asked again before anybody is told."""
    concurrency: int = 16
    """Transfers from one host at a time."""
    lookups: int = 16
    """Stats and listings at one host at a time, beside the transfers."""
    remotes_max: int = 256
    """Hosts whose connections are kept; idle ones beyond that are closed."""

    home: Path | None = None
    """Where netrc and .aws are looked for."""
    environment: Environment = Environment()
    http: HttpSettings = HttpSettings()
    s3: S3Settings = S3Settings()
    ssh: SshSettings = SshSettings()
    gs: GsSettings = GsSettings()
    az: AzSettings = AzSettings()
    irods: IrodsSettings = IrodsSettings()
    command: CommandSettings = CommandSettings()

    def for_scheme(self, scheme: str) -> "RemoteSettings":
        """These settings with the overrides of the scheme's own section in place."""
        sections: dict[str, Section] = {
            "az": self.az,
            "command": self.command,
            "gs": self.gs,
            "http": self.http,
            "https": self.http,
            "irods": self.irods,
            "s3": self.s3,
            "ssh": self.ssh,
            "sftp": self.ssh,
            "webdav": self.http,
            "webdavs": self.http,
        }
        section = sections.get(scheme)
        if section is None:
            return self
        return msgspec.structs.replace(
            self,
            connect_timeout_s=_first(section.connect_timeout_s, self.connect_timeout_s),
            answer_timeout_s=_first(section.progress_timeout_s, self.answer_timeout_s),
            progress_timeout_s=_first(section.progress_timeout_s, self.progress_timeout_s),
            attempts=section.attempts or self.attempts,
            concurrency=section.concurrency or self.concurrency,
        )


def from_config(
    remote: RemoteDefaults, *, environment: Mapping[str, str], home: Path | None
) -> RemoteSettings:
    """The settings of all remotes.  ``environment`` is the user's whole environment, of which
    only ENVIRONMENT_NAMES are kept; ``home`` is the user's home directory."""
    kept = {name: value for name, value in environment.items() if name in ENVIRONMENT_NAMES}
    return RemoteSettings(
        connect_timeout_s=remote.connect_timeout_s,
        answer_timeout_s=remote.progress_timeout_s,
        progress_timeout_s=remote.progress_timeout_s,
        attempts=remote.attempts,
        concurrency=remote.concurrency,
        restart_s=remote.ssh.restart_s,
        home=home,
        environment=Environment(kept),
        http=remote.http,
        s3=remote.s3,
        ssh=remote.ssh,
        gs=remote.gs,
        az=remote.az,
        irods=remote.irods,
        command=remote.command,
    )


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
