"""Asks the storage plug-in itself, as Snakemake does; run in Snakemake's environment.

    snakemake_storage.py MNT LOCAL_DIRECTORY SSH_URL

SSH_URL ends with a slash.  Prints one JSON object.
"""

import json
import logging
import os
import sys
from pathlib import Path

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_storage_plugin_stagefs import StorageObject, StorageProvider, StorageProviderSettings

mountpoint, local, url = sys.argv[1:]
provider = StorageProvider(
    local_prefix=Path(local),
    logger=logging.getLogger(),
    settings=StorageProviderSettings(mount=mountpoint),
)


def one(query: str) -> StorageObject:
    return StorageObject(query=query, keep_local=False, retrieve=True, provider=provider)


def made(query: str, text: str) -> StorageObject:
    """Stored as a job stores it."""
    thing = one(query)
    thing.local_path().parent.mkdir(parents=True, exist_ok=True)
    thing.local_path().write_text(text)
    os.utime(thing.local_path(), (1_500_000_000, 1_500_000_000))
    thing.store_object()
    return thing


def refusal(query: str) -> str:
    try:
        made(query, "x")
    except WorkflowError as error:
        return str(error)
    return "nothing"


answer: dict[str, object] = {}
staged = made("staging:///out/a", "first")
answer["links"] = staged.local_path().stat().st_nlink
staged = made("staging:///out/a", "second, longer")
answer["staged"] = [staged.exists(), staged.size(), staged.mtime(), staged.local_footprint()]
tree = one("staging:///tree")
(tree.local_path() / "sub").mkdir(parents=True)
(tree.local_path() / "sub/leaf").write_text("leaf")
tree.store_object()
tree.store_object()
answer["tree"] = sorted(one("staging:///{any}").list_candidate_matches())
remote = made(f"{url}b c", "far away")
answer["remote"] = [remote.exists(), remote.size(), remote.mtime(), remote.local_footprint()]
answer["listed"] = [*one(f"{url}{{sample}}").list_candidate_matches()]
remote.local_path().unlink()
remote.retrieve_object()
answer["read"] = remote.local_path().read_text()
staged.remove()
remote.remove()
answer["removed"] = [staged.exists(), remote.exists()]
answer["refused"] = refusal("https://127.0.0.1:1/x")
valid = {
    query: bool(provider.is_valid_query(query)) for query in ("ssh://h/{x}", "x", "s3://b/../k")
}
answer["valid"] = valid
answer["suffix"] = one("https://me:secret@h/{x}/y?z=1").local_suffix()
sys.stdout.write(json.dumps(answer))
