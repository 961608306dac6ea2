"""docs/SEMANTICS.md, example by example, on one real mount."""

from collections.abc import Callable
from pathlib import Path

from tests.support.console import agrees, examples
from tests.support.identity import CHECKOUT, Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed

DOCUMENT = CHECKOUT / "docs/SEMANTICS.md"
SERVER = "http://server"
NEWLINE = "\n"


def test_examples_are_true(
    identity: Identity, web: HttpServed, new_mount: Callable[..., Mounted]
) -> None:
    web.put("hello.txt", b"Hello, tasks!\n")
    web.put("numbers.txt", "".join(f"{n}\n" for n in range(1, 100_001)).encode())
    web.put("genomes/human.fa", b">human\nTTTT\n")
    web.put("genomes/mouse.fa", b">mouse\nACGT\n")
    web.put("genomes/yeast.fa", b">yeast\nGGGG\n")
    web.put("reads.txt", b"ACGTACGTACG\n")
    web.put("mirror/reads.txt", b"ACGTACGTACG\n")
    web.put("mirror/wrong.txt", b"ACGTACGTACC\n")
    real_server = web.url("").rstrip("/")
    mount = new_mount(identity, "--capacity", "64MiB")

    found = examples(DOCUMENT)
    assert len(found) > 30, "the examples are not found any more"
    wrong = []
    for example in found:
        done = mount.run(
            "bash",
            "-c",
            f"exec 2>&1; {example.command.replace(SERVER, real_server)}",
            directory=mount.point,
            check=False,
        )
        printed = done.stdout.decode().replace(real_server, SERVER)
        if not agrees(printed, example.expected):
            wrong.append(
                f"{Path(DOCUMENT).name}:{example.line}: $ {example.command}\n"
                f"says:\n{NEWLINE.join(example.expected)}\nbut it prints:\n{printed}"
            )
    assert not wrong, "\n\n".join(wrong)


def test_wrong_examples_are_noticed() -> None:
    assert agrees("a\nb\n", ["a", "b"])
    assert agrees("a 12 b\n", ["a ... b"])
    assert agrees("x\ny\n", ["..."])
    assert not agrees("a\nb\n", ["a"])
    assert not agrees("a\nb\n", ["a...b"])
    assert not agrees("", ["a"])
    assert not agrees("aXb\n", ["a.b"])
