"""``gs://bucket/key`` and ``az://container/key``: Google's and Azure's object stores, by obstore.

Reading is ``store``'s.  Writing is obstore's too: these stores refuse to replace an object on
their side, when a small one is made and when one is copied.  So a large object that must not
replace another is sent under a temporary key, copied there by the server, and the temporary
one removed.  obstore commits a large object only when its last byte came; a put that is
stopped leaves at most blocks without a name, which both services remove by themselves
(Azure after a week, Google by the bucket's rules).
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import obstore
import trio
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, GCSStore

from stagefs.errors import (
    AccessDenied,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, Checksum, ObjectInfo
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.source import Source, exists, prove
from stagefs.remote.store import Store, StoreRemote, check_key, condition, described_meta, key_of
from stagefs.remote.store_errors import translated
from stagefs.remote.temporaries import temporary_name, token_of
from stagefs.remote.threads import Call, SourceCall
from stagefs.remote.url import last_name, name_to_write, parse

SMALL_BYTES_MAX = 4 * MIB
PART_BYTES = 8 * MIB
PARTS_AT_ONCE = 4
PIECE_BYTES = MIB
# A part is on its way for a while without the source being asked for more.
PROGRESS_SLACK = 4.0
# Removing what a put could not finish may take no longer: the caller has been told already.
CLEANING_S = 5.0


class CloudRemote(StoreRemote):
    """The driver of ``gs://`` and ``az://`` for one bucket or container."""

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        del mode  # objects have none
        name_to_write(url)
        self._check(url)
        temporary: list[str] = []

        def work(call: SourceCall[ObjectInfo]) -> ObjectInfo:
            local = Source(call.source, url=url, size_bytes=size_bytes)
            prove(local, checksum, at_each_step=call.moved)
            with translated(url):
                return self._put(call, local, temporary, overwrite=overwrite)

        call = SourceCall(
            work,
            url=url,
            source=source,
            progress=progress,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s * PROGRESS_SLACK,
        )
        try:
            return await call.run(self._put_threads)
        finally:
            if temporary:
                await self._clean(url, temporary[0])

    async def _clean(self, url: str, key: str) -> None:
        def work(call: Call[None]) -> None:
            del call
            with translated(url), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store(), key)

        with (
            trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANING_S),
            contextlib.suppress(StageFSError),
        ):
            await self._call(work, url).run(self._put_threads)

    def _check(self, url: str) -> None:
        check_key(url)
        if parse(url).scheme == "az" and "\\" in key_of(url):
            raise RemoteError(
                f"The key of {url} cannot be written: Azure takes a backslash for a slash."
            )

    # In worker threads.

    def _new_store(self) -> Store:
        if parse(self._host_url).scheme == "gs":
            return _google(self._host_url, self._settings)
        return _azure(self._host_url, self._settings)

    def _put(
        self, call: SourceCall[Any], local: Source, temporary: list[str], *, overwrite: bool
    ) -> ObjectInfo:
        """``temporary`` gets the key that is to be removed if this does not end well."""
        url = local.url
        if not overwrite:
            found = self._done(call, local)
            if found is not None:
                return found
        try:
            if local.size_bytes <= SMALL_BYTES_MAX:
                self._put_small(call, local, overwrite=overwrite)
            elif overwrite:
                self._send(call, local, key_of(url))
            else:
                self._put_large(call, local, temporary)
        except AlreadyExistsError as exc:
            found = self._done(call, local)
            if found is None:
                raise RemoteUnavailable(f"{url} came and went while it was written.") from exc
            return found
        info = self._head(url)
        if info.size_bytes != local.size_bytes:
            raise RemoteUnavailable(
                f"{url} has {info.size_bytes} bytes after {local.size_bytes} were written: "
                "somebody else replaced it."
            )
        return info

    def _put_small(self, call: SourceCall[Any], local: Source, *, overwrite: bool) -> None:
        data = local.read(0, local.size_bytes)
        mode: Literal["create", "overwrite"] = "overwrite" if overwrite else "create"
        obstore.put(self._store(), key_of(local.url), data, mode=mode, use_multipart=False)
        call.moved(len(data))

    def _put_large(self, call: SourceCall[Any], local: Source, temporary: list[str]) -> None:
        key = key_of(local.url)
        name = temporary_name(last_name(local.url), token_of(local.url, local.fd))
        directory, slash, _ = key.rpartition("/")
        beside = f"{directory}{slash}{name}"
        temporary.append(beside)
        self._send(call, local, beside)
        obstore.copy(self._store(), beside, key, overwrite=False)
        copied = obstore.head(self._store(), key)["size"]
        if copied != local.size_bytes:
            raise RemoteUnavailable(
                f"{local.url} has {copied} of its {local.size_bytes} bytes after it was copied."
            )

    def _send(self, call: SourceCall[Any], local: Source, key: str) -> None:
        def pieces() -> Iterator[bytes]:
            for offset in range(0, local.size_bytes, PIECE_BYTES):
                piece = local.read(offset, min(PIECE_BYTES, local.size_bytes - offset))
                yield piece
                call.moved(len(piece))

        obstore.put(
            self._store(),
            key,
            pieces(),
            use_multipart=True,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )

    def _done(self, call: SourceCall[Any], local: Source) -> ObjectInfo | None:
        """What is there, when it has this very content; None when nothing is.  Raises NameExists
        when it has another."""
        try:
            found = self._head(local.url)
        except ObjectMissing:
            return None
        if found.size_bytes != local.size_bytes or not self._equals(call, local, found):
            raise exists(local.url)
        return found

    def _equals(self, call: SourceCall[Any], local: Source, found: ObjectInfo) -> bool:
        options = condition(found.validator)
        result = obstore.get(self._store(), key_of(local.url), options=options)
        if described_meta(local.url, result.meta).size_bytes != local.size_bytes:
            return False
        offset = 0
        for piece in result.stream(min_chunk_size=PIECE_BYTES):
            theirs = bytes(piece)
            if theirs != local.read(offset, len(theirs)):
                return False
            offset += len(theirs)
            call.moved()
        return offset == local.size_bytes


