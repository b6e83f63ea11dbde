"""Operations of whole warps in the emulator: shuffles, votes, reductions, atomics, and tensor cores against a matrix product."""

import numpy as np
import pytest
import torch
from emulator.run_ptx import run_ptx

LANES = np.arange(32)
STORE = "mad.wide.u32 %d1, %r90, 4, %d{at}; st.global.b32 [%d1], %r{value};"


def run_warp(body, *inputs, **options):
    """The %r1 of each lane after the body, which has the lane's value of the inputs in %r10, %r11, ..."""
    out = np.zeros(32, "u4")
    loads = [
        f"mad.wide.u32 %d1, %r90, 4, %d{91 + i}; ld.global.b32 %r{10 + i}, [%d1];"
        for i in range(len(inputs))
    ]
    arrays = [np.ascontiguousarray(x).view("u4") for x in inputs]
    run_ptx("\n".join([*loads, body, STORE.format(at=90, value=1)]), [out, *arrays], **options)
    return out


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode, width):
    values = np.random.default_rng(0).integers(0, 2**32, 32, dtype="u4")
    for distance in (0, 1, 5, 16):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        out = run_warp(
            f"shfl.sync.{mode}.b32 %r1|%p1, %r10, {distance}, {clamp}, -1; selp.u32 %r2, 1, 0, %p1; xor.b32 %r1, %r1, %r2;",
            values,
        )
        first = LANES // width * width
        source = {
            "up": LANES - distance,
            "down": LANES + distance,
            "bfly": LANES ^ distance,
            "idx": first + distance % width,
        }[mode]
        is_inside = source >= first if mode == "up" else source < first + width
        assert (out == (values[np.where(is_inside, source, LANES) % 32] ^ is_inside)).all()


def test_halves_of_a_warp_shuffle_by_themselves():
    body = """
    setp.lt.u32 %p1, %r90, 16;
    selp.b32 %r2, 0xffff, 0xffff0000, %p1;
    shfl.sync.bfly.b32 %r1, %r10, 8, 31, %r2;
    """
    assert (run_warp(body, LANES.astype("u4")) == (LANES ^ 8)).all()


def test_lanes_that_diverged_meet_at_a_shuffle():
    body = """
    setp.lt.u32 %p1, %r90, 11;
    @%p1 bra LOW;
    add.u32 %r10, %r10, 100;
    bra.uni JOIN;
    LOW: mul.lo.u32 %r10, %r10, 3;
    JOIN: shfl.sync.bfly.b32 %r1, %r10, 31, 31, -1;
    """
    expected = np.where(LANES < 11, LANES * 3, LANES + 100)[31 - LANES]
    for seed in range(5):
        assert (run_warp(body, LANES.astype("u4"), seed=seed) == expected).all()


def test_lanes_leave_a_loop_one_by_one():
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, %r10;
    LOOP: mul.lo.u32 %r3, %r2, 2;
    add.u32 %r1, %r1, %r3;
    sub.u32 %r2, %r2, 1;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra LOOP;
    """
    count = np.random.default_rng(1).integers(1, 20, 32, dtype="u4")
    for seed in range(3):
        assert (run_warp(body, count, seed=seed) == count * (count + 1)).all()


def test_a_register_that_is_live_around_a_loop_is_not_overwritten():
    """%r5 is set at the end of the loop's text, and must outlive what has a short life at its beginning."""
    body = """
    mov.u32 %r2, 0; mov.u32 %r1, 0;
    bra.uni TAIL;
    HEAD: add.u32 %r3, %r2, 7;
    mul.lo.u32 %r4, %r3, 0;
    add.u32 %r1, %r1, %r4;
    add.u32 %r1, %r1, %r5;
    setp.eq.u32 %p1, %r2, 4;
    @%p1 bra END;
    TAIL: add.u32 %r2, %r2, 1;
    setp.ne.u32 %p2, %r2, 1;
    @%p2 bra HEAD;
    mov.u32 %r5, 10;
    bra.uni HEAD;
    END: mov.u32 %r6, 0;
    """
    assert (run_warp(body) == 40).all()


