"""What Grid Engine's prolog reads in the spool directory of a job."""

from pathlib import Path

import pytest

from stagefs.control.api import Failure
from stagefs.control.client import Refused
from stagefs.errors import InvalidManifest, InvalidName, MountFailed, StageFSError
from stagefs.integrations.batch_outcome import is_transient
from stagefs.integrations.grid_engine import (
    JOB_ERROR,
    Stream,
    Streams,
    prolog,
    spooled_job,
    streams_of,
)

# As execd 8.1.9 writes it, shortened.
CONFIG = """fs_stdin_host=submit
fs_stdin_file_staging=1
fs_stdout_host=submit
fs_stdout_file_staging=1
fs_stderr_host=""
fs_stderr_file_staging=1
stdout_path=/data/out put.txt
stderr_path=/data/x=y.err
stdin_path=/data/in.txt
merge_stderr=0
tmpdir=/tmp/12.3.all.q
job_owner=root
cwd=/home/me
job_id=12
ja_task_id=3
"""


def config_with(**values: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in CONFIG.splitlines())
    return {**{name: value for name, _, value in pairs}, **values}


def test_a_job(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIG)
    (tmp_path / "environment").write_text("SGE_O_HOST=submit\nSTAGEFS_IN=a=b c=d\nEMPTY=\n")
    job = spooled_job(tmp_path)
    assert (job.name, job.owner) == ("12.3", "root")
    assert job.scratch == Path("/tmp/12.3.all.q")
    assert (job.submission.host, job.submission.directory) == ("submit", "/home/me")
    assert job.variables["STAGEFS_IN"] == "a=b c=d"


def test_hosts_and_names_of_streams() -> None:
    streams = streams_of(config_with())
    assert streams == Streams(
        Stream("in.txt", "submit", "/data/in.txt"),
        (
            Stream("out put.txt", "submit", "/data/out put.txt"),
            Stream("x=y.err", "", "/data/x=y.err"),
        ),
    )


def test_joined_output_is_one_stream_and_unused_ones_are_none() -> None:
    joined = streams_of(config_with(merge_stderr="1", stdin_path="/dev/null"))
    assert joined.stdin is None
    assert [stream.name for stream in joined.outputs] == ["out put.txt"]
    none = {f"fs_std{kind}_file_staging": "0" for kind in ("in", "out", "err")}
    assert streams_of(config_with(**none)) == Streams()
    assert streams_of(config_with(stdin_path='""')).stdin is None


def test_no_spool_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidName, match="no spool directory"):
        spooled_job(tmp_path)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (Refused(Failure(error="x", exit_code=1, errno="EIO")), True),
        (Refused(Failure(error="x", exit_code=1, errno="ETIMEDOUT")), True),
        (Refused(Failure(error="x", exit_code=1, errno="ENOENT")), False),
        (Refused(Failure(error="x", exit_code=1, errno="EACCES")), False),
        (MountFailed("x"), True),
        (OSError(28, "full"), True),
        (InvalidManifest("x"), False),
        (StageFSError("x"), True),
        (RuntimeError("a mistake of ours"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) is passes


def test_who_types_it_is_told_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert prolog() == JOB_ERROR
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("stagefs: No sge_shepherd has started this")
    assert said.err.count("\n") == 1
