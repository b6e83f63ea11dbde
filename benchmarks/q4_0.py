"""The quality of llama.cpp's q4_0 beside that of int4, which has as many bits: `python benchmarks/q4_0.py --model M --data D`.

q4_0 has a float16 scale for 32 weights, as int4 has: the weight of largest magnitude over -8, and the nearest integers. Where the
package gguf is installed, each matrix is compared with what its quantizer gives. The rounded weights run as float32, so that this alone is measured.
"""

import copy
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from torch import Tensor

from leangpt.data.tokenizer import load_tokenizer
from leangpt.decoding.native_decoder import pack_model
from leangpt.evaluate import compare, read_text
from leangpt.pretrained import load_model, resolve_model


def q4_0(weight: Tensor) -> Tensor:
    """Rounded to q4_0 and back; rows must be of a multiple of 32 weights."""
    x = weight.unflatten(-1, (-1, 32))
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    q = (x * inverse + 8.5).trunc().clamp(0, 15)
    rounded = (scale.half().float() * (q - 8)).flatten(-2)
    if find_spec("gguf"):
        from gguf import GGMLQuantizationType, quants

        blocks = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
        expected = quants.dequantize(blocks, GGMLQuantizationType.Q4_0)
        assert torch.equal(rounded, torch.from_numpy(expected))
    return rounded


def main(model: str = "runs/demo", data: Path = Path("data/stdlib"), batches: int = 16) -> None:
    path = resolve_model(model)
    original = load_model(path)
    tokenizer = load_tokenizer(path)
    seq_len = min(original.config.max_seq_len, 1024)
    text = read_text(data, tokenizer, seq_len, batches)
    rounded = copy.deepcopy(original)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and name != "wpe.weight":
                parameter.copy_(q4_0(parameter))
    models = {
        "fp32": pack_model(original, "fp32"),
        "q4_0": pack_model(rounded, "fp32"),
        "int4": pack_model(original, "int4"),
    }
    rows = compare(models, text)
    for row in rows:
        change = row.perplexity / rows[0].perplexity - 1
        print(
            f"{row.format}: perplexity {row.perplexity:.4f} ({change:+.3%}), KL {row.kl:.6f} nats, "
            f"same top-1 {row.top_1_agreement:.2%}"
        )
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    tyro.cli(main)
