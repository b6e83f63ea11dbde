"""Load the compiled extension (csrc/), whose ops `native_ops.py` calls.

The library has no Python binding of its own: loading it registers `torch.ops.leangpt`. Its file name holds the torch
version it was built for (see setup.py); one built for another torch is never loaded, since its C++ ABI may differ.
"""

from pathlib import Path

import torch


def _load() -> str | None:
    """Load the extension; return None, or the reason why there is none."""
    folder = Path(__file__).parent
    library = folder / f"_C-torch{torch.__version__}.so"
    if library.exists():
        torch.ops.load_library(str(library))
        # the gradients came last
        if torch._C._dispatch_has_kernel_for_dispatch_key("leangpt::linear", "Autograd"):
            return None
        return "built from older sources: run `make build` or reinstall leangpt"
    others = [p.stem.removeprefix("_C-torch") for p in folder.glob("_C-torch*.so")]
    if others:
        return (
            f"built for torch {', '.join(others)}, but torch {torch.__version__} is running:"
            " run `make build` or reinstall leangpt"
        )
    return "not built: install a C++ compiler, then run `make build` or reinstall leangpt"


unavailable_reason = _load()
# the ops of ops.py that the loaded extension implements, and those of them with a native backward
OPS: frozenset[str] = frozenset()
DIFFERENTIABLE: frozenset[str] = frozenset()
if unavailable_reason is None:
    DIFFERENTIABLE |= {"add_layer_norm", "add_rms_norm", "attention", "embedding", "layer_norm"}
    DIFFERENTIABLE |= {"linear", "linear_cross_entropy", "mlp", "rms_norm", "rotary_qkv"}
    OPS = DIFFERENTIABLE | {"adamw_step", "grad_norm", "muon_step"}