def _google(host_url: str, settings: RemoteSettings) -> GCSStore:
    gs = settings.gs
    options: dict[str, Any] = _common(settings, gs.ca_file, gs.endpoint)
    if gs.endpoint is not None:
        options["base_url"] = gs.endpoint
    file = gs.credentials_file or settings.environment.get("GOOGLE_APPLICATION_CREDENTIALS")
    if gs.anonymous:
        options["skip_signature"] = True
    elif file is not None:
        if not Path(file).is_file():
            raise AccessDenied(
                f"The credentials for {host_url} in {file} cannot be read: mend "
                "GOOGLE_APPLICATION_CREDENTIALS or [remote.gs] credentials_file."
            )
        options["application_credentials"] = file
    with translated(host_url):
        return GCSStore(parse(host_url).host, **options)


def _azure(host_url: str, settings: RemoteSettings) -> AzureStore:
    az, environment = settings.az, settings.environment
    parts = parse(host_url)
    account = parts.user or az.account or environment.get("AZURE_STORAGE_ACCOUNT_NAME")
    if account is None:
        raise AccessDenied(
            f"The storage account of {host_url} is not known: set AZURE_STORAGE_ACCOUNT_NAME or "
            f"[remote.az] account, or write az://ACCOUNT@{parts.host}/."
        )
    endpoint = az.endpoint or environment.get("AZURE_STORAGE_ENDPOINT")
    options: dict[str, Any] = {**_common(settings, az.ca_file, endpoint), "account_name": account}
    if endpoint is not None:
        options["endpoint"] = endpoint
    if az.anonymous:
        options["skip_signature"] = True
    else:
        options |= {
            option: value
            for option, name in _AZURE_OPTIONS.items()
            if (value := environment.get(name)) is not None
        }
    with translated(host_url):
        return AzureStore(parts.host, **options)


_AZURE_OPTIONS = {
    "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "sas_key": "AZURE_STORAGE_SAS_TOKEN",
    "client_id": "AZURE_CLIENT_ID",
    "client_secret": "AZURE_CLIENT_SECRET",
    "tenant_id": "AZURE_TENANT_ID",
    "federated_token_file": "AZURE_FEDERATED_TOKEN_FILE",
}


def _common(settings: RemoteSettings, ca_file: str | None, endpoint: str | None) -> dict[str, Any]:
    stall_s = max(settings.answer_timeout_s, settings.progress_timeout_s)
    client: dict[str, Any] = {
        "connect_timeout": datetime.timedelta(seconds=settings.connect_timeout_s),
        "read_timeout": datetime.timedelta(seconds=stall_s),
        # For a whole request, which may be a large range on a slow link.
        "timeout": datetime.timedelta(days=1),
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
    }
    if ca_file is not None:
        try:
            client["root_certificate"] = Path(ca_file).read_bytes()
        except OSError as exc:
            raise RemoteError(
                f"The certificates in {ca_file} (ca_file) cannot be read ({exc.strerror}): "
                "name a file of PEM certificates."
            ) from exc
    return {"client_options": client, "retry_config": {"max_retries": 0}}
