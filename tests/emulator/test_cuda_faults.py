"""Bugs planted in CUDA code stay caught, whatever the order of threads; the same code without the bug is never reported."""

import re
from pathlib import Path

import pytest
import torch
from emulator import cuda

pytestmark = pytest.mark.skipif(
    cuda.unavailable_reason is not None, reason=str(cuda.unavailable_reason)
)
SOURCE = Path(__file__).with_name("planted_bugs.cu")
SEEDS = range(5)
SETTINGS = [
    {},
    {"preempt": 3, "resident": 4},
    {"order": "forward", "preempt": 0, "resident": 1},
    {"order": "reverse", "preempt": 20},
    {"early_async": True, "is_deferred": True},
]
UNORDERED = "(data race on shared memory|uninitialised shared)"
FAULTS = {
    "missing_syncthreads": UNORDERED,
    "missing_syncthreads_before_reuse": "data race on shared memory",
    "missing_syncwarp": UNORDERED,
    "missing_fence": "data race on 'out'",
    "wrong_shuffle_mask": "calling lane is not in its own mask",
    "shuffle_in_a_branch": "warp operation: it waits for .* which has exited|warp divergence",
    "barrier_in_a_divergent_branch": "barrier divergence|data race on shared memory",
    "return_before_a_barrier": "barrier divergence",
    "warps_at_different_barriers": "barrier divergence.*another barrier",
    "named_barriers": UNORDERED,
    "page_index_off_by_one": "out of bounds",
    "async_copy_read_too_early": "destination of a cp.async before its wait_group",
    "async_copy_without_barrier": f"{UNORDERED}|destination of a cp.async before its wait_group",
    "missing_syncwarp_before_ldmatrix": UNORDERED,
    "tensor_core_in_a_branch": "warp operation: it waits for .* which has exited|warp divergence",
    "uninitialised_shared_memory": "read of uninitialised shared memory at byte 124|atomic",
    "misaligned_load": "misaligned global read of 16 bytes in 'x'",
    "misaligned_shared_store": "misaligned shared write of 8 bytes",
    "shared_index_out_of_bounds": "shared write out of bounds: byte 256 of 256",
    "shared_index_into_another_array": "shared write out of bounds: between two variables, byte ",
    "local_index_out_of_bounds": "local read out of bounds",
    "global_index_out_of_bounds": "global read out of bounds: 0 bytes behind the end of 'x'",
    "blocks_write_one_place": "data race on 'out'.*write after a write",
    "read_what_another_block_wrote": "data race on 'out'",
    "use_after_free": "use after free: global read of 4 bytes in 'allocation",
    "read_of_fresh_memory": "global memory that nobody wrote: read of 4 bytes in 'allocation .* at byte 1020",
    "too_many_threads": "blocks of .1025,1,1. threads",
    "more_threads_than_bounds": "blocks of 160 threads, its __launch_bounds__ allow 128",
    "more_shared_memory_than_allowed": "102400 bytes of shared memory, allowed are 49152",
    "more_shared_memory_than_there_is": "167936 bytes of shared memory, allowed are",
    "empty_grid": "a grid of .0,1,1.",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_device():
    cuda.reset()
    yield
    cuda.reset()


def run(name, is_planted):
    cuda.reset()
    library = cuda.library("planted_bugs", [SOURCE])
    x = cuda.to_device(torch.arange(256, dtype=torch.int32), "x")
    out = cuda.empty(256, torch.int32, "out")
    counter = cuda.to_device(torch.zeros(1, dtype=torch.int32), "counter")
    library[f"{name}_"](is_planted, x, out, counter)
    cuda.synchronize()
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_bug_is_caught(name):
    for seed in SEEDS:
        with (
            cuda.settings(seed=seed),
            pytest.raises(cuda.Fault, match=re.compile(FAULTS[name], re.S)),
        ):
            run(name, is_planted=True)


@pytest.mark.parametrize("name", FAULTS)
def test_right_code_is_not_reported(name):
    for settings in SETTINGS:
        for seed in SEEDS:
            with cuda.settings(seed=seed, **settings):
                run(name, is_planted=False)
                assert cuda.leaks() == []
