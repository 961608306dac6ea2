"""Any sequence of operations on local files leaves what a plain array of bytes would have."""

import shutil
import tempfile
from pathlib import Path

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stagefs.model import Inode
from stagefs.namespace.node import Node
from tests.unit.outputs.local_rig import CHUNK, LONG_AGO_NS, Rig

FILES = 3
SIZE_MAX = 6 * CHUNK + 5
PICK = st.integers(1, FILES)
# Edges of chunks, and their neighbours, are where mistakes are.
OFFSET = st.one_of(
    st.integers(0, SIZE_MAX),
    st.builds(lambda chunk, by: max(0, chunk * CHUNK + by), st.integers(0, 6), st.integers(-1, 1)),
)


class LocalFilesMachine(RuleBasedStateMachine):
    """``model`` is what each file holds, ``times`` its (atime, mtime) if those are known."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.mkdtemp()
        self.rig = Rig(Path(self.scratch))
        self.rig.daemon(open_files_max=2)
        self.model: dict[int, bytearray] = {}
        self.times: dict[int, tuple[int, int] | None] = {}
        self.marks = 0

    def teardown(self) -> None:
        self.rig.files.close()
        shutil.rmtree(self.scratch)

    @initialize(sizes=st.lists(OFFSET, min_size=FILES, max_size=FILES))
    def begin(self, sizes: list[int]) -> None:
        for number, size in enumerate(sizes, start=1):
            base = bytes(1 + (number * 50 + n) % 49 for n in range(size))
            self.rig.node(number, base)
            self.model[number] = bytearray(base)
            self.times[number] = (LONG_AGO_NS, LONG_AGO_NS)

    def node(self, number: int) -> Node:
        return self.rig.node(number)

    @rule(number=PICK, offset=OFFSET, length=OFFSET, waits=st.booleans())
    def write(self, number: int, offset: int, length: int, waits: bool) -> None:
        self.marks += 1
        data = bytes([100 + self.marks % 150]) * length
        node = self.node(number)
        if waits:
            done = trio.run(self.rig.files.write, node, offset, data)
        else:
            done = trio.run(self.rig.write, node, offset, data)
        assert done == length
        if length:
            model = self.model[number]
            model.extend(bytes(max(0, offset - len(model))))
            model[offset : offset + length] = data
            self.times[number] = None

    @rule(number=PICK, size=OFFSET)
    def truncate(self, number: int, size: int) -> None:
        trio.run(self.rig.files.truncate, self.node(number), size)
        model = self.model[number]
        del model[size:]
        model.extend(bytes(size - len(model)))
        self.times[number] = None

    @rule(number=PICK, offset=OFFSET, length=OFFSET)
    def read(self, number: int, offset: int, length: int) -> None:
        data = trio.run(self.rig.read, self.node(number), offset, length)
        assert data == self.model[number][offset : offset + length]

    @rule(number=PICK, atime_ns=st.integers(1, 10**18), mtime_ns=st.integers(1, 10**18))
    def set_times(self, number: int, atime_ns: int, mtime_ns: int) -> None:
        node = self.node(number)
        if self.rig.files.set_times(node, atime_ns=atime_ns, mtime_ns=mtime_ns):
            self.times[number] = (atime_ns, mtime_ns)

    @rule(number=PICK)
    def complete(self, number: int) -> None:
        trio.run(self.rig.files.complete, self.node(number), lambda _bytes: None)
        assert self.node(number).base_bytes == 0

    @rule(number=PICK)
    def sync(self, number: int) -> None:
        trio.run(lambda: self.rig.files.sync(self.node(number), data_only=True))

    @rule(open_files_max=st.integers(1, 4), slow=st.booleans())
    def next_daemon(self, open_files_max: int, slow: bool) -> None:
        """``slow``: one that writes in threads."""
        self.rig.daemon(open_files_max=open_files_max, slow_write_s=0.0 if slow else 60.0)

    @rule(number=PICK)
    def remove(self, number: int) -> None:
        inode = Inode(number)
        self.rig.files.remove([inode])
        del self.rig.nodes[inode]
        self.rig.node(number, self.rig.bases[inode])
        self.model[number] = bytearray(self.rig.bases[inode])
        self.times[number] = (LONG_AGO_NS, LONG_AGO_NS)

    @rule(wanted=st.sets(PICK))
    def sweep(self, wanted: set[int]) -> None:
        self.rig.daemon()
        self.rig.files.sweep({Inode(number) for number in wanted})
        for number in range(1, FILES + 1):
            if number not in wanted:
                self.remove(number)

    @invariant()
    def size_and_times_are_right(self) -> None:
        for number, model in self.model.items():
            node = self.node(number)
            live, blocks = self.rig.files.live_and_blocks(node)
            assert live.size_bytes == len(model)
            assert (live, blocks) == (self.rig.files.live(node), self.rig.files.blocks(node))
            if (times := self.times[number]) is not None:
                assert (live.atime_ns or live.mtime_ns, live.mtime_ns) == times

    @invariant()
    def no_more_of_the_base_shows_than_there_is(self) -> None:
        for number, model in self.model.items():
            shown = self.rig.files.live(self.node(number)).size_bytes
            assert min(self.node(number).base_bytes, shown) <= len(model)


LocalFilesMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLocalFiles = LocalFilesMachine.TestCase
