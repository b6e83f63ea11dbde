"""Figures of GPUs from their makers' documents, none of them measured, and what fits on their multiprocessors."""

from dataclasses import dataclass

_REGISTERS = 65536  # of an SM, handed out to warps in units of 256
_TENSOR_MEMORY_COLUMNS = 512  # of an SM from sm_100 on
RESERVED_SHARED_BYTES = 1024  # of each block, for the system


@dataclass(frozen=True)
class Chip:
    """One GPU of an architecture; its SMs are those of all GPUs of that architecture."""

    name: str
    num_sms: int
    memory_bytes_per_s: float
    bf16_flops_per_s: float  # of tensor cores, dense, fp32 sums
    max_warps: int  # of an SM
    max_blocks: int  # of an SM
    shared_bytes: int  # of an SM
    max_block_shared_bytes: int  # of one block

    def blocks_per_sm(
        self, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0
    ) -> int:
        """How many blocks of a kernel an SM holds at once; 0: it cannot be launched."""
        if shared_bytes > self.max_block_shared_bytes:
            return 0
        registers_of_block = -(-registers * 32 // 256) * 256 * num_warps
        limits = [
            self.max_blocks,
            self.max_warps // num_warps,
            _REGISTERS // registers_of_block,
            self.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
        ]
        if tensor_memory_columns:
            limits.append(_TENSOR_MEMORY_COLUMNS // tensor_memory_columns)
        return min(limits)


KB = 1024
CHIPS = {
    "sm_80": Chip("A100", 108, 2039e9, 312e12, 64, 32, 164 * KB, 163 * KB),
    "sm_90": Chip("H100", 132, 3350e9, 989e12, 64, 32, 228 * KB, 227 * KB),
    "sm_100": Chip("B200", 148, 8000e9, 2250e12, 64, 32, 228 * KB, 227 * KB),
    "sm_120": Chip("RTX 5090", 170, 1792e9, 209.5e12, 48, 24, 100 * KB, 99 * KB),
}


def predicted_bound(flops: float, num_bytes: float, chip: Chip) -> str:
    """What takes the most time at the chip's figures, and the share of that time which the other takes: no speed."""
    memory = num_bytes / chip.memory_bytes_per_s
    products = flops / chip.bf16_flops_per_s
    if products > memory:
        return f"tensor cores (memory {memory / products:.0%})"
    return f"memory (tensor cores {products / memory:.0%})" if products else "memory"
