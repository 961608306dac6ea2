"""``az://`` and ``gs://`` beyond the contract: where keys come from, and what is said without."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from stagefs.config import AzSettings, GsSettings
from stagefs.errors import AccessDenied, ObjectMissing, RemoteError, RemoteUnavailable
from stagefs.remote.cloud import CloudRemote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import Environment, RemoteSettings
from tests.contract.subjects import BUCKET, SETTINGS
from tests.contract.test_put import put_bytes
from tests.support.azurite import ACCOUNT, KEY, Azurite
from tests.support.ports import free_ports

pytestmark = pytest.mark.timeout(60)


def settings(
    environment: Mapping[str, str], *, az: AzSettings | None = None, gs: GsSettings | None = None
) -> RemoteSettings:
    return msgspec.structs.replace(
        SETTINGS,
        environment=Environment(environment),
        az=az or AzSettings(),
        gs=gs or GsSettings(),
    )


def remote(host_url: str, known: RemoteSettings) -> CloudRemote:
    return CloudRemote(host_url, known, CredentialStore(None))


async def test_the_account_comes_from_url_settings_or_environment(azurite: Azurite) -> None:
    endpoint = azurite.environment["AZURE_STORAGE_ENDPOINT"]
    keys = {"AZURE_STORAGE_ACCOUNT_KEY": KEY}
    for host_url, known in (
        (f"az://{ACCOUNT}@{BUCKET}", settings(keys, az=AzSettings(endpoint=endpoint))),
        (f"az://{BUCKET}", settings(keys, az=AzSettings(endpoint=endpoint, account=ACCOUNT))),
        (f"az://{BUCKET}", settings(azurite.environment)),
    ):
        driver = remote(host_url, known)
        with pytest.raises(ObjectMissing):
            await driver.stat(f"{host_url}/absent")
        await driver.aclose()
    driver = remote(f"az://{BUCKET}", settings(keys))
    with pytest.raises(AccessDenied, match="AZURE_STORAGE_ACCOUNT_NAME"):
        await driver.stat(f"az://{BUCKET}/x")


async def test_a_container_that_does_not_exist(azurite: Azurite) -> None:
    driver = remote("az://nowhere", settings(azurite.environment))
    with pytest.raises(ObjectMissing, match=r"no .*az://nowhere/x"):
        await driver.stat("az://nowhere/x")


async def test_wrong_keys_are_not_quoted(azurite: Azurite) -> None:
    wrong = "AAAA" + KEY[4:]
    known = settings({**azurite.environment, "AZURE_STORAGE_ACCOUNT_KEY": wrong})
    driver = remote(f"az://{BUCKET}", known)
    with pytest.raises(AccessDenied, match="AZURE_STORAGE_") as caught:
        await anext(driver.list(f"az://{BUCKET}/x"))
    assert wrong not in str(caught.value)
    assert "AWS" not in str(caught.value)


async def test_a_key_that_azure_would_change_is_refused(tmp_path: Path) -> None:
    driver = remote(f"az://{BUCKET}", settings({}))
    with pytest.raises(RemoteError, match="backslash"):
        await put_bytes(driver, f"az://{BUCKET}/a\\b", b"x", tmp_path / "source")


async def test_google_without_credentials_or_server(tmp_path: Path) -> None:
    named = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "none.json")}
    with pytest.raises(AccessDenied, match="GOOGLE_APPLICATION_CREDENTIALS"):
        await remote("gs://bucket", settings(named)).stat("gs://bucket/x")
    (port,) = free_ports(1)
    gs = GsSettings(endpoint=f"http://127.0.0.1:{port}", anonymous=True)
    with pytest.raises(RemoteUnavailable, match="gs://bucket/x"):
        await remote("gs://bucket", settings({}, gs=gs)).stat("gs://bucket/x")