def test_votes_and_reductions():
    values = np.random.default_rng(2).integers(0, 2**32, 32, dtype="u4")
    odd = values % 2 == 1
    predicate = "and.b32 %r2, %r10, 1; setp.ne.u32 %p1, %r2, 0;"
    ballot = sum(1 << int(lane) for lane in LANES[odd])
    assert (run_warp(predicate + "vote.sync.ballot.b32 %r1, %p1, -1;", values) == ballot).all()
    for kind, expected in (
        ("any", odd.any()),
        ("all", odd.all()),
        ("uni", odd.all() or not odd.any()),
    ):
        out = run_warp(
            predicate + f"vote.sync.{kind}.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;", values
        )
        assert (out == expected).all()
    signed = values.view("i4")
    for opcode, expected in (
        ("add.u32", values.sum(dtype="u4")), ("min.u32", values.min()), ("max.u32", values.max()),
        ("add.s32", signed.sum(dtype="i4")), ("min.s32", signed.min()), ("max.s32", signed.max()),
        ("and.b32", np.bitwise_and.reduce(values)), ("or.b32", np.bitwise_or.reduce(values)), ("xor.b32", np.bitwise_xor.reduce(values)),
    ):  # fmt: skip
        assert (
            run_warp(f"redux.sync.{opcode} %r1, %r10, -1;", values)
            == np.asarray(expected).view("u4")
        ).all()
    groups = values % 3
    same = [sum(1 << int(j) for j in LANES if groups[j] == groups[i]) for i in LANES]
    assert run_warp("match.any.sync.b32 %r1, %r10, -1;", groups).tolist() == same


def test_atomics():
    """A counter of all threads; the old values are a permutation."""
    for seed in range(3):
        counter, old = np.zeros(1, "u4"), np.zeros(256, "u4")
        body = """
        atom.global.add.u32 %r1, [%d90], 1;
        mad.lo.u32 %r2, %r91, 64, %r90; mad.wide.u32 %d1, %r2, 4, %d91; st.global.b32 [%d1], %r1;
        """
        run_ptx(body, [counter, old], num_threads=64, num_blocks=4, resident=4, seed=seed)
        assert counter[0] == 256 and (np.sort(old) == np.arange(256)).all()
    values = np.random.default_rng(3).integers(-(2**31), 2**31, 64, dtype="i4")
    for opcode, start, expected in (
        ("min.s32", 2**31 - 1, values.min()), ("max.s32", -(2**31), values.max()), ("add.u32", 0, values.sum(dtype="i4")),
        ("and.b32", -1, np.bitwise_and.reduce(values)), ("or.b32", 0, np.bitwise_or.reduce(values)),
    ):  # fmt: skip
        result = np.full(1, start, "i4")
        body = f"mad.wide.u32 %d1, %r90, 4, %d91; ld.global.b32 %r1, [%d1]; red.global.{opcode} [%d90], %r1;"
        run_ptx(body, [result, values], num_threads=64)
        assert result[0] == expected, opcode
    counter = np.full(1, 7, "u4")
    run_ptx(
        "atom.global.cas.b32 %r1, [%d90], 7, 9; atom.global.exch.b32 %r2, [%d90+4], %r1;",
        [counter := np.array([7, 0], "u4")],
        num_threads=1,
    )
    assert counter.tolist() == [9, 7]
    total = np.zeros(1, "f4")
    run_ptx("atom.global.add.f32 %r1, [%d90], 0f3FC00000;", [total], num_threads=64)
    assert total[0] == 96


def matrix(kind, rows, columns, seed):
    """Values that the format holds exactly, as bits and as float64."""
    rng = np.random.default_rng(seed)
    if kind in ("s8", "u8"):
        exact = rng.integers(*((-128, 128) if kind == "s8" else (0, 256)), (rows, columns))
        return exact.astype("i1" if kind == "s8" else "u1"), exact.astype("f8")
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    x = torch.from_numpy(rng.integers(-64, 64, (rows, columns)) / 8.0).to(dtype)
    bits = x.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    return bits, x.double().numpy()


