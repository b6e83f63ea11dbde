"""Reader of PTX: a module's text becomes kernels with their parameters, variables and statements.

It knows the grammar that Triton, nvcc and inline assembly write, and no instruction: what an opcode means is the business of
lowering.py and of the table in simt/. Anything else of the grammar raises `Unsupported`, it is never skipped.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

SHARED_GAP = 16  # bytes behind a static variable in shared memory that nobody may touch


class Unsupported(Exception):
    """The PTX holds something that the emulator does not implement."""


@dataclass(frozen=True, slots=True)
class Address:
    """An operand `[base+offset]`; the base is a register, a parameter, a variable or a number."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(slots=True)
class Statement:
    """One instruction, such as `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];`."""

    opcode: str
    operands: list[Operand]
    guard: str  # the predicate register, or empty
    is_negated: bool
    text: str
    source: str  # "file.py:12", with " in caller.py:34" if it was inlined, or empty

    def registers(self) -> Iterator[str]:
        """The names of all operands, registers among them."""
        if self.guard:
            yield self.guard
        for operand in self.operands:
            if isinstance(operand, Address):
                yield operand.base
            else:
                for name in (operand,) if isinstance(operand, str) else operand:
                    yield from name.lstrip("!").split("|")


@dataclass(slots=True)
class Label:
    name: str


