"""Each instruction set that this CPU has gives the same text, and none leaks into code that every CPU runs."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leangpt.kernels import decode

pytestmark = pytest.mark.usefixtures("native_engine")

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
ROUNDS_TO_BF16 = ("avx512_bf16", "amx")  # activations that weights in bf16 are multiplied with
BUILT = Path(__file__).resolve().parents[1] / "build" / "temp"
KERNELS = (BUILT / "_engine" / "csrc" / "cpu", BUILT / "_C" / "csrc" / "train")  # objects
# no float64 torch here: each ISA is compared with the float32 torch model; its products of bf16 round activations
PROGRAM = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
sys.path.append(sys.argv[1])
from leangpt import Generator, SamplingParams
from leangpt.kernels import decode
from leangpt.decoding.native_decoder import NativeDecoder
from native_helpers import LLAMA, make_model, text_of, whole
results = {"isa": decode.cpu_isa()}
for format in ("fp32", "bf16", "int8", "int4_asym_g64", "int8_dynamic", "fp32, int8 cache"):
    torch.manual_seed(0)
    model = make_model(n_head=4, n_embd=80, n_kv_head=2, max_seq_len=400, **LLAMA)
    weights, _, cache = format.partition(", ")
    decoder = NativeDecoder.from_model(model, weights, kv_dtype="int8" if cache else "float32")
    results[format] = whole(decoder, text_of(300))
    [text] = Generator(decoder).generate([text_of(9)], SamplingParams(temperature=0, max_new_tokens=60))
    results[format + " text"] = text.token_ids
np.savez(sys.argv[2], **results)
"""


@functools.cache
def run(isa: str, folder: Path) -> dict[str, np.ndarray] | None:
    """What the program gave; None where the CPU lacks the ISA."""
    out = folder / f"{isa}.npz"
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), out],
        env=os.environ | {"LEANGPT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "not supported by this CPU" in process.stderr:
        return None
    assert process.returncode == 0, process.stderr
    return dict(np.load(out))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("isa")


@pytest.mark.parametrize("isa", ISAS[1:])
def test_the_same_text_as_portable_code(isa, folder):
    results = run(isa, folder)
    if results is None:
        pytest.skip(f"this CPU has no {isa}")
    portable = run("portable", folder)
    assert portable is not None
    assert (results.pop("isa"), portable["isa"]) == (isa, "portable")
    for name, values in results.items():
        expected = portable[name]
        if name.endswith(" text"):
            if not (name == "bf16 text" and isa in ROUNDS_TO_BF16):
                np.testing.assert_array_equal(values, expected)
            continue
        # 8-bit activations, and those rounded to bf16, may fall to the other side of a rounding
        is_coarse = name in ("int8_dynamic", "fp32, int8 cache") or (
            name == "bf16" and isa in ROUNDS_TO_BF16
        )
        limit = (0.05 if is_coarse else 1e-5) * np.abs(expected).max()
        assert np.abs(values - expected).max() <= limit, name


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != decode.cpu_isa()])
def test_bits_and_accuracy(isa):
    """What holds for the best instruction set holds for the others."""
    tests = Path(__file__).parent
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "TestBits or same_bits or as_accurate or 8_bit or finite"),
            *(tests / "test_native_decoder.py", tests / "test_native_linear.py"),
        ],
        env=os.environ | {"LEANGPT_CPU_ISA": isa},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if "not supported by this CPU" in process.stdout + process.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert process.returncode == 0, process.stdout
    assert " passed" in process.stdout


def tool(name: str, in_ci: bool) -> str:
    path = shutil.which(name)
    missing = [what for what in KERNELS if not what.is_dir()] + ([] if path else [name])
    if path is None or missing:
        assert not in_ci, f"CI must scan the objects: {missing} are missing"
        pytest.skip(f"{missing} are missing")
    return path


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("folder", KERNELS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_no_function_of_a_wide_isa_can_stand_for_a_common_one(isa, folder, in_ci):
    """Weak symbols are merged over all objects: the linker might keep the one that not every CPU can run."""
    symbols = output_of(tool("nm", in_ci), "-C", folder / f"kernels_{isa}.o")
    assert "kTable" in symbols
    weak = re.findall(r"^[0-9a-f ]{16} [WVu] (.*)", symbols, re.MULTILINE)
    # of this instruction set by its name (a template's comes after its return type), or a pointer for exceptions
    own = re.compile(rf"(auto |void )?leangpt::\w+::{isa}::|DW\.ref\.")
    assert [name for name in weak if not own.match(name)] == []


def test_common_code_uses_no_wide_registers(in_ci):
    objdump = tool("objdump", in_ci)
    common = [
        path
        for folder in (BUILT / "_engine", BUILT / "_C")
        for path in folder.rglob("*.o")
        if not path.name.startswith(("kernels_avx", "kernels_amx", "bindings"))
    ]
    assert {"engine.o", "decoder.o", "gemm.o", "kernels_portable.o"} <= {p.name for p in common}
    wide = re.compile(r"%[yz]mm|\sv[a-z0-9]+\s.*%xmm")  # registers, and VEX or EVEX instructions
    for path in common:
        code = output_of(objdump, "-d", "--no-show-raw-insn", path)
        assert code.count("\n") > 10
        assert [line for line in code.splitlines() if wide.search(line)] == [], path
    for folder in KERNELS:  # the scan sees them where they are
        checked = output_of(objdump, "-d", "--no-show-raw-insn", folder / "kernels_avx512.o")
        assert wide.search(checked)
