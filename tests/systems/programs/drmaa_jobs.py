"""A DRMAA client: runs the jobs that standard input describes, in JSON, and prints what became of
each.  ``[{"command": ..., "queue": ..., "transfer": "ioe", "input": ..., "output": ..., "error":
..., "join": false, "bulk": 0}, ...]``; the word ``{index}`` in a path stands for the number of a
bulk task.  All of them are submitted before any is waited for.
"""

import json
import os
import sys

import drmaa


def main() -> None:
    answers, names = [], []
    with drmaa.Session() as session:
        for wanted in json.load(sys.stdin):
            index = drmaa.JobTemplate.PARAMETRIC_INDEX
            job = session.createJobTemplate()
            job.remoteCommand = wanted["command"]
            job.workingDirectory = os.getcwd()
            job.transferFiles = wanted["transfer"]
            job.nativeSpecification = f"-q {wanted['queue']}"
            for key, attribute in (
                ("input", "inputPath"),
                ("output", "outputPath"),
                ("error", "errorPath"),
            ):
                if key in wanted:
                    setattr(job, attribute, wanted[key].replace("{index}", index))
            job.joinFiles = wanted.get("join", False)
            if count := wanted.get("bulk", 0):
                names += session.runBulkJobs(job, 1, count, 1)
            else:
                names.append(session.runJob(job))
        for name in names:
            ended = session.wait(name, 120)
            answers.append(
                {
                    "job": name,
                    "aborted": bool(ended.wasAborted),
                    "exit_code": ended.exitStatus if ended.hasExited else None,
                }
            )
    sys.stdout.write(f"{json.dumps(answers)}\n")


main()