@dataclass(slots=True)
class Variables:
    """Variables of one memory space, laid out from offset 0."""

    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, name: str, num_bytes: int, alignment: int) -> None:
        self.offsets[name] = -(-self.num_bytes // alignment) * alignment
        self.sizes[name] = num_bytes
        self.num_bytes = self.offsets[name] + num_bytes


@dataclass(slots=True)
class Kernel:
    name: str
    max_threads: int  # of a block
    params: Variables
    shared: Variables  # static ones, with gaps; those of dynamic size start behind them
    shared_bytes: int  # of the static ones without gaps
    local: Variables  # of each thread
    variables: dict[str, bytearray]  # in global memory, with their values: those of the module
    register_types: dict[str, str]  # "%r" of a family `%r<9>`, or a whole name -> "b32"
    body: list[Statement | Label]

    def type_of(self, register: str) -> str:
        """The type that a register was declared with."""
        types = self.register_types
        found = types.get(register) or types.get(register.rstrip("0123456789"))
        if not found:
            raise Unsupported(f"operand {register}")
        return found


def num_bytes(ptx_type: str) -> int:
    """The size of a type: 4 of `f32`, 4 of `f16x2`, 1 of `pred`."""
    if ptx_type == "pred":
        return 1
    bits, _, count = ptx_type.lstrip("abcdefghijklmnopqrstuvw").partition("x")
    return int(bits) * int(count or 1) // 8


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"[^\n]*', re.M)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
_VARIABLE = re.compile(
    r"(\.extern\s+)?(?:\.(?:visible|weak|common)\s+)?\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$.]+)(\[(\d*)\])?$"
)
_GLOBAL = re.compile(
    r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*\{?([^;{}]*)\}?)?\s*;"
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?)?"
    r"\s+([\w$]+)(?:\[(\d+)\])?"
)
# the parts of a body: a source line, a scope, a label, or a statement up to its semicolon
_PART = re.compile(
    r"\s*(?:\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*?(?:inlined_at\s+(?P<outer_file>\d+)\s+(?P<outer_line>\d+)[^\n]*)?\n|(?P<scope>[{}])|(?P<label>[$\w%]+):(?!:)|(?P<statement>[^;{}\s][^;]*);)"
)
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)\s*(?:,|$)")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if not text.startswith("["):
        return text
    address = _ADDRESS.match(text)
    if not address:
        raise Unsupported(f"operand {text}")
    return Address(address[1], int(address[2] or "0", 0))


class _Body:
    """The reader of a kernel's body: scopes of registers, source lines, statements."""

    def __init__(self, files: dict[str, str]):
        self.files = files
        self.types: dict[str, str] = {}
        self.variables: list[str] = []
        self.parts: list[Statement | Label] = []
        self.scopes: list[dict[str, str]] = [{}]  # names of inline assembly -> unique names
        self.source = ""

    def read(self, text: str, start: int) -> None:
        """Read from behind the opening brace to its partner."""
        position = start
        while True:
            part = _PART.match(text, position)
            if not part:
                raise Unsupported(f"PTX {text[position : position + 80].strip()!r}")
            position = part.end()
            if part["scope"] == "{":
                self.scopes.append({})
            elif part["scope"]:
                self.scopes.pop()
                if not self.scopes:
                    return
            elif part["label"]:
                self.parts.append(Label(part["label"]))
            elif part["statement"]:
                self._statement(part["statement"].strip())
            elif part["line"] != "0":
                self.source = f"{self.files.get(part['file'], '?')}:{part['line']}"
                if part["outer_file"]:
                    outer = self.files.get(part["outer_file"], "?")
                    self.source += f" in {outer}:{part['outer_line']}"

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, ptx_type, names = text.split(None, 2)
            for name in names.split(","):
                self._declare(name.strip(), ptx_type.lstrip("."))
        elif text.startswith((".shared", ".local", ".extern")):
            self.variables.append(text)
        elif text.startswith(".pragma"):
            pass  # "nounroll"
        else:
            self._instruction(text)

    def _declare(self, name: str, ptx_type: str) -> None:
        family = name.partition("<")[0]
        unique = family
        if len(self.scopes) > 1 and family == name:
            unique = f"{name}@{len(self.parts)}."
            self.scopes[-1][name] = unique
        self.types[unique] = ptx_type

    def _instruction(self, text: str) -> None:
        matched = _INSTRUCTION.match(text)
        if not matched or text.startswith("."):
            raise Unsupported(f"PTX {text!r}")
        negated, guard, opcode, rest = matched.groups()
        if any(self.scopes):
            guard, rest = guard and self._unique(guard), self._unique(rest)
        operands = [_operand(found[1]) for found in _OPERAND.finditer(rest)]
        self.parts.append(
            Statement(opcode, operands, guard or "", bool(negated), text, self.source)
        )

    def _unique(self, text: str) -> str:
        names = {name: unique for scope in self.scopes for name, unique in scope.items()}
        return re.sub(r"%?[A-Za-z_$][\w$]*", lambda found: names.get(found[0], found[0]), text)


class Module:
    """A module of PTX, whose kernels (`.entry`) are read when they are asked for."""

    def __init__(self, text: str):
        self._files = {number: path.rpartition("/")[2] for number, path in _FILE.findall(text)}
        self._text = _COMMENT.sub(" ", _FILE.sub("", text))
        self._entries = {entry[1]: entry for entry in _ENTRY.finditer(self._text)}
        first = re.search(r"\.(entry|func)\b", self._text)
        head = self._text[: first.start() if first else 0]
        self._shared = re.findall(r"^\s*([^;{}\n]*\.shared\s[^;{}]*);", head, re.M)
        self._variables = dict(_global_variables(head))

    @property
    def kernel_names(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        if name not in self._entries:
            raise Unsupported(f"the module has no kernel {name}")
        return _read_kernel(
            self._text, self._entries[name], self._files, self._shared, self._variables
        )


def _global_variables(head: str) -> Iterator[tuple[str, bytearray]]:
    """The variables in global and constant memory that a module declares, with their values."""
    for ptx_type, name, count, values in _GLOBAL.findall(head):
        size = num_bytes(ptx_type)
        memory = bytearray(size * int(count or 1))
        try:
            for i, value in enumerate(values.split(",") if values else []):
                memory[i * size : (i + 1) * size] = _bytes_of(value.strip(), size)
        except ValueError:
            continue  # an address: it cannot be told here, and who uses the variable will say so
        yield name, memory


def _bytes_of(literal: str, size: int) -> bytes:
    if literal[:2].lower() in ("0f", "0d"):  # the bits of a float
        return bytes.fromhex(literal[2:])[::-1]
    return (int(literal.rstrip("U"), 0) % (1 << 8 * size)).to_bytes(size, "little")


def _max_threads(directives: str) -> int:
    """What .maxntid or .reqntid, of __launch_bounds__, say of a kernel."""
    found = re.search(r"\.(?:maxntid|reqntid)\s+([\d\s,]+)", directives)
    return math.prod(int(n) for n in found[1].split(",")) if found else 1024


def _read_kernel(
    text: str,
    entry: re.Match,
    files: dict[str, str],
    module_variables: list[str],
    global_variables: dict[str, bytearray],
) -> Kernel:
    body = _Body(files)
    body.read(text, entry.end())
    params = Variables()
    for alignment, ptx_type, name, count in _PARAM.findall(entry[2] or ""):
        size = num_bytes(ptx_type)
        params.add(name, size * int(count or 1), int(alignment or size))
    used = {name for part in body.parts if isinstance(part, Statement) for name in part.registers()}
    spaces = {"shared": Variables(), "local": Variables()}
    dynamic, shared_bytes = [], 0
    for declaration in module_variables + body.variables:
        found = _VARIABLE.match(declaration.strip())
        if not found:
            raise Unsupported(f"PTX {declaration!r}")
        is_extern, space, alignment, ptx_type, name, is_array, count = found.groups()
        if declaration in module_variables and name not in used:
            continue
        size = num_bytes(ptx_type)
        if is_extern:
            dynamic.append((name, int(alignment or size)))
        else:
            size *= int(count) if is_array else 1
            spaces[space].add(name, size, int(alignment or size))
            if space == "shared":
                spaces["shared"].num_bytes += SHARED_GAP
                shared_bytes += size
    for name, alignment in dynamic:
        spaces["shared"].add(name, 0, alignment)
    return Kernel(
        name=entry[1],
        max_threads=_max_threads(entry[3]),
        params=params,
        shared=spaces["shared"],
        shared_bytes=shared_bytes,
        local=spaces["local"],
        variables={name: value for name, value in global_variables.items() if name in used},
        register_types=body.types,
        body=body.parts,
    )
