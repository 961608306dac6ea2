"""mount.stagefs: what mount(8) calls for ``mount -t stagefs`` and for lines of /etc/fstab.

Translates the options into those of ``stagefs mount`` and runs it; nothing is decided here.

    stagefs  /scratch/stage  stagefs  noauto,allow_other,capacity=100GiB,state=/local/stage  0 0

Options are those of ``stagefs mount`` without the dashes (``state=``, ``cache=``, ``outputs=``,
``capacity=``, ``config=``, ``lifetime=``, ``allow_other``), ``run_as=USER`` for its ``--user``
(``user`` has another meaning in fstab), and any setting by its dotted name
(``read.deadline_s=30s``).
"""

import getopt
import sys
from collections.abc import Sequence

from stagefs.cli.main import main as stagefs
from stagefs.errors import InvalidConfig, StageFSError

WITH_VALUE = {
    "state": "--state",
    "cache": "--cache",
    "outputs": "--outputs",
    "capacity": "--capacity",
    "config": "--config",
    "lifetime": "--lifetime",
    "run_as": "--user",
}
FLAGS = {"allow_other": "--allow-other"}
# What mount(8) and systemd put there for themselves; the kernel's defaults for FUSE are ours.
IGNORED = frozenset(
    {
        "_netdev", "async", "auto", "atime", "defaults", "dev", "diratime", "exec", "group",
        "noatime", "noauto", "nodev", "nodiratime", "nofail", "norelatime", "nosuid", "nouser",
        "owner", "relatime", "rw", "suid", "user", "users",
    }
)  # fmt: skip


def translate(options: str, *, sloppy: bool) -> list[str]:
    """The words for ``stagefs mount``.  Raises InvalidConfig for an option nobody knows."""
    words: list[str] = []
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if equals and name in WITH_VALUE:
            words += [WITH_VALUE[name], value]
        elif equals and "." in name:
            words += ["--set", option]
        elif option in FLAGS:
            words.append(FLAGS[option])
        elif name in IGNORED or name == "comment" or name.startswith("x-") or sloppy:
            continue
        else:
            known = ", ".join([*WITH_VALUE, *FLAGS])
            raise InvalidConfig(
                f"mount.stagefs does not know the option {name!r}: there are {known}, and the"
                " settings of stagefs.conf(5) by their dotted names."
            )
    return words


def arguments(argv: Sequence[str]) -> list[str] | None:
    """From mount(8)'s way of calling to ours; None when it only pretends (``-f``).

    mount(8) calls ``mount.stagefs SOURCE MNT [-sfnv] [-N namespace] [-o options] [-t type]``.
    """
    try:
        switches, positional = getopt.gnu_getopt(list(argv), "sfnvo:t:N:")
    except getopt.GetoptError as exc:
        raise InvalidConfig(f"mount.stagefs cannot read its arguments: {exc}.") from exc
    if len(positional) != 2:
        raise InvalidConfig(
            "mount.stagefs wants a source (any word) and a mountpoint: stagefs MNT."
        )
    given = [name for name, _ in switches]
    if "-f" in given:
        return None
    options = ",".join(value for name, value in switches if name == "-o")
    return ["mount", *translate(options, sloppy="-s" in given), "--", positional[1]]


def main() -> None:
    try:
        words = arguments(sys.argv[1:])
    except StageFSError as error:
        sys.stderr.write(f"mount.stagefs: {error}\n")
        sys.exit(error.exit_code)
    if words is not None:
        stagefs(words)


if __name__ == "__main__":
    main()
