"""The example of the Pilot-Data paper (JPDC 2014) in small: units that share one large input, of
which each reads a quarter; prints how long they took, in seconds.

python systems_pilot_data.py COUNT URL SIZE_BYTES
"""

import sys
import time

from stagefs.integrations.pilot_data import (
    ComputeDataService,
    PilotComputeService,
    State,
)

MIB = 1 << 20
PARTS = 4


def main(count: int, url: str, size_bytes: int) -> float:
    computes = PilotComputeService()
    computes.create_pilot({"service_url": "fork://localhost", "number_of_processes": count})
    service = ComputeDataService()
    service.add_pilot_compute_service(computes)
    begun = time.monotonic()
    data = service.submit_data_unit({"file_urls": [url]})
    part = size_bytes // MIB // PARTS
    name = url.rpartition("/")[2]
    units = [
        service.submit_compute_unit(
            {
                "executable": "dd",
                "arguments": [
                    *(f"if={name}", "of=/dev/null", "bs=1M", "status=none"),
                    *(f"skip={number % PARTS * part}", f"count={part}"),
                ],
                "input_data": [data.get_url()],
            }
        )
        for number in range(count)
    ]
    service.wait()
    seconds = time.monotonic() - begun
    computes.cancel()
    failed = [unit.reason for unit in units if unit.get_state() != State.Done]
    if failed:
        raise SystemExit(failed[0])
    return seconds


if __name__ == "__main__":
    took = main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print(f"\nseconds {took}")
