"""What a user of Parsl writes: one workflow, its findings printed as JSON.

python parsl_tasks.py CASE EXECUTOR MOUNTPOINT [ARGUMENT...]
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import parsl
from parsl.app.app import bash_app, python_app
from parsl.data_provider.data_manager import default_staging
from parsl.data_provider.files import File
from parsl.executors import HighThroughputExecutor, ThreadPoolExecutor
from parsl.providers import LocalProvider

from stagefs.control.client import Client
from stagefs.errors import StageFSError
from stagefs.integrations.parsl import SCHEMES, StageFSStaging, path, sandboxed

TIMEOUT_S = 120


@contextlib.contextmanager
def loaded(
    executor: str,
    mountpoint: str,
    *,
    eager: bool = False,
    strict: bool = False,
    schemes: frozenset[str] = SCHEMES,
    workers: int = 2,
) -> Iterator[StageFSStaging]:
    staging = StageFSStaging(mountpoint, eager=eager, strict=strict, schemes=schemes)
    access = [staging, *default_staging]
    if executor == "threads":
        chosen = ThreadPoolExecutor(max_threads=4, storage_access=access)
    else:
        chosen = HighThroughputExecutor(
            label="htex",
            address="127.0.0.1",
            max_workers_per_node=workers,
            storage_access=access,
            provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
        )
    config = parsl.Config(executors=[chosen], run_dir=os.path.abspath("runinfo"))
    with parsl.load(config):
        yield staging


@python_app
def digest(file: "File") -> str:
    import hashlib  # noqa: PLC0415  an app is run by a worker, and brings what it needs

    with open(file, "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


@python_app
def doubled(inputs: "list[File]" = (), outputs: "list[File]" = ()) -> int:  # type: ignore[assignment]
    with open(inputs[0], "rb") as source, open(outputs[0], "wb") as target:
        return target.write(source.read() * 2)


@bash_app
def counted(
    source: "File | None" = None,
    stdout: "File | None" = None,
    outputs: "list[File]" = (),  # type: ignore[assignment]
) -> str:
    return f"wc -c < {source}; cp {source} {outputs[0]}"


@python_app
def failing(outputs: "list[File]" = ()) -> None:  # type: ignore[assignment]
    with open(outputs[0], "w") as target:
        target.write("half")
    raise ValueError("the task failed")


@python_app
def joined(inputs: "list[File]" = (), outputs: "list[File]" = ()) -> int:  # type: ignore[assignment]
    """All inputs into the first output, their number into the second."""
    with open(outputs[0], "wb") as target:
        for each in inputs:
            with open(each, "rb") as source:
                target.write(source.read())
    with open(outputs[1], "w") as target:
        return target.write(str(len(inputs)))


@python_app(cache=True)
def noted(log: str, file: "File", outputs: "list[File]" = ()) -> int:  # type: ignore[assignment]
    """Says in ``log`` that it ran."""
    with open(log, "a") as ran:
        ran.write("x")
    with open(file, "rb") as source:
        data = source.read()
    for each in outputs:
        with open(each, "wb") as target:
            target.write(data)
    return len(data)


@bash_app
@sandboxed
def in_step(word: str, before: str, after: str, outputs: "list[File]" = ()) -> str:  # type: ignore[assignment]
    """Writes ``result`` while another one does, and publishes it when both have."""
    return f"echo {word} >result; {before}; {after}; (cat result; pwd) >{outputs[0]}"


@bash_app(cache=True)
@sandboxed
def breaking(log: str, stdout: "File | None" = None) -> str:
    return f"echo half >result; echo x >>{log}; exit 3"


@bash_app(cache=True)
@sandboxed
def counting(log: str, file: "File", stdout: "str | None" = None) -> str:
    return f"ln {file} linked; echo -n x >>{log}; wc -c <linked"


def failure(future: "parsl.AppFuture | parsl.DataFuture") -> dict[str, object]:
    error = future.exception(timeout=TIMEOUT_S)
    cause = error.__cause__ or error
    return {"text": str(cause), "is_ours": isinstance(cause, StageFSError)}


def read_and_chain(executor: str, mountpoint: str) -> dict[str, object]:
    """The namespace has input.dat."""
    with loaded(executor, mountpoint):
        direct = digest(File("staging:///input.dat"))
        by_keyword = digest(file=File("staging:///input.dat"))
        first = doubled(
            inputs=[File("staging:///input.dat")], outputs=[File("staging:///out/twice")]
        )
        second = doubled(inputs=[first.outputs[0]], outputs=[File("staging:///out/deep/again")])
        counting = counted(
            source=second.outputs[0],
            stdout=File("staging:///out/count.txt"),
            outputs=[File("staging:///out/other/count.txt")],
        )
        return {
            "direct": direct.result(timeout=TIMEOUT_S),
            "by_keyword": by_keyword.result(timeout=TIMEOUT_S),
            "again": digest(second.outputs[0]).result(timeout=TIMEOUT_S),
            "stdout": Path(path(counting.stdout.result(timeout=TIMEOUT_S))).read_text(),
            "path": path(counting.outputs[0].result(timeout=TIMEOUT_S)),
        }


def cold_object(executor: str, mountpoint: str, url: str) -> dict[str, object]:
    with loaded(executor, mountpoint, workers=4):
        futures = [digest(File(url)) for _ in range(8)]
        return {"digests": [future.result(timeout=TIMEOUT_S) for future in futures]}


def outputs_first(executor: str, mountpoint: str) -> dict[str, object]:
    """What is to be seen of an output when its Future is done; and of two that fail."""
    Path("plain").write_text("plain")
    with loaded(executor, mountpoint) as staging:
        made = doubled(inputs=[File("staging:///input.dat")], outputs=[File("staging:///made")])
        made.outputs[0].result(timeout=TIMEOUT_S)
        place = staging.path(File("staging:///made"))
        seen = os.stat(place).st_size
        state = os.getxattr(place, "user.stagefs.state").decode()
        taken = doubled(inputs=[File("staging:///input.dat")], outputs=[File("staging:///made")])
        broken = failing(outputs=[File("staging:///broken")])
        return {
            "seen": seen,
            "state": state,
            "plain": digest(File(os.path.abspath("plain"))).result(timeout=TIMEOUT_S),
            "taken": failure(taken.outputs[0]),
            "taken_task": taken.result(timeout=TIMEOUT_S),
            "broken": failure(broken.outputs[0]),
        }


def refused_inputs(executor: str, mountpoint: str, url: str) -> dict[str, object]:
    """``url``: of nothing."""
    with loaded(executor, mountpoint, strict=True):
        cut = ""
        try:
            digest(File("staging:///a b#c"))
        except ValueError as error:
            cut = str(error)
        missing = failure(digest(File("staging:///absent")))
        remote = failure(digest(File(url)))
    parsl.clear()
    with loaded(executor, mountpoint):
        lazy = failure(digest(File("staging:///absent")))
    return {"cut": cut, "missing": missing, "remote": remote, "lazy": lazy}


def eager_inputs(executor: str, mountpoint: str) -> dict[str, object]:
    """``wrong`` in the namespace cannot be fetched."""
    with loaded(executor, mountpoint, eager=True):
        return {
            "good": digest(File("staging:///input.dat")).result(timeout=TIMEOUT_S),
            "wrong": failure(digest(File("staging:///wrong"))),
        }


def side_by_side(executor: str, mountpoint: str, url: str) -> dict[str, object]:
    """``url``: a directory with one/same and two/same; ``wrong`` in the namespace cannot be
    fetched."""
    log = os.path.abspath("ran")
    for name in ("ping", "pong"):
        os.mkfifo(name)
    ping, pong = os.path.abspath("ping"), os.path.abspath("pong")
    with loaded(executor, mountpoint):
        named = joined(
            inputs=[File(f"{url}/one/same"), File(f"{url}/two/same")],
            outputs=[File("staging:///first/same"), File("staging:///second/same")],
        )
        pair = [
            in_step("one", f"echo >{ping}", f"read <{pong}", outputs=[File("staging:///1")]),
            in_step("two", f"read <{ping}", f"echo >{pong}", outputs=[File("staging:///2")]),
        ]
        broken = breaking(log)
        unread = digest(File("staging:///wrong"))
        told = failure(unread)
        return {
            "named": [Path(path(one.result(timeout=TIMEOUT_S))).name for one in named.outputs],
            "pair": [
                Path(path(one.outputs[0].result(timeout=TIMEOUT_S))).read_text().split()
                for one in pair
            ],
            "broken": str(broken.exception(timeout=TIMEOUT_S)),
            "unread": {**told, "whole": str(unread.exception())},
        }


def memoized(executor: str, mountpoint: str, url: str) -> dict[str, object]:
    """``url``: another object than input.dat."""
    client, log = Client.of(mountpoint), Path("ran").absolute()
    log.write_text("")
    results: list[int] = []
    runs: list[int] = []

    def again(*, into: str = "") -> "parsl.AppFuture":
        outputs = [File(into)] if into else []
        future = noted(str(log), File("staging:///input.dat"), outputs=outputs)
        results.append(future.result(timeout=TIMEOUT_S))
        runs.append(len(log.read_text()))
        return future

    with loaded(executor, mountpoint):
        again()
        again()
        client.stage_in([url], "staging:///input.dat", replace=True)
        again()
        again()
        again(into="staging:///made").outputs[0].result(timeout=TIMEOUT_S)
        again(into="staging:///made").outputs[0].result(timeout=TIMEOUT_S)
        client.remove("staging:///made")
        gone = failure(again(into="staging:///made").outputs[0])
        for _ in range(2):
            counting(str(log), File("staging:///input.dat")).result(timeout=TIMEOUT_S)
        return {"results": results, "runs": [*runs, len(log.read_text())], "gone": gone}


def other_files(executor: str, mountpoint: str, url: str) -> dict[str, object]:
    Path("plain").write_text("plain")
    with loaded(executor, mountpoint, schemes=frozenset({"staging"})):
        made = joined(
            inputs=[File(os.path.abspath("plain")), File("staging:///input.dat")],
            outputs=[File(os.path.abspath("made")), File("staging:///made")],
        )
        return {
            "downloaded": digest(File(url)).result(timeout=TIMEOUT_S),
            "made": made.result(timeout=TIMEOUT_S),
            "outputs": [one.result(timeout=TIMEOUT_S).url for one in made.outputs],
            "size": os.stat("made").st_size,
        }


if __name__ == "__main__":
    cases: dict[str, Callable[..., dict[str, object]]] = {
        "read_and_chain": read_and_chain,
        "cold_object": cold_object,
        "outputs_first": outputs_first,
        "refused_inputs": refused_inputs,
        "eager_inputs": eager_inputs,
        "side_by_side": side_by_side,
        "memoized": memoized,
        "other_files": other_files,
    }
    found = cases[sys.argv[1]](*sys.argv[2:])
    Path("answer.json").write_text(json.dumps(found))
