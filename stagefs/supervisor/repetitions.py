"""Which notes of a dead daemon are of requests that were still unanswered.

Only for kernels that do not send requests again.  There a thread whose operation took
effect without an answer walks its path again, and the next daemon hides the operation's
result from that walk.  It must not do so for a thread that had its answer and already asks
for something else; a note stays for some microseconds after the answer.  So before anybody
is answered, while those threads still wait in the kernel, this looks at the system call that
each of them waits in.
"""

import os
from pathlib import Path

from stagefs.supervisor.memory import (
    NOTE_FINISHED,
    NOTE_WORDS,
    NOTES_MAX,
    NOTES_OFFSET,
)

# What an operation does to names, by the numbers of the system calls that ask for it.
# open counts with O_CREAT only, whose argument is the third of open and openat.
_OPEN_FLAGS = {
    "x86_64": {2: 2, 257: 3},
    "aarch64": {56: 3},
}
_CREATING = {
    "x86_64": {83, 85, 86, 88, 133, 258, 259, 265, 266},
    "aarch64": {33, 34, 36, 37},
}
_REMOVING = {"x86_64": {84, 87, 263}, "aarch64": {35}}
_RENAMING = {"x86_64": {82, 264, 316}, "aarch64": {38, 276}}


def drop_answered_notes(words: memoryview) -> int:
    """Clear the notes whose thread does not wait for that operation any more.  Returns how many."""
    dropped = 0
    start = NOTES_OFFSET // 8
    for slot in range(start, start + NOTES_MAX * NOTE_WORDS, NOTE_WORDS):
        word = words[slot]
        if word and not _is_waiting(word, words[slot + 5], renames=words[slot + 6] != 0):
            words[slot] = 0
            dropped += 1
    return dropped


def _is_waiting(word: int, first_name: int, *, renames: bool) -> bool:
    if not word & NOTE_FINISHED:
        return True  # it died inside the operation
    call = _system_call(word & 0xFFFFFFFF)
    machine = os.uname().machine
    if call is None or machine not in _CREATING:
        return False
    number = call[0]
    if renames:
        return number in _RENAMING[machine]
    if first_name & 1:
        return number in _REMOVING[machine]
    flags_place = _OPEN_FLAGS[machine].get(number)
    if flags_place is not None:
        return bool(call[flags_place] & os.O_CREAT)
    return number in _CREATING[machine]


def _system_call(thread: int) -> list[int] | None:
    """Number and arguments of the call it waits in.  None when it runs, is gone, or is hidden."""
    try:
        text = Path(f"/proc/{thread}/syscall").read_text(encoding="ascii")
    except OSError:
        return None
    try:
        return [int(word, 0) for word in text.split()]
    except ValueError:  # "running"
        return None