@pytest.mark.parametrize(
    ("kind", "k", "types"),
    [
        ("bf16", 16, "f32.bf16.bf16.f32"), ("bf16", 8, "f32.bf16.bf16.f32"),
        ("f16", 16, "f32.f16.f16.f32"), ("f16", 8, "f32.f16.f16.f32"), ("f16", 16, "f16.f16.f16.f16"),
        ("tf32", 8, "f32.tf32.tf32.f32"), ("tf32", 4, "f32.tf32.tf32.f32"),
        ("s8", 32, "s32.s8.s8.s32"), ("s8", 16, "s32.s8.s8.s32"), ("u8", 32, "s32.u8.u8.s32"),
    ],
)  # fmt: skip
def test_tensor_core(kind, k, types):
    """The fragments are those of the PTX manual, written down here once more, as index arithmetic of numpy."""
    a_bits, a = matrix(kind, 16, k, 0)
    b_bits, b = matrix(kind, k, 8, 1)
    c = np.random.default_rng(2).integers(-100, 100, (16, 8)).astype("f8")
    group, in_group = LANES // 4, LANES % 4
    per_register = 4 // a_bits.dtype.itemsize
    num_a = k // per_register // 2

    def packed(values):
        """(32, registers, values a register) of bits to (registers, 32) words"""
        return np.ascontiguousarray(values.transpose(1, 0, 2)).view("u4")[..., 0]

    n = np.arange(per_register)
    a_words = packed(np.stack([
        a_bits[(group + 8 * (r % 2))[:, None], in_group[:, None] * per_register + n + 4 * per_register * (r // 2)]
        for r in range(num_a)
    ], 1))  # fmt: skip
    b_words = packed(np.stack([
        b_bits[in_group[:, None] * per_register + n + 4 * per_register * r, group[:, None]] for r in range(num_a // 2)
    ], 1))  # fmt: skip
    rows = group[:, None] + np.array([0, 0, 8, 8])
    columns = in_group[:, None] * 2 + np.array([0, 1, 0, 1])
    is_half = types.startswith("f16")
    out_type = {"f16": "f2", "f32": "f4", "s32": "i4"}[types.split(".")[0]]
    c_words = packed(
        c[rows, columns].astype(out_type).reshape(32, -1, 4 // np.dtype(out_type).itemsize)
    )
    num_c = 2 if is_half else 4

    words = np.concatenate([a_words, b_words, c_words])
    out = np.zeros((num_c, 32), "u4")
    load = "".join(
        f"mad.wide.u32 %d1, %r90, 4, %d91; ld.global.b32 %r{10 + i}, [%d1+{128 * i}];\n"
        for i in range(len(words))
    )
    names = [f"%r{10 + i}" for i in range(len(words))]
    a_names, b_names, c_names = names[:num_a], names[num_a : num_a + num_a // 2], names[-num_c:]
    braces = ", ".join("{" + ", ".join(x) + "}" for x in (c_names, a_names, b_names, c_names))
    store = "".join(
        f"mad.wide.u32 %d1, %r90, 4, %d90; st.global.b32 [%d1+{128 * i}], {name};\n"
        for i, name in enumerate(c_names)
    )
    run_ptx(f"{load} mma.sync.aligned.m16n8k{k}.row.col.{types} {braces};\n{store}", [out, words])
    result = np.zeros((16, 8))
    result[rows, columns] = np.ascontiguousarray(out.T).view(out_type)
    assert (result == (a @ b + c).astype(out_type)).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_ldmatrix(count, is_transposed):
    matrices = np.random.default_rng(4).integers(0, 2**16, (count, 8, 8)).astype("u2")
    out = np.zeros((count, 32), "u4")
    names = ", ".join(f"%r{i}" for i in range(count))
    body = f"""
    mad.wide.u32 %d1, %r90, 16, %d91; mul.lo.u32 %r20, %r90, 16;
    setp.lt.u32 %p1, %r90, {8 * count};
    @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d1];
    @%p1 st.shared.v4.b32 [%r20], {{%r10, %r11, %r12, %r13}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if is_transposed else ""}.shared.b16 {{{names}}}, [%r20];
    """
    body += "".join(
        f"mad.wide.u32 %d1, %r90, 4, %d90; st.global.b32 [%d1+{128 * i}], %r{i};\n"
        for i in range(count)
    )
    run_ptx(body, [out, matrices], shared_bytes=128 * count)
    if is_transposed:
        matrices = matrices.transpose(0, 2, 1)
    assert (out.view("u2").reshape(count, 8, 8) == matrices).all()


def test_special_registers():
    for name, expected in (
        ("%lanemask_eq", 1 << LANES), ("%lanemask_lt", (1 << LANES) - 1), ("%lanemask_le", (2 << LANES) - 1),
        ("%lanemask_gt", 2**32 - (2 << LANES)), ("%lanemask_ge", 2**32 - (1 << LANES)),
        ("%laneid", LANES), ("%nwarpid", 0 * LANES + 1),
    ):  # fmt: skip
        assert (run_warp(f"mov.u32 %r1, {name};") == expected).all(), name


def test_barriers_that_count_votes():
    """Of all threads of a block, and of two of its three warps."""
    out = np.zeros(96, "u4")
    body = """
    mov.u32 %r1, 0; setp.lt.u32 %p1, %r90, 40;
    barrier.sync.aligned 0;
    barrier.cta.red.popc.aligned.u32 %r2, 0, %p1;
    bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, %p1;
    setp.ge.u32 %p4, %r90, 64; @%p4 bra END;
    bar.red.and.pred %p5, 3, 64, !%p4; bar.red.or.pred %p6, 3, 64, %p4;
    END: selp.u32 %r3, 100, 0, %p2; selp.u32 %r4, 200, 0, %p3; add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4;
    @%p4 bra STORE; selp.u32 %r3, 1000, 0, %p5; selp.u32 %r4, 2000, 0, %p6; add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4;
    STORE: mad.wide.u32 %d1, %r90, 4, %d90; st.global.b32 [%d1], %r2;
    """
    for seed in range(5):
        run_ptx(body, [out], num_threads=96, seed=seed, preempt=3)
        assert (out == 240 + 1000 * (np.arange(96) < 64)).all()
