"""What users of pandas, Dask, zarr and fsspec write; their findings as JSON.

python fsspec_reads.py CASE [ARGUMENT...]
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd

from stagefs.errors import StageFSError


def table() -> Any:
    written = pd.DataFrame({"number": range(1000), "square": [n * n for n in range(1000)]})
    read = pd.read_csv("staging:///rows/0.csv")
    read.to_csv("staging:///out/pandas/again.csv", index=False)
    # Again under the same name: who has the old one keeps it.
    with fsspec.open("staging:///out/pandas/again.csv") as old:
        written.to_csv("staging:///out/pandas/again.csv", index=False)
        old_bytes = len(old.read())
    written.to_parquet("staging:///out/pandas/squares.parquet")
    columns = pd.read_parquet("staging:///out/pandas/squares.parquet", columns=["square"])
    return {
        "sum": int(read["number"].sum()),
        "old_bytes": old_bytes,
        "again": int(pd.read_csv("staging:///out/pandas/again.csv")["square"].sum()),
        "squares": int(columns["square"].sum()),
    }


def many_tables(mountpoint: str, named: str) -> Any:
    """With workers that are programs of their own; ``named`` says that the workflow names the
    mount, else the workers find theirs."""
    import dask.dataframe as dd  # noqa: PLC0415  loading it takes seconds, in one case only
    from distributed import Client, LocalCluster  # noqa: PLC0415

    options = {"mount": mountpoint} if named == "named" else {}
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
    )
    with cluster, Client(cluster) as client:
        rows = dd.read_csv("staging:///rows/*.csv", storage_options=options)
        total = int(rows["number"].sum().compute())
        rows.to_parquet("staging:///out/dask", storage_options=options)
        again = dd.read_parquet("staging:///out/dask", storage_options=options)
        return {
            "workers": len(client.scheduler_info()["workers"]),
            "sum": total,
            "again": int(again["number"].sum().compute()),
            "parts": rows.npartitions,
        }


def array(mountpoint: str) -> Any:
    import zarr  # noqa: PLC0415

    options = {"mount": mountpoint}
    cube = zarr.open_array("staging:///cube.zarr", mode="r", storage_options=options)
    corner = int(np.asarray(cube[:100, :100]).sum())
    made = zarr.create_array(
        "staging:///out/doubled.zarr",
        shape=cube.shape,
        chunks=cube.chunks,
        dtype=cube.dtype,
        storage_options=options,
    )
    made[:100, :100] = np.asarray(cube[:100, :100]) * 2
    made.attrs["made"] = "by a task"
    again = zarr.open_array("staging:///out/doubled.zarr", mode="r", storage_options=options)
    return {
        "corner": corner,
        "doubled": int(np.asarray(again[:]).sum()),
        "attribute": again.attrs["made"],
    }


def names(mountpoint: str) -> Any:
    files = fsspec.filesystem("staging", mount=mountpoint)
    files.pipe("staging:///n/a b#1%20.txt", b"content")
    files.pipe({"/n/deep/one": b"1", "/n/deep/two": b"22"})
    worker = pickle.loads(pickle.dumps(files))
    before = files.ukey("/n/deep/one")
    files.link("/n/deep/one", "/n/linked")
    linked = files.ukey("/n/deep/one")
    files.pipe("/n/deep/one", b"one")
    found = {
        "listed": sorted(files.ls("staging:///n", detail=False)),
        "sizes": {one["name"]: one["size"] for one in files.ls("/n/deep")},
        "globbed": sorted(files.glob("staging:///n/**/o*")),
        "walked": sorted(files.find("/n")),
        "used_bytes": files.du("/n/deep"),
        "cut": worker.cat("/n/a b#1%20.txt").decode(),
        "part": files.cat_file("/n/a b#1%20.txt", start=3, end=5).decode(),
        "url": files.unstrip_protocol("/n/deep/one"),
        "key_stays": before == linked,
        "key_changes": before != files.ukey("/n/deep/one"),
        "linked": files.cat("/n/linked").decode(),
        "local": fsspec.open_local("staging:///n/deep/two", mount=mountpoint),
        "escape": files.exists("/../../../etc/passwd"),
        "chained": fsspec.open("simplecache::staging:///n/deep/two", staging={"mount": mountpoint})
        .open()
        .read()
        .decode(),
    }
    files.mv("/n/deep", "/moved/here", recursive=True)
    files.cp("/moved/here/two", "/moved/copy")
    files.rm("/moved/here", recursive=True)
    files.rm("/n/linked")
    files.get("/moved/copy", "fetched")
    files.put("fetched", "/moved/put")
    with files.transaction:
        with files.open("/moved/late", "wb") as late:
            late.write(b"late")
        found["late"] = files.exists("/moved/late")
    found["left"] = sorted(files.find("/"))
    found["put"] = files.cat("/moved/put").decode()
    return found


def refusals(mountpoint: str, empty: str) -> Any:
    def told(act: Callable[[], object]) -> Any:
        try:
            act()
        except (OSError, StageFSError) as exc:
            return [type(exc).__name__, str(exc)]
        return None

    files = fsspec.filesystem("staging", mount=mountpoint)
    absent = fsspec.filesystem("staging", mount=empty)
    return {
        "missing": told(lambda: files.cat("/absent/name")),
        "missing_table": told(
            lambda: pd.read_csv("staging:///absent.csv", storage_options={"mount": mountpoint})
        ),
        "host": told(lambda: files.ls("staging://host/x")),
        "read": told(lambda: absent.cat("/x")),
        "write": told(lambda: absent.pipe("/x", b"x")),
        "exists": told(lambda: absent.exists("/x")),
        "full": told(lambda: files.rmdir("/rows")),
    }


def digest(path: str) -> Any:
    with fsspec.open(path, "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


if __name__ == "__main__":
    cases = (table, many_tables, array, names, refusals, digest)
    case = {one.__name__: one for one in cases}[sys.argv[1]]
    Path("answer.json").write_text(json.dumps(case(*sys.argv[2:])))
