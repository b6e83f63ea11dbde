"""Instructions of the emulator against numpy, torch and Python: each in a PTX kernel of its own few lines."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from emulator.run_ptx import run_ptx


def run_instruction(opcode, *inputs, output):
    """`opcode` of the inputs, one thread an element; results and inputs are loaded and stored as bits of their width."""
    n = len(inputs[0])
    result = np.full(n, 0x55, dtype=output)
    lines = ["mad.lo.u32 %r90, %r91, 32, %r90;"]
    names = []
    for i, array in enumerate([*inputs, result]):
        width = array.dtype.itemsize
        name = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[width] + str(i)
        lines.append(
            f"mul.wide.u32 %d{80 + i}, %r90, {width}; add.s64 %d{80 + i}, %d{80 + i}, %d{90 + i};"
        )
        if array is not result:
            lines.append(f"ld.global.b{8 * width} {name}, [%d{80 + i}];")
        names.append(name)
    is_predicate = opcode.startswith("setp")
    if is_predicate:
        lines.append(f"{opcode} %p1, {', '.join(names[:-1])}; selp.u16 {names[-1]}, 1, 0, %p1;")
    else:
        lines.append(f"{opcode} {names[-1]}, {', '.join(names[:-1])};")
    lines.append(f"st.global.b{8 * result.dtype.itemsize} [%d{80 + len(inputs)}], {names[-1]};")
    run_ptx("\n".join(lines), [*inputs, result], num_blocks=n // 32)
    return result


def integers(bits, signed, seed):
    """Random integers of all magnitudes, extremes among them."""
    dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 64, 256, dtype=np.uint64) >> rng.integers(
        64 - bits, 64, 256, dtype=np.uint64
    )
    values[:8] = np.array(
        [0, 1, 2, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, 7, 31], dtype=np.uint64
    )
    return rng.permutation(values).astype(f"u{bits // 8}").view(dtype)


def wrapped(value, bits, signed):
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> bits - 1 else value


def quotient(a, b):
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else None


INTEGER_OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda a, b: a - b * quotient(a, b) if b else None,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b, c = (integers(bits, signed, seed) for seed in range(3))
    b[::5] = a[::5]
    operands = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))

    def check(opcode, function, inputs, out_bits=bits):
        out = run_instruction(opcode, *inputs, output=f"{kind[0].replace('s', 'i')}{out_bits // 8}")
        for values, result in zip(operands, out.tolist(), strict=True):
            expected = function(*values[: len(inputs)])
            assert expected is None or result == wrapped(expected, out_bits, signed), (
                opcode,
                values,
            )

    for name, function in INTEGER_OPERATIONS.items():
        check(f"{name}.{kind}", function, (a, b))
    check(f"mul.hi.{kind}", lambda a, b: a * b >> bits, (a, b))
    check(f"mad.lo.{kind}", lambda a, b, c: a * b + c, (a, b, c))
    if bits < 64:
        check(f"mul.wide.{kind}", lambda a, b: a * b, (a, b), 2 * bits)
    if signed:
        check(f"neg.{kind}", lambda a: -a, (a,))
        check(f"abs.{kind}", abs, (a,))
    for name, function in (
        ("eq", a == b),
        ("ne", a != b),
        ("lt", a < b),
        ("le", a <= b),
        ("gt", a > b),
        ("ge", a >= b),
    ):
        assert (run_instruction(f"setp.{name}.{kind}", a, b, output="u2") == function).all(), name


def test_carries():
    """A product and a sum of 128 bits, word by word."""
    x, y = (np.random.default_rng(seed).integers(0, 2**32, 4, dtype="u4") for seed in range(2))
    x[1] = 2**32 - 1 - y[1]  # a carry that runs through
    out = np.zeros(13, "u4")
    load = "".join(
        f"ld.global.b32 %r{10 + i}, [%d91+{4 * i}]; ld.global.b32 %r{20 + i}, [%d92+{4 * i}];"
        for i in range(4)
    )
    body = load + """
    add.cc.u32 %r30, %r10, %r20; addc.cc.u32 %r31, %r11, %r21; addc.cc.u32 %r32, %r12, %r22; addc.u32 %r33, %r13, %r23;
    sub.cc.u32 %r34, %r10, %r20; subc.cc.u32 %r35, %r11, %r21; subc.cc.u32 %r36, %r12, %r22; subc.u32 %r37, %r13, %r23;
    mul.lo.u32 %r38, %r10, %r20; mul.hi.u32 %r39, %r10, %r20;
    mad.lo.cc.u32 %r39, %r11, %r20, %r39; madc.hi.u32 %r40, %r11, %r20, 0;
    mad.lo.cc.u32 %r39, %r10, %r21, %r39; madc.hi.cc.u32 %r40, %r10, %r21, %r40; addc.u32 %r41, 0, 0;
    mad.lo.cc.u32 %r40, %r11, %r21, %r40; madc.hi.u32 %r41, %r11, %r21, %r41;
    """  # fmt: skip
    body += "".join(f"st.global.b32 [%d90+{4 * i}], %r{30 + i};" for i in range(12))
    run_ptx(body, [out, x, y], num_threads=1)

    def number(words):
        return sum(int(word) << 32 * i for i, word in enumerate(words))

    assert number(out[:4]) == (number(x) + number(y)) % 2**128
    assert number(out[4:8]) == (number(x) - number(y)) % 2**128
    assert number(out[8:12]) == number(x[:2]) * number(y[:2])


def bit_field(value, position, length, bits, signed):
    sign = value >> min(position + length - 1, bits - 1) & 1 if signed and length else 0
    field = [
        value >> position + i & 1 if i < length and position + i < bits else sign
        for i in range(bits)
    ]
    return sum(bit << i for i, bit in enumerate(field))


def test_bits():
    a, b, c = (integers(32, False, seed) for seed in range(3))
    wide = integers(64, False, 3)
    position = np.random.default_rng(4).integers(0, 40, 256).astype("u4")
    length = np.random.default_rng(5).integers(0, 40, 256).astype("u4")
    p, n = position.tolist(), length.tolist()

    def check(opcode, inputs, expected, output="u4"):
        assert run_instruction(opcode, *inputs, output=output).tolist() == list(expected), opcode

    check("and.b32", (a, b), a & b)
    check("or.b32", (a, b), a | b)
    check("xor.b32", (a, b), a ^ b)
    check("not.b32", (a,), ~a)
    check("shl.b32", (a, position), ((x << s) % 2**32 for x, s in zip(a.tolist(), p, strict=True)))
    check("shr.u32", (a, position), (x >> s for x, s in zip(a.tolist(), p, strict=True)))
    check(
        "shr.s32",
        (a, position),
        ((x >> s) % 2**32 for x, s in zip(a.view("i4").tolist(), p, strict=True)),
    )
    check(
        "shl.b64",
        (wide, position),
        ((x << s) % 2**64 for x, s in zip(wide.tolist(), p, strict=True)),
        "u8",
    )
    check(
        "shr.u64", (wide, position), (x >> s for x, s in zip(wide.tolist(), p, strict=True)), "u8"
    )
    for kind in "us":
        expected = (
            bit_field(x, s, l, 32, kind == "s") for x, s, l in zip(a.tolist(), p, n, strict=True)
        )
        check(f"bfe.{kind}32", (a, position, length), expected)
    mask = [((1 << min(l, 32)) - 1) << s for s, l in zip(p, n, strict=True)]
    check("bfi.b32", (a, b, position, length), (
        (y & ~m | x << s & m) % 2**32 if s < 32 else y for x, y, s, m in zip(a.tolist(), b.tolist(), p, mask, strict=True)
    ))  # fmt: skip
    check("popc.b32", (a,), (x.bit_count() for x in a.tolist()))
    check("clz.b32", (a,), (32 - x.bit_length() for x in a.tolist()))
    check("clz.b64", (wide,), (64 - x.bit_length() for x in wide.tolist()))
    check("brev.b32", (a,), (int(f"{x:032b}"[::-1], 2) for x in a.tolist()))
    both = [y << 32 | x for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    check(
        "shf.l.wrap.b32",
        (a, b, c),
        (x << (s & 31) >> 32 & 0xFFFFFFFF for x, s in zip(both, c.tolist(), strict=True)),
    )
    check(
        "shf.r.wrap.b32",
        (a, b, c),
        (x >> (s & 31) & 0xFFFFFFFF for x, s in zip(both, c.tolist(), strict=True)),
    )
    check(
        "shf.r.clamp.b32",
        (a, b, position),
        (x >> min(s, 32) & 0xFFFFFFFF for x, s in zip(both, p, strict=True)),
    )

    def permuted(x, selector):
        chosen = [(x >> 8 * (selector >> 4 * i & 7) & 255, selector >> 4 * i & 8) for i in range(4)]
        return sum(
            (255 * (byte >> 7) if sign else byte) << 8 * i for i, (byte, sign) in enumerate(chosen)
        )

    check("prmt.b32", (a, b, c), (permuted(x, s) for x, s in zip(both, c.tolist(), strict=True)))


def floats(seed, dtype=torch.float32):
    """Random floats of all magnitudes, with zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, generator=generator) * 2.0 ** torch.randint(
        -30, 30, (256,), generator=generator
    )
    x[::17] = torch.tensor(
        [
            0.0,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            1.0,
            0.5,
            -1.5,
            2.5,
            65504,
            65520,
            1e-7,
            6e-8,
            1e-40,
            3e38,
            8.0,
        ]
    )
    return x.to(dtype)


