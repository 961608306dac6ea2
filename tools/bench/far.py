"""C5: one big file read once from end to end, from servers that are 20 ms away.

The way there is ``tests.support.far_away``: what it lets through at once is not bounded, so a
client gets what it has asked for ahead of its need, and one that waits for each answer gets that
much for each round trip.  An ssh connection is bounded by the window of its channel.
"""

from bench.measuring import Contender, Work
from bench.points import OURS, Lab, Measured
from bench.report import Goal, Row, compare
from bench.sequential import reads_staged, ssh_cat
from bench.servers import ROUND_TRIP_S

ONE_AT_A_TIME = "1 MiB at a time"
SSH_CAT = "ssh cat, 20 ms away"
SPEEDUP = 5.0
# OpenSSH's CHAN_SES_WINDOW_DEFAULT: what a server may send on a channel that is not taken yet.
SSH_WINDOW_BYTES = 2 << 20
SSH_SHARE = 0.8


def over_http(lab: Lab) -> Measured:
    url = lab.servers.far_http_url(lab.servers.big)
    ours = Contender(OURS, reads_staged(lab, url), ours=True)
    return _beside_waiting(lab, "http", ours, url)


def over_s3(lab: Lab) -> Measured:
    access, name = lab.servers.far_s3, lab.servers.big.name
    ours = Contender(
        OURS,
        reads_staged(
            lab,
            access.url(name),
            environment=access.environment,
            options=("--set", f"remote.s3.endpoint={access.endpoint}"),
        ),
        ours=True,
    )
    return _beside_waiting(lab, "S3", ours, lab.servers.signed(access, name))


def _beside_waiting(lab: Lab, protocol: str, ours: Contender, url: str) -> Measured:
    measured = Measured()
    waiting = Contender(ONE_AT_A_TIME, lambda: _one_at_a_time(lab, url))
    work = Work(lab.servers.size_bytes)
    samples = lab.race("cold, 20 ms away", [ours, waiting], work, measured)
    measured.rows += compare(
        lab.point,
        f"cold read, {protocol}, 20 ms away",
        samples,
        ours=OURS,
        peers=[ONE_AT_A_TIME],
        bound=SPEEDUP,
    )
    return measured


def _one_at_a_time(lab: Lab, url: str) -> float:
    """By the program's own clock: neither its start nor its connection is counted."""
    program = lab.bench.program("one_at_a_time.py")
    return float(lab.bench.run("python", program, url, str(lab.servers.size_bytes)).split()[0])


def over_ssh(lab: Lab) -> Measured:
    measured, servers = Measured(), lab.servers
    access = servers.far_ssh
    url = access.url(servers.big)
    environment = {"STAGEFS_SSH_CONFIG": str(access.tuned_config)}
    contenders = [
        Contender(OURS, reads_staged(lab, url, environment=environment), ours=True),
        Contender(SSH_CAT, lambda: ssh_cat(lab, access, servers.far_ssh_master)),
    ]
    work = Work(servers.size_bytes)
    samples = lab.race("cold, 20 ms away", contenders, work, measured)
    bound_s = servers.size_bytes / SSH_WINDOW_BYTES * ROUND_TRIP_S
    what = "cold read, ssh, 20 ms away"
    measured.rows += [
        Row(
            point=lab.point,
            what=what,
            ours=samples.text(OURS),
            peer="a channel's 2 MiB every 20 ms",
            peer_figure=work.rate(bound_s),
            value=bound_s / samples.median(OURS),
            goal=Goal(SSH_SHARE),
            seconds={OURS: samples.seconds[OURS]},
        ),
        *compare(lab.point, what, samples, ours=OURS, peers=[SSH_CAT]),
    ]
    return measured
