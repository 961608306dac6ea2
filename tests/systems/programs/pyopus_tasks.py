"""What a user of PyOpus writes, once as ever and once with the import changed.

mpirun -n N python pyopus_tasks.py stock|stagefs FUNCTION MIRROR_MAP TIMES persistent|passing [ARG]
The results go to answer.json, in the order in which tasks ended.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

MODULES = {"stock": "pyopus.parallel.mpi", "stagefs": "stagefs.integrations.pyopus"}
# Workers stay in here until the program ends.
VM = importlib.import_module(MODULES[sys.argv[1]]).MPI


def results(vm: Any, function: str, arguments: list[str], count: int) -> list[Any]:
    task = getattr(importlib.import_module("pyopus_functions"), function)
    vm.spawnFunction(task, args=(None, *arguments), count=count)
    found: list[Any] = []
    ended = 0
    while ended < count:
        _sender, message = vm.receiveMessage()
        if type(message).__name__ == "MsgTaskResult":
            found.append(message.returnValue)
        else:
            ended += 1
    return found


if __name__ == "__main__":
    function, mirror_map, times, storage, *arguments = sys.argv[2:]
    machine = VM(mirrorMap=json.loads(mirror_map), persistentStorage=storage == "persistent")
    answer = []
    for one in times.split("+"):
        answer += results(machine, function, arguments, int(one))
    Path("answer.json").write_text(json.dumps(answer))
    machine.finalize()
