"""Console examples in Markdown: finding them, and comparing what was printed with what is said."""

import dataclasses
import re
from pathlib import Path

_FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Example:
    line: int
    command: str
    expected: list[str]


def examples(document: Path) -> list[Example]:
    """Every ``$ command`` of every ``console`` block, in order, with the lines that follow it."""
    text = document.read_text("utf-8")
    found: list[Example] = []
    for block in _FENCE.finditer(text):
        first_line = text.count("\n", 0, block.start(1)) + 1
        for number, line in enumerate(block[1].splitlines(), start=first_line):
            if line.startswith("$ "):
                found.append(Example(number, line[2:], []))
            else:
                found[-1].expected.append(line)
    return found


def agrees(printed: str, expected: list[str]) -> bool:
    """Line by line; ``...`` in a line stands for anything, a line of it alone for any lines."""
    pattern = "\n".join(
        ".*?" if line == "..." else ".*?".join(map(re.escape, line.split("...")))
        for line in expected
    )
    flags = re.DOTALL if "..." in expected else re.NOFLAG
    return re.fullmatch(pattern, printed.rstrip("\n"), flags) is not None
