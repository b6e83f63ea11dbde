"""Read compiled GPU code: registers, spills, tensor-core instructions, widths of global accesses.

`cuobjdump` tells what a kernel uses, `nvdisasm` which instructions it has; both come with Triton. Counts are of
instructions in the code, not of how often they run.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")  # none of these: 32 bits
_TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
_LOADS = ("LDG", "LDGSTS")  # into registers, into shared memory
_COPIES = {"LDGSTS": "cp.async", "UTMALDG": "TMA", "UTMASTG": "TMA", "UBLKCP": "TMA"}


@dataclass(frozen=True)
class Code:
    """Resources of a kernel and counts of the instructions that decide about its speed."""

    registers: int  # of a thread
    local_bytes: int  # of a thread: what does not fit into registers
    spills: int  # loads and stores of local memory
    tensor_cores: dict[str, int]  # by kind
    loads: dict[str, int]  # of global memory, by width in bits
    stores: dict[str, int]
    copies: dict[str, int]  # asynchronous ones into shared memory and back, by kind


def parse(resources: str, listing: str) -> Code:
    """`resources` is what `cuobjdump --dump-resource-usage` prints of one kernel, `listing` what `nvdisasm -c` prints."""
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    tensor_cores: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    spills = 0
    for instruction in _INSTRUCTION.findall(listing):
        kind = instruction.partition(".")[0]
        if kind in _TENSOR_CORES:
            tensor_cores[kind] += 1
        if kind in _LOADS:
            loads[_width(instruction)] += 1
        if kind == "STG":
            stores[_width(instruction)] += 1
        if kind in _COPIES:
            copies[_COPIES[kind]] += 1
        spills += kind in ("LDL", "STL")
    return Code(
        registers=usage["REG"],
        local_bytes=max(usage["STACK"], usage["LOCAL"]),
        spills=spills,
        tensor_cores=dict(tensor_cores),
        loads=_widest_first(loads),
        stores=_widest_first(stores),
        copies=dict(copies),
    )


def _width(instruction: str) -> str:
    found = _WIDTH.search(instruction)
    return found[1] if found else "32"


def _widest_first(accesses: Counter[str]) -> dict[str, int]:
    return dict(sorted(accesses.items(), key=lambda item: -int(item[0])))


def disassemble(cubin: bytes, cuobjdump: str, nvdisasm: str) -> list[str]:
    """Resources and listing of the kernels of a cubin; `cuobjdump` and `nvdisasm` are the paths of these programs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return [
            subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout
            for command in ([cuobjdump, "--dump-resource-usage"], [nvdisasm, "-c", "-ndf"])
        ]
