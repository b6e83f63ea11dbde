# pyright: reportArgumentType=false
"""Note what ops launch on a GPU that is not there, without running anything.

Within `Recorder.recording()`, an op called with CPU tensors runs its Python code and nothing else: torch's own ops give
tensors that nobody has written, and a launch is noted down where Triton would compile its kernel. So each kernel is
specialized as it would be on the GPU, for the alignment of pointers and the divisibility of sizes, and no list repeats
the signatures that the launching code has.

An autotuned kernel is noted with all the configurations that it would try, in its order.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from .chips import CHIPS

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class AbsentGPU:
    """Triton's driver for a GPU that is not there: its kernels are compiled and never launched."""

    def __init__(self, arch: str) -> None:
        self.arch = int(arch.removeprefix("sm_"))
        self.chip = CHIPS[arch]
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton asks for the target once a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "multiprocessor_count": self.chip.num_sms,
            "max_shared_mem": self.chip.max_block_shared_bytes,
        }


@dataclass(frozen=True)
class Launch:
    """A kernel as an op would have launched it."""

    kernel: str
    source: ASTSource
    options: dict[str, Any]
    constants: dict[str, Any]  # compile-time arguments
    configuration: int  # of an autotuned kernel, from 1 on

    def key(self) -> str:
        """What is compiled: equal for launches that need the same code, in every checkout."""
        options = self.options | {"extern_libs": None}  # paths, of what comes with Triton
        return f"{self.source.hash()} {options}"


class Recorder(TorchDispatchMode):
    """Notes the launches on a GPU of one architecture, and the bytes that launches and torch's ops read and write."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.driver = AbsentGPU(arch)
        self.configuration = 0
        self.clear()

    def clear(self) -> None:
        self.launches: dict[tuple[str, int], Launch] = {}
        self.num_bytes = 0
        self.library_products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "leangpt_triton":
            with self:  # straight to its Python code, past this function
                return func.redispatch(_CPU, *args, **kwargs)
        aliases = [result.alias_info for result in func._schema.returns]
        if any(alias and not alias.is_write for alias in aliases):
            return func(*args, **kwargs)  # a view
        if any(aliases):  # in place, or into `out`
            self.num_bytes += num_bytes((args, kwargs))
            return kwargs.get("out", args[0])
        results = _unwritten_results(func, args, kwargs)
        name = func._schema.name
        self.library_products += name in ("aten::mm", "aten::addmm", "aten::bmm")
        if "empty" not in name:
            self.num_bytes += num_bytes((args, kwargs, results))
        return results

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Be Triton's driver, and stand in front of its compiler and its autotuner."""
        active, hook = triton.runtime.driver._active, knobs.runtime.jit_cache_hook
        run, tune = JITFunction.run, Autotuner.run

        def run_and_count(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
            self.num_bytes += num_bytes((args, kwargs))
            return run(kernel, *args, **kwargs)

        def run_all(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            configs = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
            before = self.num_bytes
            for i, config in enumerate(configs):
                self.configuration, self.num_bytes = i + 1, before  # only one of them will run
                tuner.fn.run(*args, **kwargs, **config.all_kwargs())
            self.configuration = 0

        triton.runtime.driver.set_active(self.driver)
        knobs.runtime.jit_cache_hook = self._note
        JITFunction.run, Autotuner.run = run_and_count, run_all
        try:
            with self:
                yield
        finally:
            triton.runtime.driver._active, knobs.runtime.jit_cache_hook = active, hook
            JITFunction.run, Autotuner.run = run, tune

    def _note(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook in front of a compilation; true stops the launch there."""
        kernel = fn.jit_function
        options = json.loads(compile["specialization_data"])["options"]
        source = ASTSource(
            kernel, compile["signature"], compile["constants"], compile["configs"][0]
        )
        constants = {
            kernel.params[path[0]].name: value for path, value in compile["constants"].items()
        }
        launch = Launch(
            kernel=kernel.__name__,
            source=source,
            options={k: tuple(v) if isinstance(v, list) else v for k, v in options.items()},
            constants={name: value for name, value in constants.items() if name.isupper()},
            configuration=self.configuration,
        )
        self.launches.setdefault((launch.key(), self.configuration), launch)
        return True


def num_bytes(arguments: Any) -> int:
    """Memory that the tensors among some arguments cover; of broadcast dimensions one element."""
    total = 0

    def add(tensor: Tensor) -> None:
        nonlocal total
        sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += math.prod(sizes) * tensor.element_size()

    tree_map_only(Tensor, add, arguments)
    return total


def _unwritten_results(func: Any, args: tuple, kwargs: dict) -> Any:
    """Tensors of the shapes that one of torch's ops returns."""

    def like(tensor: Tensor, device: str) -> Tensor:
        strides = tensor.stride()
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device)

    args, kwargs = tree_map_only(Tensor, lambda t: like(t, "meta"), (args, kwargs))
    if "device" in kwargs:
        kwargs = kwargs | {"device": "meta"}
    return tree_map_only(Tensor, lambda t: like(t, "cpu"), func(*args, **kwargs))
