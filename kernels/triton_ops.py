"""The Triton backend: the ops of ops.py that have Triton kernels, one file an op or family, each with its gradients.

Every op is a `torch.library.custom_op` with a fake implementation and autograd, so that torch.compile, export and
FakeTensor see one node; what it computes is written in ops.py.
"""

import os

# Triton 3.10 changes the default: products and sums contract to one rounding, as elsewhere on GPUs
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from .triton_adamw import adamw_step
from .triton_attention import attention, attention_varlen
from .triton_embedding import embedding
from .triton_layer_norm import add_layer_norm, layer_norm
from .triton_linear import linear
from .triton_linear_cross_entropy import linear_cross_entropy
from .triton_mlp import mlp
from .triton_rms_norm import add_rms_norm, rms_norm
from .triton_rotary import rotary, rotary_qkv
from .triton_sampling import sample

__all__: list[str] = [
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "sample",
]
