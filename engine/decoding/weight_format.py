"""How weights are stored for decoding, and what activations they are multiplied with on a CPU; on a GPU, with bfloat16 ones."""

import re
from dataclasses import dataclass
from typing import Literal, Self, cast

Kind = Literal["fp32", "bf16", "int8", "int4"]

_PATTERN = re.compile(r"(fp32|bf16|int8|int4)(_screen)?(_asym)?(?:_g(32|64|128))?(_dynamic)?")


@dataclass(frozen=True)
class WeightFormat:
    """A format, written `fp32[_screen]`, `bf16[_screen]`, `int8[_gN][_dynamic]` or `int4[_asym][_gN][_dynamic]`, N one of 32, 64, 128.

    An integer q stands for `scale * q`, asymmetric for `scale * q + minimum`; int8 has a scale for each output or, with
    `_gN`, for each N inputs of it, int4 always the latter (32 unless given). Integers are multiplied with activations of 24
    bits, as exact as float32, or with `_dynamic` of 8 bits, both with a scale for each token (each N inputs of a token).

    With `_screen` there is an int8 copy of the head too. Greedy, top-k and min-p draws of few sequences read it to find the
    tokens that can still win, and of the head itself only their rows; what is drawn stays the same.
    """

    kind: Kind
    group: int = 0  # inputs that share a scale; 0: all of an output
    is_asymmetric: bool = False
    is_dynamic: bool = False
    has_screen: bool = False

    @classmethod
    def parse(cls, name: str) -> Self:
        match = _PATTERN.fullmatch(name)
        kind, screen, asymmetric, group, dynamic = match.groups() if match else 5 * ("",)
        is_integer = kind in ("int8", "int4")
        if (
            not match
            or (asymmetric and kind != "int4")
            or ((group or dynamic) and not is_integer)
            or (screen and is_integer)
        ):
            raise ValueError(
                "format must be fp32[_screen], bf16[_screen], int8[_gN][_dynamic] or int4[_asym][_gN][_dynamic] with N 32, 64 or 128, "
                f"got {name!r}"
            )
        default_group = 32 if kind == "int4" else 0
        return cls(
            cast(Kind, kind),
            int(group) if group else default_group,
            bool(asymmetric),
            bool(dynamic),
            bool(screen),
        )

    def __str__(self) -> str:
        group = f"_g{self.group}" if self.group and (self.kind, self.group) != ("int4", 32) else ""
        asymmetric = "_asym" if self.is_asymmetric else ""
        screen = "_screen" if self.has_screen else ""
        return f"{self.kind}{screen}{asymmetric}{group}{'_dynamic' if self.is_dynamic else ''}"

    @property
    def digits(self) -> int:
        """Bytes of an integer activation."""
        return 1 if self.is_dynamic else 3
