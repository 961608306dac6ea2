"""Pilot-Data on a mount: BigJob's Pilot-API, whose programs run with one changed import.

    from stagefs.integrations.pilot_data import (     # instead of: from pilot import ...
        ComputeDataService, PilotComputeService, PilotDataService, State,
    )

BigJob 0.64.5 is a program of Python 2; nothing of it is used or needed here.  A data unit is a
directory of the namespace, its replicas are URLs of its files with affinity labels, and compute
units see it as virtual links: nothing is transferred before a task reads it, and then once for
all tasks of the node.  See docs/PILOT-DATA.md.

``values`` words and the error, ``stores`` service URLs, ``records`` what the mount keeps of all,
``contents`` and ``uploads`` the files of data units, ``execution`` one compute unit; ``data``,
``compute`` and ``service`` are the API.
"""

from stagefs.integrations.pilot_data.compute import (
    ComputeUnit,
    PilotCompute,
    PilotComputeService,
)
from stagefs.integrations.pilot_data.data import DataUnit, PilotData, PilotDataService
from stagefs.integrations.pilot_data.service import ComputeDataService
from stagefs.integrations.pilot_data.values import (
    ComputeUnitDescription,
    DataUnitDescription,
    PilotComputeDescription,
    PilotDataDescription,
    PilotError,
    State,
)

TESTED_WITH = ("the dictionaries of BigJob 0.64.5",)

__all__ = [
    "ComputeDataService",
    "ComputeUnit",
    "ComputeUnitDescription",
    "DataUnit",
    "DataUnitDescription",
    "PilotCompute",
    "PilotComputeDescription",
    "PilotComputeService",
    "PilotData",
    "PilotDataDescription",
    "PilotDataService",
    "PilotError",
    "State",
]
