"""Where the registers of a kernel lie in the register file of a warp.

A register is an array of 32 values, and its place a byte offset. Constants and special registers come first and are filled
beforehand. The others follow; those that live only between two labels share their places, so that the file stays in the cache.
"""

from .ptx import Address, Kernel, Label, Statement, num_bytes

LANES = 32
ALIGNMENT = 64
# filled by Launch::start in simt/scheduler.cpp, in this order
SPECIAL_REGISTERS = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *(
        "%laneid",
        "%warpid",
        "%lanemask_eq",
        "%lanemask_lt",
        "%lanemask_le",
        "%lanemask_gt",
        "%lanemask_ge",
    ),
    "%nwarpid",
]
_CONSTANT = 1 << 31  # marks an offset among the constants, until their number is known


class RegisterFile:
    """The places of a kernel's registers, given out while its statements are lowered in order."""

    def __init__(self, kernel: Kernel):
        self.num_bytes = 0  # without the constants
        self._kernel = kernel
        self._last_use = _last_uses(kernel)
        self._constants = bytearray(LANES * 4 * len(SPECIAL_REGISTERS))
        self._places = {name: _CONSTANT | LANES * 4 * i for i, name in enumerate(SPECIAL_REGISTERS)}
        self._temporaries: list[tuple[int, int]] = []
        self._free: dict[int, list[int]] = {}  # by the size of a value

    def register(self, name: str) -> int:
        """The place of a register."""
        if name not in self._places:
            size = num_bytes(self._kernel.type_of(name))
            self._places[name] = self._allocate(size, is_short_lived=name in self._last_use)
        return self._places[name]

    def constant(self, value: int, size: int) -> int:
        """The place of a constant of some bytes."""
        key = f"{value}:{size}"
        if key not in self._places:
            self._constants += bytes(-len(self._constants) % ALIGNMENT)
            self._places[key] = _CONSTANT | len(self._constants)
            self._constants += value.to_bytes(size, "little") * LANES
        return self._places[key]

    def temporary(self, size: int) -> int:
        """A place until the end of the statement."""
        place = self._allocate(size, is_short_lived=True)
        self._temporaries.append((place, size))
        return place

    def end_statement(self, index: int, statement: Statement) -> None:
        """Take back the places of what is not used after a statement."""
        for name in set(statement.registers()):
            if self._last_use.get(name) == index and name in self._places:
                size = num_bytes(self._kernel.type_of(name))
                self._free.setdefault(size, []).append(self._places.pop(name))
        for place, size in self._temporaries:
            self._free.setdefault(size, []).append(place)
        self._temporaries.clear()

    def constant_bytes(self) -> bytes:
        """The beginning of the file."""
        return bytes(self._constants) + bytes(-len(self._constants) % ALIGNMENT)

    def offset(self, place: int) -> int:
        """The byte offset of a place, once all constants are known."""
        if place & _CONSTANT:
            return place & ~_CONSTANT
        return place + len(self._constants) + -len(self._constants) % ALIGNMENT

    def _allocate(self, size: int, is_short_lived: bool) -> int:
        # one that lives across a label must not get a used place: in a loop, the earlier users come again
        if is_short_lived and self._free.get(size):
            return self._free[size].pop()
        place = self.num_bytes
        self.num_bytes += max(LANES * size, ALIGNMENT)
        return place


def _last_uses(kernel: Kernel) -> dict[str, int]:
    """The statement of the last use of each register that is written first, and lives only, between two targets of branches."""
    branches = [p for p in kernel.body if isinstance(p, Statement) and p.opcode.startswith("bra")]
    targets = {branch.operands[-1] for branch in branches}
    segment = 0
    home: dict[
        str, int
    ] = {}  # the segment of a register; -1: several, or read before it is written
    last: dict[str, int] = {}
    for i, part in enumerate(kernel.body):
        if isinstance(part, Label):
            segment += part.name in targets
            continue
        results = _results(part)
        for name in part.registers():
            if name not in home:
                home[name] = segment if name in results else -1
            elif home[name] != segment:
                home[name] = -1
            last[name] = i
    return {name: i for name, i in last.items() if home[name] >= 0}


def _results(statement: Statement) -> tuple[str, ...]:
    """The registers that a statement writes in all threads."""
    is_store = statement.opcode.startswith(("st.", "red.", "bra", "bar"))
    if is_store or statement.guard or not statement.operands:
        return ()
    first = statement.operands[0]
    if isinstance(first, Address):
        return ()
    return first if isinstance(first, tuple) else tuple(first.split("|"))
