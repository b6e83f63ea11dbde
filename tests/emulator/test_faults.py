"""Planted bugs of every class stay caught, whatever the order of threads; the same kernels without the bug are never reported."""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulator import driver
from emulator.ptx import Unsupported
from emulator.run_ptx import run_ptx

SEEDS = range(5)
ORDERS = [
    {},
    {"preempt": 3},
    {"order": "forward", "preempt": 0},
    {"order": "reverse", "preempt": 20},
    {"early_async": True},
    {"race": 1},
]


@dataclass
class Case:
    """A kernel with a hole: filled in one way it is right, in another it has a bug that must be reported so."""

    body: str
    right: str
    wrong: str
    fault: str
    num_threads: int = 64
    num_blocks: int = 1
    shared_bytes: int = 256
    options: dict = field(default_factory=dict)

    def run(self, hole: str, **options) -> None:
        arrays = [np.zeros(256, "u4"), np.arange(256, dtype="u4"), np.zeros(4, "u4")]
        body = self.body.replace("HOLE", hole)
        run_ptx(
            body,
            arrays,
            self.num_threads,
            self.num_blocks,
            self.shared_bytes,
            **self.options | options,
        )


# %r1: offset of this thread's word of shared memory, %r2: of the word of the thread opposite, %d1: address of its word of `out`
WORDS = """
mul.lo.u32 %r1, %r90, 4; xor.b32 %r2, %r1, 128; mad.wide.u32 %d1, %r90, 4, %d90; mad.wide.u32 %d2, %r90, 4, %d91;
"""
EXCHANGE = (
    WORDS + "st.shared.b32 [%r1], %r90; HOLE ld.shared.b32 %r3, [%r2]; st.global.b32 [%d1], %r3;"
)
COPY = """
mul.lo.u32 %r1, %r90, 16; mad.wide.u32 %d1, %r90, 4, %d90; mad.wide.u32 %d2, %r90, 16, %d91;
cp.async.cg.shared.global [%r1], [%d2], 16; cp.async.commit_group;
cp.async.cg.shared.global [%r1+512], [%d2+512], 16; cp.async.commit_group;
HOLE
st.global.b32 [%d1], %r3;
"""
# each block leaves a number; the last one that comes, by a counter, adds them up
LAST_BLOCK = """
mad.wide.u32 %d1, %r91, 4, %d90;
setp.ne.u32 %p1, %r90, 0;
@%p1 bra END;
st.global.b32 [%d1], %r91;
HOLE
setp.ne.u32 %p2, %r3, 3;
@%p2 bra END;
ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d90];
add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6; add.u32 %r4, %r4, %r7;
st.global.b32 [%d92+8], %r4;
END:
"""
COUNT = "atom.relaxed.gpu.global.add.u32 %r3, [%d92], 1;"
SPIN = """
mad.wide.u32 %d1, %r90, 4, %d90;
setp.eq.u32 %p1, %r91, 0;
@%p1 bra WAIT;
HOLE
bra.uni END;
WAIT: ld.acquire.gpu.global.b32 %r3, [%d92];
setp.eq.u32 %p2, %r3, 0;
@%p2 bra WAIT;
ld.global.b32 %r4, [%d90]; st.global.b32 [%d90+16], %r4;
END:
"""

