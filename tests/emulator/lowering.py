"""From a kernel's PTX statements to the program that the emulator executes.

Opcodes become names of the emulator's own table of instructions (simt/): modifiers that change nothing here are dropped, all
others stay in the name, and a name that the table does not have is `Unsupported`. Operands become places in the register file of
a warp (registers.py), and are converted where their register is wider or narrower than the instruction's type.
"""

import ctypes
import re
import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from . import machine
from .ptx import Address, Kernel, Label, Statement, Unsupported, num_bytes
from .registers import SPECIAL_REGISTERS, RegisterFile

SPACES = {"global": 0, "shared": 1, "local": 2, "generic": 3, "param": 4}
ORDERS = {
    "acquire": 1 | 4,
    "release": 2 | 4,
    "acq_rel": 1 | 2 | 4,
    "relaxed": 4,
    "volatile": 4,
}

# modifiers without a meaning here: rounding that is the default, what the hardware may approximate, hints for caches, and
# the scope of an order, since all is seen by all
IGNORED = {
    *("rn", "approx", "full", "ftz", "sync", "aligned", "noftz"),
    *("gpu", "cta", "sys", "ca", "cg", "cs", "cv", "wb", "wt", "nc", "weak"),
    *("L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::no_allocate"),
    *("L1::evict_unchanged", "L2::evict_first", "L2::evict_last", "L2::evict_normal"),
    *("L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
}
UNSIGNED_CONDITIONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
# hints: no instruction at all
NOTHING = {
    *("griddepcontrol", "prefetch", "prefetchu", "discard", "applypriority", "createpolicy"),
    "nanosleep",
}


# of a row of the program, as `Row` of simt/api.cpp has them
_COLUMNS = [
    "entry", "guard", "is_negated", "immediate", "first_operand", "num_operands", "space", "order", "is_label",
]  # fmt: skip


@dataclass
class Program:
    """A lowered kernel, in the arrays that the emulator's library takes."""

    kernel: Kernel
    rows: array = field(default_factory=lambda: array("q"))
    operands: array = field(default_factory=lambda: array("I"))
    statements: list[Statement] = field(default_factory=list)  # of each row
    constants: bytes = b""  # the registers that are filled beforehand
    register_bytes: int = 0
    # the kernel's variables in global memory
    buffers: dict[str, ctypes.Array] = field(default_factory=dict)
    global_granule: int = 4  # log2 of the narrowest access
    shared_granule: int = 4


class _Lowering:
    """The lowering of one kernel, statement by statement."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.program = Program(kernel)
        self.file = RegisterFile(kernel)
        self.program.buffers = {
            name: (ctypes.c_char * len(value)).from_buffer(value)
            for name, value in kernel.variables.items()
        }
        # an address in param, shared or local memory is an offset
        self.addresses = {
            **kernel.params.offsets, **kernel.shared.offsets, **kernel.local.offsets,
            **{name: ctypes.addressof(buffer) for name, buffer in self.program.buffers.items()},
        }  # fmt: skip
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[int, str]] = []
        self.is_label = True
        self.statement: Statement
        self.guard = -1
        self.is_negated = False

    def run(self) -> Program:
        for i, part in enumerate(self.kernel.body):
            if isinstance(part, Label):
                self.labels[part.name] = len(self.program.statements)
                self.is_label = True
                continue
            self.statement = part
            try:
                self.lower(part)
            except Unsupported as error:
                raise Unsupported(
                    f"{error}: {part.text!r} ({part.source or self.kernel.name})"
                ) from None
            self.file.end_statement(i, part)
        self.guard = -1
        self.emit("exit", [])
        return self.finish()

    def finish(self) -> Program:
        program, width = self.program, len(_COLUMNS)
        for row, label in self.branches:
            if label not in self.labels:
                raise Unsupported(f"label {label}")
            program.rows[row * width + _COLUMNS.index("immediate")] = self.labels[label]
        program.constants = self.file.constant_bytes()
        program.register_bytes = len(program.constants) + self.file.num_bytes
        program.operands = array("I", map(self.file.offset, program.operands))
        guard = _COLUMNS.index("guard")
        for at in range(guard, len(program.rows), width):
            if program.rows[at] >= 0:
                program.rows[at] = self.file.offset(program.rows[at])
        return program

    # ---- operands

    def value(self, operand: str, ptx_type: str) -> int:
        """The place that holds an operand as a value of a type."""
        size = num_bytes(ptx_type)
        if operand.startswith("!"):
            place = self.file.temporary(1)
            self.emit("not.pred", [place, self.value(operand[1:], "pred")])
            return place
        if operand in SPECIAL_REGISTERS:
            return self.resize(self.file.register(operand), 4, size)
        number = _number(operand, ptx_type)
        if number is None:
            number = self.addresses.get(operand)
        if number is not None:
            return self.file.constant(number % (1 << 8 * size), size)
        return self.resize(
            self.file.register(operand), num_bytes(self.kernel.type_of(operand)), size
        )

    def resize(self, place: int, size: int, wanted: int, is_signed: bool = False) -> int:
        """The place of the same value in more or fewer bytes."""
        if size == wanted:
            return place
        to = self.file.temporary(wanted)
        kind = "s" if is_signed else "u"
        self.emit(f"cvt.{kind}{8 * wanted}.{kind}{8 * size}", [to, place])
        return to

    def result(
        self, operand: str, ptx_type: str, is_signed: bool
    ) -> tuple[int, Callable[[], None]]:
        """The place for a result, and what is left to do once it is there."""
        size = num_bytes(ptx_type)
        if operand == "_":
            return self.file.temporary(size), lambda: None
        place, declared = self.file.register(operand), num_bytes(self.kernel.type_of(operand))
        if size == declared:
            return place, lambda: None
        temporary = self.file.temporary(size)
        kind = "s" if is_signed else "u"
        name = f"cvt.{kind}{8 * declared}.{kind}{8 * size}"
        return temporary, lambda: self.emit(name, [place, temporary])

    # ---- rows

    def emit(
        self, name: str, places: Iterable[int], immediate: int = 0, space: int = 0, order: int = 0
    ) -> None:
        """Append one instruction of the emulator's table."""
        program, places = self.program, list(places)
        row = [machine.instructions()[name][0], self.guard, self.is_negated, immediate]
        row += [len(program.operands), len(places), space, order, self.is_label]
        program.rows.extend(row)
        program.operands.extend(places)
        program.statements.append(self.statement)
        self.is_label = False

    def instruction(
        self,
        name: str,
        operands: list[str | Address],
        is_signed: bool = False,
        space: str = "global",
        order: int = 0,
    ) -> None:
        """Append an instruction with operands as PTX has them, converted to the types that the table tells."""
        if name not in machine.instructions():
            raise Unsupported(f"no instruction {name}")
        types = machine.instructions()[name][1]
        repeated = len(operands) - len(types) + 1
        types = [t.rstrip("*") for t in types for _ in range(repeated if t.endswith("*") else 1)]
        if len(types) != len(operands):
            raise Unsupported(f"{len(operands)} operands of {name}")
        places, afterwards, immediate = [], [], 0
        for operand, ptx_type in zip(operands, types, strict=True):
            if isinstance(operand, Address):
                if ptx_type == "address":
                    immediate = operand.offset
                elif operand.offset:
                    raise Unsupported(f"operand [{operand.base}+{operand.offset}]")
                ptx_type = "b32" if space == "shared" or ptx_type == "b32" else "b64"
                places.append(self.value(operand.base, ptx_type))
            elif ptx_type.startswith("="):
                place, after = self.result(operand, ptx_type[1:], is_signed)
                places.append(place)
                afterwards.append(after)
            else:
                places.append(self.value(operand, ptx_type))
        self.emit(name, places, immediate, SPACES[space], order)
        for after in afterwards:
            after()

    # ---- statements

    def lower(self, statement: Statement) -> None:
        self.guard, self.is_negated = -1, False
        if statement.guard:
            self.guard, self.is_negated = self.file.register(statement.guard), statement.is_negated
        opcode, *modifiers = statement.opcode.split(".")
        modifiers = [m for m in modifiers if m not in IGNORED]
        if opcode in NOTHING:
            return
        rule = _RULES.get(opcode, _Lowering.plain)
        if "cc" in modifiers or opcode in ("addc", "subc", "madc"):
            rule = _Lowering.carry
        rule(self, opcode, modifiers, statement.operands)

    def plain(self, opcode: str, modifiers: list[str], operands: list) -> None:
        """An instruction whose name and operands are those of PTX."""
        self.instruction(".".join([opcode, *modifiers]), _flat(operands), _is_signed(modifiers))

    def carry(self, opcode: str, modifiers: list[str], operands: list) -> None:
        """Arithmetic that sets the carry flag, an operand behind the result here, or uses it, the last operand."""
        self.kernel.register_types["%cc"] = "pred"
        out, into = ["%cc"] * ("cc" in modifiers), ["%cc"] * opcode.endswith("c")
        modifiers[-1] = modifiers[-1].replace("s", "u")
        self.instruction(".".join([opcode, *modifiers]), [operands[0], *out, *operands[1:], *into])

    def move(self, opcode: str, modifiers: list[str], operands: list) -> None:
        (ptx_type,) = modifiers
        whole = _bits(ptx_type)
        result, source = operands
        for name, vector in (("pack", source), ("unpack", result)):
            if isinstance(vector, tuple):
                part = f"b{8 * num_bytes(ptx_type) // len(vector)}"
                return self.instruction(f"{name}.{whole}.{part}", _flat(operands))
        return self.instruction(f"mov.{whole}", operands)

    def select(self, opcode: str, modifiers: list[str], operands: list) -> None:
        (ptx_type,) = modifiers
        self.instruction(f"selp.{_bits(ptx_type)}", operands)

    def compare(self, opcode: str, modifiers: list[str], operands: list) -> None:
        """setp, with a second result, its opposite, and a predicate that it is combined with."""
        condition, *logic, ptx_type = modifiers
        condition = UNSIGNED_CONDITIONS.get(condition, condition)
        results, a, b, *other = operands
        result, _, opposite = results.partition("|")
        if not opposite and not logic:
            return self.instruction(f"setp.{condition}.{ptx_type}", [result, a, b])
        types = machine.instructions().get(f"setp.{condition}.{ptx_type}")
        if not types or len(logic) != len(other):
            raise Unsupported(f"no instruction setp.{condition}.{ptx_type}")
        compared, negated = self.file.temporary(1), self.file.temporary(1)
        self.emit(
            f"setp.{condition}.{ptx_type}",
            [compared, self.value(a, types[1][1]), self.value(b, types[1][2])],
        )
        self.emit("not.pred", [negated, compared])
        combined = self.value(other[0], "pred") if other else None
        for name, place in ((result, compared), (opposite, negated)):
            if name and name != "_":
                if combined is None:
                    self.emit("mov.pred", [self.file.register(name), place])
                else:
                    self.emit(f"{logic[0]}.pred", [self.file.register(name), place, combined])
        return None

    def memory(self, opcode: str, modifiers: list[str], operands: list) -> None:
        """ld, st, atom, red: their space, order, vector and type are modifiers."""
        *modifiers, ptx_type = modifiers
        space, order, kept = "generic", 0, []
        for modifier in modifiers:
            if modifier.partition("::")[0] in SPACES:
                space = modifier.partition("::")[0]
            elif modifier == "const":
                space = "global"  # its variables lie there
            elif modifier in ORDERS:
                order |= ORDERS[modifier]
            elif modifier not in ("v2", "v4", "v8"):
                kept.append(modifier)
        is_signed, flat = _is_signed([ptx_type]), _flat(operands)
        has_hint = "L2::cache_hint" in self.statement.opcode
        flat = flat[: len(flat) - has_hint]
        is_plain = opcode in ("ld", "ldu", "st")
        self.narrow(space, num_bytes(ptx_type) * (len(flat) - 1 if is_plain else 1))
        if is_plain or kept[0] not in ("add", "min", "max", "inc", "dec"):
            ptx_type = _bits(ptx_type)
        name = ".".join([opcode.rstrip("u"), *kept, ptx_type])
        self.instruction(name, flat, is_signed, space, order)

    def narrow(self, space: str, width: int) -> None:
        """Let shadow memory tell apart what is this narrow."""
        log2 = width.bit_length() - 1
        if space in ("shared", "generic"):
            self.program.shared_granule = min(self.program.shared_granule, log2)
        if space in ("global", "generic"):
            self.program.global_granule = min(self.program.global_granule, log2)

    def async_copy(self, opcode: str, modifiers: list[str], operands: list) -> None:
        if modifiers[0] != "async":
            raise Unsupported("no such copy")
        if modifiers[1] in ("commit_group", "wait_group", "wait_all"):
            return self.instruction(f"cp.async.{modifiers[1]}", operands)
        if {m.partition("::")[0] for m in modifiers[1:]} != {"shared", "global"}:
            raise Unsupported("no such copy")
        if "L2::cache_hint" in self.statement.opcode:
            operands = operands[:-1]
        destination, source, width, *source_bytes = operands
        if destination.offset:
            place = self.file.temporary(4)
            base = self.value(destination.base, "b32")
            self.emit(
                "add.u32", [place, base, self.file.constant(destination.offset % (1 << 32), 4)]
            )
        else:
            place = self.value(destination.base, "b32")
        self.narrow("shared", int(width, 0))
        self.narrow("global", int(width, 0))
        places = [place, self.value(source.base, "b64"), self.value(width, "b32")]
        places.append(self.value(source_bytes[0] if source_bytes else width, "b32"))
        return self.emit("cp.async", places, source.offset)

    def branch(self, opcode: str, modifiers: list[str], operands: list) -> None:
        self.branches.append((len(self.program.statements), operands[0]))
        self.emit("bra", [])

    def leave(self, opcode: str, modifiers: list[str], operands: list) -> None:
        self.emit("exit", [])

    def barrier(self, opcode: str, modifiers: list[str], operands: list) -> None:
        """bar or barrier: the number of threads, the whole block, may be left out; `sync` has been dropped."""
        modifiers = [m for m in modifiers if m != "cta"]
        if modifiers == ["warp"]:
            return self.instruction("bar.warp", operands)
        kind = ".".join(modifiers) or "sync"
        before = operands[:1] if modifiers[:1] == ["red"] else []
        after = operands[-1:] if before else []
        number, *threads = operands[len(before) : len(operands) - len(after)]
        self.instruction(f"bar.{kind}", [*before, number, *(threads or ["0"]), *after])

    def shuffle(self, opcode: str, modifiers: list[str], operands: list) -> None:
        result, *rest = operands
        result, _, in_range = result.partition("|")
        self.instruction(f"shfl.{'.'.join(modifiers)}", [result, in_range or "_", *rest])

    def matrix(self, opcode: str, modifiers: list[str], operands: list) -> None:
        if modifiers[0] != "m8n8" or modifiers[-1] != "b16":
            raise Unsupported("no such matrix")
        name = "ldmatrix.trans.b16" if "trans" in modifiers else "ldmatrix.b16"
        results, address = operands
        results = (results,) if isinstance(results, str) else results
        self.narrow("shared", 16)
        self.instruction(name, [*results, address], space="shared")

    def fence(self, opcode: str, modifiers: list[str], operands: list) -> None:
        if any(m not in ("gl", "sc", "acq_rel") for m in modifiers):
            raise Unsupported("no such fence")
        self.emit("fence", [])

    def convert_address(self, opcode: str, modifiers: list[str], operands: list) -> None:
        if "global" in modifiers:
            self.instruction("mov.b64", operands)
        else:
            self.instruction(
                ".".join([opcode, *(m for m in modifiers if m in ("to", "shared", "local"))]),
                operands,
            )


_RULES = {
    "mov": _Lowering.move,
    "selp": _Lowering.select,
    "setp": _Lowering.compare,
    "ld": _Lowering.memory,
    "ldu": _Lowering.memory,
    "st": _Lowering.memory,
    "atom": _Lowering.memory,
    "red": _Lowering.memory,
    "cp": _Lowering.async_copy,
    "bra": _Lowering.branch,
    "ret": _Lowering.leave,
    "exit": _Lowering.leave,
    "bar": _Lowering.barrier,
    "barrier": _Lowering.barrier,
    "shfl": _Lowering.shuffle,
    "ldmatrix": _Lowering.matrix,
    "membar": _Lowering.fence,
    "fence": _Lowering.fence,
    "cvta": _Lowering.convert_address,
}


def _bits(ptx_type: str) -> str:
    """The type without a meaning: `b32` of `f32`."""
    return "pred" if ptx_type == "pred" else f"b{8 * num_bytes(ptx_type)}"


def _flat(operands: list) -> list[str | Address]:
    """The operands with vectors taken apart."""
    return [name for o in operands for name in (o if isinstance(o, tuple) else (o,))]


def _is_signed(modifiers: list[str]) -> bool:
    """Whether the result, which the first type is of, has a sign to extend."""
    types = [m for m in modifiers if re.fullmatch(r"[subf]\d+", m)]
    return bool(types) and types[0].startswith("s")


def _number(text: str, ptx_type: str) -> int | None:
    """The bits of a literal of a type, or None if the text is not a literal."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        bits, size = int(text[2:], 16), (len(text) - 2) // 2
        if size == num_bytes(ptx_type):
            return bits
        number = struct.unpack({4: "<f", 8: "<d"}[size], bits.to_bytes(size, "little"))[0]
        return _float_bits(number, ptx_type)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        number = int(text.rstrip("U"), 0)
        return _float_bits(number, ptx_type) if ptx_type.startswith("f") else number % (1 << 64)
    if re.fullmatch(r"-?\d+\.\d*([eE][+-]?\d+)?", text) and ptx_type.startswith("f"):
        return _float_bits(float(text), ptx_type)
    return None


def _float_bits(value: float, ptx_type: str) -> int:
    return int.from_bytes(struct.pack({4: "<f", 8: "<d"}[num_bytes(ptx_type)], value), "little")


def lower(kernel: Kernel) -> Program:
    """Lower a kernel for the emulator."""
    return _Lowering(kernel).run()
