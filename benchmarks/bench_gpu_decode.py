"""Decoding on a GPU: the CUDA engine against PyTorch, and against what the memory can deliver.

A step draws the most probable next token of each of a batch of sequences that hold as many tokens as `--context` says, and brings
it to the host. PyTorch's own: the model in bfloat16 with a key/value cache of fixed size and scaled_dot_product_attention, called
as it is, and compiled whole into CUDA graphs (torch.compile, mode "reduce-overhead"). Before anything is timed, every contender's
logits must be within twice the error of PyTorch's bfloat16 ones from those of float32 (integer formats: of their own weights).

Bytes of a step are its weights and the keys and values that it reads, once; the share is that of the memory's measured speed.
`--page FOLDER` writes what was measured there, as JSON and as Markdown. `make gpu-check` does it, after the tests.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import environment, print_json, print_table, time_interleaved
from torch import Tensor

from leangpt import GPT, GPTConfig
from leangpt.decoding.cuda_decoder import CudaDecoder
from leangpt.decoding.decoder import prefill
from leangpt.decoding.native_decoder import pack_model
from leangpt.decoding.sampling import RowSampling
from leangpt.kernels import decode, use_backend

FORMATS = ("bf16", "int8", "int4")


class StaticStep:
    """A model with a cache of fixed size, all of whose sequences have the same length: what compiles into one graph."""

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        config = model.config
        self.model = model
        shape = (batch, config.kv_heads, capacity, config.head_size)
        weight = model.wte.weight
        self.keys, self.values = (
            [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in model.blocks]
            for _ in range(2)
        )
        self.places = torch.arange(capacity, device=weight.device)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Append tokens (B, T) at positions (T,); the logits behind the last, (B, V)."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer].index_copy_(2, positions, k.transpose(1, 2))
            self.values[layer].index_copy_(2, positions, v.transpose(1, 2))
            mask = self.places <= positions[:, None]
            return F.scaled_dot_product_attention(
                q.transpose(1, 2),
                self.keys[layer],
                self.values[layer],
                attn_mask=mask,
                enable_gqa=True,
            ).transpose(1, 2)

        hidden = self.model.hidden(tokens, positions[None], attend)
        return self.model.logits(hidden[:, -1])


def random_model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(config).requires_grad_(False).eval()


class Bench:
    """One model, its contenders, and a batch of prompts."""

    def __init__(self, model: GPT, device: str, formats: Sequence[str]) -> None:
        self.model, self.device = model, device
        self.exact = model.float().to(device)
        self.bf16 = GPT(model.config).requires_grad_(False).eval().bfloat16().to(device)
        self.bf16.load_state_dict(self.exact.state_dict())
        self.packed = {format: pack_model(self.bf16, format) for format in formats}

    def errors(self, length: int = 32) -> dict[str, float]:
        """Of each contender's logits, over the error that is allowed."""
        text = self._prompts(1, length)[0]
        with torch.inference_mode(), use_backend("reference"):
            tokens = torch.tensor([text], device=self.device)
            exact = self.exact(tokens)[0].double().cpu()
            baseline = self.bf16(tokens)[0].double().cpu()
        allowed = 2 * (baseline - exact).abs().max().item()
        found = {}
        for format, packed in self.packed.items():
            decoder = CudaDecoder(packed, 4 + length // 16)
            sequence = decoder.add_sequence()
            logits = decoder.forward(text, [sequence] * length, range(length), range(length))
            truth = exact if format == "bf16" else self._of_own_weights(format, text)
            found[format] = (torch.from_numpy(logits) - truth).abs().max().item() / allowed
        return found

    def _of_own_weights(self, format: str, text: list[int]) -> Tensor:
        """Logits of the CPU engine, which multiplies the same weights with activations like float32."""
        from leangpt.decoding.native_decoder import NativeDecoder

        decoder = NativeDecoder(self.packed[format], 4 + len(text) // 16)
        sequence = decoder.add_sequence()
        rows = range(len(text))
        logits = decoder.forward(text, [sequence] * len(text), rows, rows)
        return torch.from_numpy(logits).double()

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return rng.integers(self.model.config.vocab_size, size=(batch, length)).tolist()

    def steps(self, batch: int, context: int, compiles: bool) -> dict[str, Callable[[], Any]]:
        """A step of each contender, which leaves everything as it was."""
        prompts = self._prompts(batch, context)
        calls = {"torch eager": self._torch_step(prompts, is_compiled=False)}
        if compiles:
            calls["torch compiled, CUDA graphs"] = self._torch_step(prompts, is_compiled=True)
        for format in self.packed:
            calls[f"leangpt {format}"] = self._own_step(format, prompts)
        return calls

    def _torch_step(self, prompts: list[list[int]], is_compiled: bool) -> Callable[[], list[int]]:
        context = len(prompts[0])
        step = StaticStep(self.bf16, len(prompts), context + 1)
        tokens = torch.tensor(prompts, device=self.device)
        with torch.inference_mode(), use_backend("reference"):
            step(tokens, torch.arange(context, device=self.device))
        run = torch.compile(step, mode="reduce-overhead", fullgraph=True) if is_compiled else step
        last, place = tokens[:, :1].clone(), torch.tensor([context], device=self.device)

        def call() -> list[int]:
            with torch.inference_mode(), use_backend("reference"):
                return run(last, place).argmax(-1).tolist()

        return call

    def _own_step(self, format: str, prompts: list[list[int]]) -> Callable[[], list[int]]:
        context, batch = len(prompts[0]), len(prompts)
        decoder = CudaDecoder(self.packed[format], batch * (context // 16 + 1))
        sequences = [decoder.add_sequence() for _ in prompts]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            prefill(decoder, sequence, prompt, 512)
        vocab_size = self.model.config.vocab_size
        greedy = RowSampling(0.0, 0, 1.0, 0.0, 0, 0, 0, 1.0, 0.0, (), (), vocab_size, None)
        last = [prompt[0] for prompt in prompts]
        rows = range(batch)

        def call() -> list[int]:
            draws = decoder.sample(last, sequences, [context] * batch, rows, [greedy] * batch)
            for sequence in sequences:
                decoder.truncate(sequence, context)
            return [draw.token for draw in draws]

        return call

    def step_bytes(self, name: str, batch: int, context: int) -> int:
        """Weights but for rows of the embedding that are not looked up, and keys and values."""
        config = self.model.config
        kv_values = 2 * config.n_layer * config.kv_heads * config.head_size * batch * context
        format = name.removeprefix("leangpt ")
        if format not in self.packed:
            weights = sum(p.nbytes for p in self.bf16.parameters())
            return weights + 2 * kv_values
        return self.packed[format].num_bytes + kv_values * (2 if format == "bf16" else 1)


def read_speed(device: str) -> float:
    """Bytes a second that a sum over half a gigabyte reads."""
    memory = torch.ones(2**27 if device == "cuda" else 2**20, device=device)
    timing = time_interleaved({"read": memory.sum}, device, rounds=9)["read"]
    return memory.nbytes / timing.p20


def measure(
    bench: Bench, batches: Sequence[int], context: int, rounds: int, compiles: bool
) -> list[dict[str, Any]]:
    ceiling = read_speed(bench.device)
    rows = []
    for batch in batches:
        calls = bench.steps(batch, context, compiles)
        # by the clock: a call ends with its tokens on the host
        timings = time_interleaved(calls, "cpu", rounds=rounds, warm_up=5)
        best = min(t.p50 for name, t in timings.items() if name.startswith("torch"))
        for name, timing in timings.items():
            bytes_per_s = bench.step_bytes(name, batch, context) / timing.p50
            rows.append(
                {
                    "batch": batch,
                    "contender": name,
                    "p20 ms": 1e3 * timing.p20,
                    "p50 ms": 1e3 * timing.p50,
                    "p80 ms": 1e3 * timing.p80,
                    "tokens/s": batch / timing.p50,
                    "GB/s": bytes_per_s / 1e9,
                    "% of read": 100 * bytes_per_s / ceiling,
                    "vs torch": best / timing.p50,
                }
            )
    return rows


def write_page(document: dict[str, Any], command: str, folder: Path) -> Path:
    """Files named after the date and the GPU."""
    where = document["environment"]
    name = f"{where['date'][:10]}-{where['device']}".lower().replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    rows = document["rows"]
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    facts = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = [
        f"# Decoding on {where['device']}, {where['date'][:10]}",
        "",
        f"`{command}`: {facts}. Logit errors over what is allowed: {document['errors']}.",
        "",
        *(f"| {' | '.join(line)} |" for line in cells),
    ]
    page = folder / f"{name}.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def run(
    config: GPTConfig, options: argparse.Namespace, device: str, where: dict[str, Any]
) -> dict[str, Any]:
    bench = Bench(random_model(config), device, options.formats)
    errors = {name: round(error, 3) for name, error in bench.errors().items()}
    wrong = [name for name, error in errors.items() if error > 1]
    if wrong:
        raise ValueError(f"not timed: the logits of {', '.join(wrong)} are wrong ({errors})")
    rows = measure(bench, options.batches, options.context, options.rounds, options.compiles)
    return {"benchmark": "gpu decode", "environment": where, "errors": errors, "rows": rows}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="preset, with random weights (gpt2)")
    parser.add_argument("--formats", nargs="*", default=[*FORMATS], help="of the CUDA engine")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence (512)")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--no-compile", dest="compiles", action="store_false")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write a JSON and a page there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    obstacle = decode.cuda_obstacle()
    if obstacle or not torch.cuda.is_available():
        print(f"nothing was measured: {obstacle or 'this torch has no CUDA'}")
        return 0
    config = GPTConfig.preset(options.model)
    document = run(config, options, "cuda", environment("cuda") | {"model": options.model})
    print_table(document["rows"])
    if options.page:
        command = " ".join(["python benchmarks/bench_gpu_decode.py", *arguments])
        print(f"wrote {write_page(document, command, options.page)}")
    print_json(document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