CASES = {
    "missing barrier": Case(EXCHANGE, "bar.sync 0;", "", "(read after a write|uninitialised)"),
    "barrier of a warp instead of the block": Case(EXCHANGE, "bar.sync 0;", "bar.warp.sync -1;", "(read after a write|uninitialised)"),
    "missing barrier before a buffer is used again": Case(
        EXCHANGE.replace("HOLE", "bar.sync 0;") + "HOLE st.shared.b32 [%r1], %r3;", "bar.sync 0;", "",
        "data race on shared memory",
    ),
    "missing barrier of a warp": Case(
        EXCHANGE.replace("128", "4"), "bar.warp.sync -1;", "", "data race on shared memory", num_threads=32
    ),
    "missing barrier of a warp before ldmatrix": Case(
        "mul.lo.u32 %r1, %r90, 16; mov.u32 %r4, 0; st.shared.v4.b32 [%r1], {%r4, %r4, %r4, %r4}; HOLE"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r1];",
        "bar.warp.sync -1;", "", "data race on shared memory", num_threads=32, shared_bytes=512,
    ),
    "barrier that not all threads reach": Case(
        "setp.lt.u32 %p1, %r90, 40; HOLE bar.sync 0; END: bar.sync 0;", "", "@%p1 bra END;", "barrier divergence",
    ),
    "threads at different barriers": Case(
        "setp.lt.u32 %p1, %r90, 32; @%p1 bra LOW; HOLE bra.uni END; LOW: HOLE END:", "mov.u32 %r1, 0;", "bar.sync 0;",
        "barrier divergence.*another barrier",
    ),
    "return before a barrier": Case(
        "setp.gt.u32 %p1, %r90, 50; HOLE bar.sync 0;", "", "@%p1 ret;", "barrier divergence.*(exits|exited)"
    ),
    "mask of half a warp": Case(
        "shfl.sync.bfly.b32 %r3, %r90, 1, 31, HOLE;", "-1", "0xffff", "calling lane is not in its own mask"
    ),
    "shuffle from a lane beyond the mask": Case(
        "setp.lt.u32 %p1, %r90, 16; @!%p1 bra END; shfl.sync.bfly.b32 %r3, %r90, HOLE, 31, 0xffff; END:", "8", "16",
        "shuffle from lane .* not in the mask", num_threads=32,
    ),
    "warp operation that some lanes never reach": Case(
        "setp.lt.u32 %p1, %r90, 16; HOLE shfl.sync.bfly.b32 %r3, %r90, 1, 31, -1;", "", "@%p1 ret;", "which has exited",
        num_threads=32,
    ),
    "lanes wait for each other at different operations": Case(
        "setp.lt.u32 %p1, %r90, 16; @%p1 bra LOW; shfl.sync.bfly.b32 %r3, %r90, 1, 31, HOLE; bra.uni END;"
        "LOW: shfl.sync.bfly.b32 %r3, %r90, 1, 31, 0xffff; END:",
        "0xffff0000", "-1", "warp divergence", num_threads=32,
    ),
    "tensor core in a part of a warp": Case(
        "setp.lt.u32 %p1, %r90, 16; mov.u32 %r9, 0; HOLE mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
        " {%r1,%r2,%r3,%r4}, {%r9,%r9,%r9,%r9}, {%r9,%r9}, {%r9,%r9,%r9,%r9};",
        "", "@%p1", "(warp divergence|mask names lanes)", num_threads=32,
    ),
    "uninitialised shared memory": Case(
        WORDS + "HOLE ld.shared.b32 %r3, [%r1];", "st.shared.b32 [%r1], %r90;", "", "uninitialised shared memory"
    ),
    "shared memory out of bounds": Case(
        WORDS + "st.shared.b32 [%r1+HOLE], %r90;", "0", "4", "shared write out of bounds"
    ),
    "misaligned shared memory": Case(
        WORDS + "st.shared.v2.b32 [%r1+HOLE], {%r90, %r90};", "0", "2", "misaligned shared write", num_threads=1
    ),
    "global memory out of bounds": Case(
        WORDS + "ld.global.b32 %r3, [%d2+HOLE];", "768", "772", "0 bytes behind the end of 'a1'"
    ),
    "global memory before the start": Case(WORDS + "st.global.b32 [%d1+HOLE], %r90;", "0", "-4", "out of bounds.*before the start"),
    "access over the end": Case(
        WORDS + "ld.global.v2.b32 {%r3, %r4}, [%d91+HOLE];", "1016", "1020", "over the end of 'a1'"
    ),
    "wild pointer": Case("HOLE st.global.b32 [%d1], %r90;", "mad.wide.u32 %d1, %r90, 4, %d90;", "mul.wide.u32 %d1, %r90, 4;", "no memory of the kernel"),
    "misaligned global memory": Case(
        WORDS + "ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d91+HOLE];", "16", "8", "misaligned global read"
    ),
    "threads store different values to one place": Case(
        WORDS + "HOLE st.global.b32 [%d90], %r3;", "mov.u32 %r3, 1;", "mov.u32 %r3, %r90;", "data race on 'a0'.*write after a write"
    ),
    "blocks store different values to one place": Case(
        "HOLE st.global.b32 [%d90], %r3;", "mov.u32 %r3, 1;", "mov.u32 %r3, %r91;", "data race on 'a0'", num_threads=1, num_blocks=3
    ),
    "a block reads what another one writes": Case(
        "mad.wide.u32 %d1, %r91, 4, %d90; st.global.b32 [%d1], %r91; ld.global.b32 %r3, [%d1HOLE]; ", "", "+4",
        "data race on 'a0'", num_threads=1, num_blocks=3,
    ),
    "several readers, one of whom the writer did not wait for": Case(
        # lanes of both warps read a word; a barrier of the first warp orders only its own
        "ld.global.b32 %r3, [%d90]; HOLE setp.ne.u32 %p1, %r90, 5; @%p1 bra END; st.global.b32 [%d90], %r90; END:",
        "bar.sync 0;", "bar.warp.sync -1;", "data race on 'a0'.*write after a read",
    ),
    "atomic and plain access": Case(
        "HOLE red.global.add.u32 [%d90], 1;", "", "ld.global.b32 %r3, [%d90];", "data race on 'a0'.*(atomic|read)", num_blocks=2
    ),
    "atomic on uninitialised shared memory": Case(
        "mov.u32 %r1, 0; HOLE atom.shared.add.u32 %r3, [%r1], 1;", "st.shared.b32 [%r1], %r1; bar.sync 0;", "", "uninitialised"
    ),
    "missing fence": Case(
        LAST_BLOCK, f"membar.gl; {COUNT} membar.gl;", f"{COUNT} membar.gl;", "data race on 'a0'",
        num_threads=32, num_blocks=4, options={"resident": 4},
    ),
    "missing fence behind the atomic": Case(
        LAST_BLOCK, f"fence.acq_rel.gpu; {COUNT} fence.acq_rel.gpu;", f"fence.acq_rel.gpu; {COUNT}", "data race on 'a0'",
        num_threads=32, num_blocks=4, options={"resident": 4},
    ),
    "relaxed instead of acquire and release": Case(
        LAST_BLOCK, COUNT.replace("relaxed", "acq_rel"), COUNT, "data race on 'a0'", num_threads=32, num_blocks=4,
    ),
    "flag without release": Case(
        SPIN, "mov.u32 %r3, 1; st.global.b32 [%d90], %r3; st.release.gpu.global.b32 [%d92], %r3;",
        "mov.u32 %r3, 1; st.global.b32 [%d90], %r3; st.relaxed.gpu.global.b32 [%d92], %r3;", "data race on 'a0'",
        num_threads=1, num_blocks=2, options={"resident": 2},
    ),
    "wait for what never comes": Case(
        SPIN, "mov.u32 %r3, 1; st.release.gpu.global.b32 [%d92], %r3;", "", "does not end",
        num_threads=1, num_blocks=2, options={"resident": 2, "max_instructions": 10**6},
    ),
    "cp.async read before it is waited for": Case(
        COPY, "cp.async.wait_group 0; ld.shared.b32 %r3, [%r1+512];", "cp.async.wait_group 1; ld.shared.b32 %r3, [%r1+512];",
        "destination of a cp.async before its wait_group", num_threads=32, shared_bytes=1024,
    ),
    "cp.async of another thread without a barrier": Case(
        COPY + "ld.shared.b32 %r3, [%r1];", "cp.async.wait_all; bar.sync 0; xor.b32 %r1, %r1, 16;",
        "bar.sync 0; cp.async.wait_all; xor.b32 %r1, %r1, 16;", "data race on shared memory", num_threads=32, shared_bytes=1024,
    ),
    "cp.async into a buffer that others still read": Case(
        COPY.replace("HOLE", "cp.async.wait_all; bar.sync 0; xor.b32 %r2, %r1, 16; ld.shared.b32 %r3, [%r2];")
        + "HOLE cp.async.cg.shared.global [%r1], [%d2], 16; cp.async.wait_all;",
        "bar.sync 0;", "", "data race on shared memory.*write after a read", num_threads=32, shared_bytes=1024,
    ),
    "misaligned cp.async": Case(
        "mov.u32 %r1, 0; cp.async.ca.shared.global [%r1], [%d91+HOLE], 8;", "8", "4", "misaligned global read of a cp.async", num_threads=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bug_is_caught(name):
    case = CASES[name]
    for seed in SEEDS:
        with pytest.raises(driver.Fault, match=re.compile(case.fault, re.S)) as fault:
            case.run(case.wrong, seed=seed)
        assert "thread (" in str(fault.value) and ";" not in str(fault.value).splitlines()[0][-2:]


@pytest.mark.parametrize("name", CASES)
def test_right_kernel_is_not_reported(name):
    case = CASES[name]
    for options in ORDERS:
        for seed in SEEDS:
            if case.options.get("resident", 1) > 1 and options.get("preempt") == 0:
                continue  # a kernel that waits for another block needs its turn to end
            case.run(case.right, seed=seed, **options)


def test_early_copies_show_what_late_ones_hide():
    """cp.async may copy at once: what overwrites its source meanwhile is not copied on the one extreme, and is on the other."""
    body = "mov.u32 %r1, 0; cp.async.ca.shared.global [%r1], [%d91], 4; mov.u32 %r2, 9; st.global.b32 [%d91], %r2; cp.async.wait_all; ld.shared.b32 %r3, [%r1]; st.global.b32 [%d90], %r3;"
    results = set()
    for early in (False, True):
        out = np.zeros(1, "u4")
        run_ptx(body, [out, np.full(1, 5, "u4")], num_threads=1, shared_bytes=16, early_async=early)
        results.add(out.item())
    assert results == {5, 9}


def test_unknown_ptx_is_named():
    for statement in (
        "wgmma.fence.sync.aligned;", "add.rz.f32 %r1, %r2, %r3;", "call f, ();", "mov.u32 %r1, %clock;",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2;", "st.shared.b32 [unknown], %r1;", "brx.idx %r1, table;",
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=re.escape(statement.rstrip(";")[:9])):
            run_ptx(statement, [np.zeros(1)])


# ---- the same for Triton, where the compiler has a part in it


@triton.jit
def _copy_kernel(x_ptr, out_ptr, offset, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(
        out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.load(x_ptr + offset + place)
    )


@triton.jit
def _aligned_kernel(x_ptr, out_ptr, offset, BLOCK: tl.constexpr):
    """Its promise about the offsets is not kept by all callers."""
    places = tl.max_contiguous(tl.multiple_of(offset + tl.arange(0, BLOCK), BLOCK), BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + places))


@triton.jit
def _in_place_kernel(x_ptr, target_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """A scalar that all warps load is overwritten by one of them."""
    columns = tl.arange(0, BLOCK)
    row = x_ptr + tl.program_id(0) * BLOCK + columns
    x = tl.load(row)
    tl.store(
        out_ptr + tl.program_id(0), tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.load(target_ptr))
    )
    if BARRIER:
        tl.debug_barrier()
    tl.store(row, x * 2)


@triton.jit(do_not_specialize=["stride"])
def _overlap_kernel(out_ptr, stride, BLOCK: tl.constexpr):
    tl.store(
        out_ptr + tl.program_id(0) * stride + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32)
    )


