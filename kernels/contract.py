"""The contract: what kernels compiled to when it was last agreed to, and what is worse now.

`contract.json` holds for each kernel and architecture the figures of `triton_report.Row` and `cuda_report.Kernel`. They depend on
the versions of Triton, ptxas and nvcc, which stand in the file, and on the code: a digest of it and of the figures stands beside
them. Where it is the same still, compiling would give these figures again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("contract.json")

Figures = dict[str, Any]  # of a kernel on an architecture
Kernels = dict[str, dict[str, Figures]]  # by name and architecture


def save(versions: dict[str, str], kernels: Kernels) -> None:
    """One line a kernel and architecture, so that a change is easy to read."""
    lines = []
    for name, archs in sorted(kernels.items()):
        rows = [f"   {json.dumps(arch)}: {json.dumps(row)}" for arch, row in archs.items()]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    text = f'{{\n "versions": {json.dumps(versions)},\n "kernels": {{\n'
    PATH.write_text(text + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def load(versions: dict[str, str]) -> Kernels:
    """Raises ValueError where the file is of other versions than those in use."""
    document = json.loads(PATH.read_text(encoding="utf-8"))
    if not is_of(versions):
        raise ValueError(
            f"{PATH.name} is of {_words(document['versions'])}, and this is {_words(versions)}: install the versions"
            " of requirements.lock, or make it anew with `leangpt kernels update`"
        )
    return document["kernels"]


def with_digest(code: str, figures: Figures) -> Figures:
    """`code` tells all that the figures came of, but for the versions in the file."""
    figures = {name: value for name, value in figures.items() if name != "digest"}
    text = f"{code} {json.dumps(figures)}"
    return figures | {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def are_of(code: str, figures: Figures) -> bool:
    """Whether the figures are those of this code."""
    return figures.get("digest") == with_digest(code, figures)["digest"]


def is_of(versions: dict[str, str]) -> bool:
    """Whether there is a file, and of these versions."""
    if not PATH.exists():
        return False
    found = json.loads(PATH.read_text(encoding="utf-8"))["versions"]
    return {name: found.get(name) for name in versions} == versions


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def differences(expected: Kernels, actual: Kernels) -> list[str]:
    """One line for everything that is worse than expected, new or gone."""
    lines = []
    for name in sorted(expected.keys() | actual.keys()):
        before, now = expected.get(name, {}), actual.get(name, {})
        for arch in sorted(before.keys() | now.keys()):
            if arch not in now:
                lines.append(f"{name} {arch}: gone")
            elif arch not in before:
                lines.append(f"{name} {arch}: new")
            else:
                lines += [f"{name} {arch}: {what}" for what in _worse(before[arch], now[arch])]
    return lines


def _worse(before: Figures, now: Figures) -> list[str]:
    found = []
    for what in ("spills", "local_bytes"):
        if now[what] > before[what]:
            found.append(f"{what} {before[what]} -> {now[what]}")
    for what in ("tensor_cores", "copies"):
        lost = before[what].keys() - now[what].keys()
        found += [f"no {kind} any more, of {before[what][kind]}" for kind in sorted(lost)]
    for what in ("loads", "stores"):
        if _width(now[what]) < _width(before[what]):
            found.append(f"narrower {what}, bits: number {before[what]} -> {now[what]}")
    warps = [row["blocks_per_sm"] * row["num_warps"] for row in (before, now)]
    if warps[1] < warps[0]:
        registers = f"registers {before['registers']} -> {now['registers']}"
        shared = f"shared bytes {before['shared_bytes']} -> {now['shared_bytes']}"
        found.append(f"occupancy {warps[0]} -> {warps[1]} warps an SM ({registers}, {shared})")
    return found


def _width(accesses: dict[str, int]) -> tuple[float, int]:
    """The share of bytes that move in accesses of 128 bits or more, and the widest access."""
    bits = {int(width): int(width) * number for width, number in accesses.items()}
    total = sum(bits.values())
    wide = sum(n for width, n in bits.items() if width >= 128)
    return (wide / total if total else 1.0, max(bits, default=0))