def as_bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy().copy()


def assert_same(bits, expected, opcode):
    """Equal, NaN too; the signs of zeros count."""
    out = torch.from_numpy(bits).view(expected.dtype)
    same = (out == expected) & (
        out.signbit() == expected.signbit()
    ) | out.isnan() & expected.isnan()
    assert same.all(), (opcode, out[~same], expected[~same])


FLOAT_OPERATIONS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "min": torch.fmin,
    "max": torch.fmax,
    "min.NaN": torch.minimum,
    "max.NaN": torch.maximum,
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_floats(dtype):
    kind = {
        torch.float32: "f32",
        torch.float64: "f64",
        torch.float16: "f16",
        torch.bfloat16: "bf16",
    }[dtype]
    a, b, c = (floats(seed, dtype) for seed in range(3))
    b[::3] = a[::3]
    bits = [as_bits(x) for x in (a, b, c)]
    for name, function in FLOAT_OPERATIONS.items():
        if kind == "f64" and "NaN" in name:
            continue
        zero_order = (a == 0) & (b == 0)  # which of -0 and 0 is the smaller is not defined
        expected = function(a, b)
        out = run_instruction(f"{name}.{kind}", *bits[:2], output=bits[0].dtype)
        out[zero_order.numpy()] = as_bits(expected)[zero_order.numpy()]
        assert_same(out, expected, name)
    assert_same(run_instruction(f"neg.{kind}", bits[0], output=bits[0].dtype), -a, "neg")
    assert_same(run_instruction(f"abs.{kind}", bits[0], output=bits[0].dtype), a.abs(), "abs")
    if kind[-2:] == "16":  # rounded once, from a sum that is exact in float64 or nearly so
        halves = [x.double() for x in (a, b, c)]
        expected = torch.tensor(
            [
                round_once(x * y + z, dtype)
                for x, y, z in zip(*map(torch.Tensor.tolist, halves), strict=True)
            ],
            dtype=dtype,
        )
        assert_same(run_instruction(f"fma.rn.{kind}", *bits, output=bits[0].dtype), expected, "fma")
    if kind == "f32":
        out = run_instruction("fma.rm.f32", *bits, output=bits[0].dtype).view("f4")
        usable = (a * b + c).isfinite().numpy()
        for x, y, z, down in zip(*(t.numpy()[usable] for t in (a, b, c)), out[usable], strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            up = np.nextafter(down, np.float32(np.inf))
            assert Fraction(float(down)) <= exact
            assert not np.isfinite(up) or exact < Fraction(float(up))
    for name, function in (("eq", a == b), ("ne", (a < b) | (a > b)), ("lt", a < b), ("ge", a >= b), ("neu", a != b), ("gtu", ~(a <= b)), ("equ", ~((a < b) | (a > b))), ("nan", a.isnan() | b.isnan())):  # fmt: skip
        assert (
            run_instruction(f"setp.{name}.{kind}", *bits[:2], output="u2") == function.numpy()
        ).all(), name


def round_once(value, dtype):
    """A double, rounded to a 16-bit format without a stop at float32."""
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    if not nearest.isfinite():
        return nearest.item()
    bits = nearest.view(torch.int16).item()
    around = torch.tensor(
        [bits + i for i in (-1, 0, 1) if -32768 <= bits + i <= 32767], dtype=torch.int16
    ).view(dtype)
    around = around[around.isfinite()]
    error = (around.double() - value).abs()
    best = around[error == error.min()]
    even = best[best.view(torch.int16) % 2 == 0]
    return (even if len(best) > 1 else best)[0].item() if error.min() < math.inf else nearest.item()


def test_functions():
    x = floats(7).abs().clamp(1e-30, 1e30).nan_to_num(1.0)
    y = floats(8).clamp(-80, 80).nan_to_num(1.0)
    for opcode, argument, function in (
        ("ex2.approx.ftz.f32", y, torch.exp2),
        ("lg2.approx.f32", x, torch.log2),
        ("sqrt.rn.f32", x, torch.sqrt),
        ("rsqrt.approx.f32", x, torch.rsqrt),
        ("rcp.rn.f32", x, torch.reciprocal),
        ("sin.approx.f32", y, torch.sin),
        ("cos.approx.f32", y, torch.cos),
    ):
        out = torch.from_numpy(run_instruction(opcode, as_bits(argument), output="i4")).view(
            torch.float32
        )
        torch.testing.assert_close(
            out.double(),
            function(argument.double()),
            rtol=1e-6,
            atol=1e-6 if opcode[:3] in ("sin", "cos") else 0,
        )
    out = torch.from_numpy(run_instruction("tanh.approx.f32", as_bits(y), output="i4")).view(
        torch.float32
    )
    error = (out.double() - y.double().tanh()).abs() / y.double().tanh().abs().clamp_min(1e-30)
    assert 2**-14 < error.max() < 2**-11  # as inexact as on the hardware


def test_conversions():
    x = floats(9)
    bits = as_bits(x)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        assert_same(run_instruction(f"cvt.rn.{kind}.f32", bits, output="i2"), x.to(dtype), kind)
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        out = run_instruction(f"cvt.f32.{kind}", every.numpy(), output="i4")
        assert_same(out, every.view(dtype).float(), kind)
        pairs = run_instruction(f"cvt.rn.{kind}x2.f32", bits, bits[::-1].copy(), output="u4")
        low, high = (pairs & 0xFFFF).astype("u2").view("i2"), (pairs >> 16).astype("u2").view("i2")
        assert_same(high, x.to(dtype), kind)
        assert_same(low, x.flip(0).to(dtype), kind)
    rounded = run_instruction("cvt.rna.tf32.f32", bits, output="i4")
    finite = torch.from_numpy(rounded).view(torch.float32)
    mantissa = torch.frexp(x)[0].double().abs() * 2**11
    expected = torch.ldexp(
        torch.sign(x).double() * torch.floor(mantissa + 0.5) / 2**11, torch.frexp(x)[1]
    )
    usable = x.isfinite() & (x.abs() > 1e-30) & (x.abs() < 1e38)
    assert (finite.double() == expected)[usable].all()
    for bits_to in (32, 64):
        limit = 2.0 ** (bits_to - 1)
        values = x.double().nan_to_num(0.0, posinf=limit, neginf=-limit)
        for mode, function in (
            ("rzi", torch.trunc),
            ("rni", torch.round),
            ("rmi", torch.floor),
            ("rpi", torch.ceil),
        ):
            out = run_instruction(f"cvt.{mode}.s{bits_to}.f32", bits, output=f"i{bits_to // 8}")
            expected = [
                min(max(int(v), -(2 ** (bits_to - 1))), 2 ** (bits_to - 1) - 1)
                for v in function(values).tolist()
            ]
            assert out.tolist() == expected, mode
    doubles = x.double().numpy()
    out = run_instruction("cvt.rzi.f64.f64", doubles.view("i8"), output="i8")
    assert_same(out, torch.trunc(x.double()), "rzi.f64")
    n = integers(64, True, 1)
    assert_same(
        run_instruction("cvt.rn.f32.s64", n, output="i4"), torch.from_numpy(n).float(), "s64"
    )
    assert_same(
        run_instruction("cvt.rn.f64.s32", n.astype("i4"), output="i8"),
        torch.from_numpy(n.astype("i4")).double(),
        "s32",
    )
    assert (
        run_instruction("cvt.s32.s8", n.astype("i1").astype("i2"), output="i4") == n.astype("i1")
    ).all()
    assert (
        run_instruction("cvt.u32.u8", n.astype("i1").astype("i2"), output="u4") == n.astype("u1")
    ).all()
    assert (run_instruction("cvt.s64.s32", n.astype("i4"), output="i8") == n.astype("i4")).all()
    assert (
        run_instruction("cvt.u32.u64", n.view("u8"), output="u4") == n.view("u8").astype("u4")
    ).all()
    for kind in ("s8", "u8", "s16", "u16"):
        dtype = np.dtype(kind.replace("s", "i")[0] + str(int(kind[1:]) // 8))
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        wide = np.dtype(f"{dtype.kind}2")  # PTX has no registers of 8 bits
        out = run_instruction(f"cvt.sat.{kind}.s32", n.astype("i4"), output=wide)
        assert (out == n.astype("i4").clip(low, high)).all(), kind
        sat = "sat." if kind[1:] == "8" else ""
        out = run_instruction(f"cvt.rni.{sat}{kind}.f32", bits, output=wide)
        values = x.nan_to_num(0.0, posinf=3e38, neginf=-3e38).round().clamp(low, high)
        assert (out == values.numpy()).all(), kind


def test_conversions_to_bf16():
    x = floats(11)
    bits = as_bits(x)
    toward_zero = torch.from_numpy(run_instruction("cvt.rz.bf16.f32", bits, output="i2")).view(
        torch.bfloat16
    )
    truncated = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    assert ((toward_zero.float() == truncated) | x.isnan() & toward_zero.isnan()).all()
    out = run_instruction("cvt.rn.relu.bf16x2.f32", bits, bits, output="i4")
    positive = (x.relu() + 0.0).bfloat16()  # without a sign
    assert_same((out & 0xFFFF).astype("u2").view("i2"), positive, "relu")
    assert_same((out >> 16).astype("i2"), positive, "relu")


def test_dot_products_of_bytes():
    a, b, c = (integers(32, False, seed) for seed in range(3))
    for kind_a in "su":
        for kind_b in "su":
            bytes_a, bytes_b = (
                words.view("i1" if kind == "s" else "u1").reshape(-1, 4).astype("i8")
                for kind, words in ((kind_a, a), (kind_b, b))
            )
            expected = (bytes_a * bytes_b).sum(1) + c.astype("i8")
            out = run_instruction(f"dp4a.{kind_a}32.{kind_b}32", a, b, c, output="u4")
            assert (out == expected.astype("u4")).all()


def test_find_bit():
    for bits in (32, 64):
        for kind in "su":
            a = integers(bits, kind == "s", 1)
            places = [(~v if v < 0 else v).bit_length() - 1 for v in a.tolist()]
            out = run_instruction(f"bfind.{kind}{bits}", a, output="u4")
            assert out.tolist() == [p % 2**32 for p in places]
            out = run_instruction(f"bfind.shiftamt.{kind}{bits}", a, output="u4")
            assert out.tolist() == [2**32 - 1 if p < 0 else bits - 1 - p for p in places]


def test_saturating_floats():
    x, y = floats(12), floats(13)
    x[::2], y[::2] = torch.rand(128), torch.rand(128) - 0.5
    for name, function in (("add", torch.add), ("mul", torch.mul)):
        expected = function(x, y).nan_to_num(0.0, posinf=1.0, neginf=0.0).clamp(0, 1)
        out = run_instruction(f"{name}.sat.f32", as_bits(x), as_bits(y), output="f4")
        assert (out == expected.numpy()).all(), name
