"""The Triton backend: the ops of ops.py that have Triton kernels, one file an op or family, each with its gradients.

Every op is a `torch.library.custom_op` with a fake implementation and autograd, so that torch.compile, export and
FakeTensor see one node; what it computes is written in ops.py.
"""

import os

# Triton 3.10 changes the default: products and sums contract to one rounding, as elsewhere on GPUs
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

__all__: list[str] = []