@pytest.fixture(autouse=True)
def _installed():
    driver.install()


@pytest.mark.parametrize("seed", SEEDS)
def test_bugs_in_triton_are_caught(seed):
    def fault(text):
        return pytest.raises(driver.Fault, match=re.compile(text, re.S))

    with driver.options(seed=seed):
        x, out = torch.randn(512), torch.empty(512)
        _copy_kernel[(4,)](x, out, 0, 128, 128)
        assert (x == out).all()
        with fault(
            "_copy_kernel.*out of bounds: 0 bytes behind the end of 'x_ptr'.*test_faults.py:"
        ):
            _copy_kernel[(4,)](x[:500], out, 0, 128, 128)
        with fault("out of bounds: 4 bytes before the start of 'x_ptr'"):
            _copy_kernel[(1,)](x[100:], out, -1, 128, 128)
        huge = torch.empty(0).set_(torch.UntypedStorage(4 * (2**31 + 64)), 0, (2**31 + 64,))
        with fault(
            "out of bounds.*no memory of the kernel"
        ):  # program 2: the offset of 2**31 does not fit an int32
            _copy_kernel[(3,)](huge, out, 0, 2**30, 32)
        wide = torch.randn(1024)
        _aligned_kernel[(1,)](wide, out, 512, 512)
        with fault("misaligned global read of 16 bytes in 'x_ptr'"):
            _aligned_kernel[(1,)](wide, out, 1, 512)
        target = torch.tensor(17, dtype=torch.int32)
        losses = torch.empty(3)
        y = torch.randn(3, 512)
        expected = y * 2
        _in_place_kernel[(3,)](y, target, losses, 512, True)
        assert (y == expected).all() and (losses == expected[:, 17] / 2).all()
        with fault("data race on 'x_ptr'"):
            _in_place_kernel[(3,)](y, target, losses, 512, False)
        _overlap_kernel[(3,)](out, 128, 128)
        with fault("data race on 'out_ptr'.*write after a write.*block"):
            _overlap_kernel[(3,)](out, 127, 128)
