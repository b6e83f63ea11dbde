"""Decoding on the CPU by this engine and, with --peers, by others: checked first, then timed in turn.

    python benchmarks/bench_decode.py                              this engine, all cases, in under three minutes
    python benchmarks/bench_decode.py --peers                      and the peers that this Python has
    python benchmarks/bench_decode.py --peers A/bin/python B/bin/python      and the peers that these have
    python benchmarks/bench_decode.py --cases decode-32 --formats int8,int4 --model small --plot decode.png

Every engine lives in a process of its own (see peers.py), has the same random weights and the same prompts, and waits while
another is timed: A B C A B C …, so that a change of the machine's speed meets all. An engine that is wrong is not timed:
greedy tokens must be those of the reference model, in a format of this project those of the model with its dequantised
weights. Peers: llama.cpp (llama-cpp-python and gguf), OpenVINO (openvino-genai, optimum-intel and torch), CTranslate2 (with
transformers and torch), PyTorch (with safetensors).
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH is set

from harness import ROOT, environment, print_json, print_table
from peers import ENGINES, matrix_bytes

from leangpt import GPT, GPTConfig
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.decoding.packed import PackedModel
from leangpt.kernels import decode
from leangpt.pretrained import save_pretrained

SEED = 42
# "_screen": greedy draws read an int8 copy of the head first, and of the head only what can still win
FORMATS = ("fp32", "fp32_screen", "bf16", "int8", "int8_dynamic", "int4", "int4_dynamic")
MAX_CHECKED = 8  # prompts in the round that is not timed
WORKER = Path(__file__).with_name("peers.py")

# the precision of a variant's weights: engines are compared with those of the same
PRECISIONS = {
    "fp32": ("fp32", "f32", "float32"),
    "bf16": ("bf16", "fp32-bf16"),
    "int8": ("int8", "int8-bf16", "q8_0", "int8_float32", "dynamic_int8"),
    "int4": ("int4", "q4_0"),
}
# how far a greedy token's logit may be below the largest of the reference, in standard deviations of the logits: for peers
# the reference has the original weights, which theirs only resemble; a token drawn at random is 4 below
PEER_GAPS = {"fp32": 1e-3, "bf16": 0.3, "int8": 0.5, "int4": 2.5}
# the same for this engine, whose reference has the weights that the format stands for; root mean square error of its logits
OWN_LIMITS = {"fp32": 1e-4, "bf16": 0.03, "weights": 0.02, "dynamic": 0.15}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    prompt: int
    new: int
    rounds: int
    is_ragged: bool = False
    is_busy: bool = False

    def prompt_length(self, config: GPTConfig) -> int:
        return min(self.prompt, config.max_seq_len - self.new)

    def prompts(self, config: GPTConfig) -> list[list[int]]:
        draw = random.Random(self.name)
        most = self.prompt_length(config)
        lengths = [
            draw.randrange(most // 8, most + 1) if self.is_ragged else most
            for _ in range(self.batch)
        ]
        tokens = min(50000, config.vocab_size)
        return [[draw.randrange(tokens) for _ in range(length)] for length in lengths]

    def lengths(self) -> list[int]:
        """New tokens of each prompt."""
        draw = random.Random(self.name)
        if not self.is_ragged:
            return [self.new] * self.batch
        return [draw.randrange(self.new // 4, self.new + 1) for _ in range(self.batch)]


CASES = (
    Case("start", 1, 32, 16, rounds=2),  # a fresh process each time: load, first token, memory
    Case("decode-32", 1, 32, 48, rounds=5),
    Case("decode-512", 1, 512, 32, rounds=3),  # its time to the first token is the case prefill-512
    Case("batch-8", 8, 32, 32, rounds=3),
    Case("ragged", 64, 128, 48, rounds=2, is_ragged=True),
    Case("busy", 1, 32, 32, rounds=3, is_busy=True),
)


def precision_of(variant: str) -> str:
    own = variant.partition("_")[0]
    return next((p for p, names in PRECISIONS.items() if variant in names), own)


@dataclass
class Contender:
    """An engine with weights of one variant, and the Python that it runs in."""

    engine: str
    variant: str
    python: str
    folder: Path
    weight_bytes: int = 0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine} {self.variant}"

    @property
    def is_own(self) -> bool:
        return self.engine == "leangpt"

    @property
    def precision(self) -> str:
        return precision_of(self.variant)

    @property
    def kv_element_bytes(self) -> int:
        """As the engines have it by default (OpenVINO's is taken to be 16 bits)."""
        if self.is_own or self.engine == "torch":
            return 4 if self.precision == "fp32" or self.variant == "dynamic_int8" else 2
        return 4 if self.engine == "ctranslate2" else 2


class Worker:
    """The process of a contender."""

    def __init__(self, contender: Contender, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LEANGPT_THREADS")
        env = os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1"}
        self.started = time.perf_counter()
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [contender.python, str(WORKER), "serve", contender.engine, contender.variant]
        self.process = subprocess.Popen(
            [*command, str(contender.folder)],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        self.hello = self._read(120)

    def ask(self, prompts: list[list[int]], new: list[int], is_ragged: bool) -> dict[str, Any]:
        assert self.process.stdin is not None
        request = {"prompts": prompts, "new": new, "ragged": is_ragged}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read(240)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(timeout_s) else ""
        if line:
            return json.loads(line)
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["no answer"]
        self.close()
        raise RuntimeError(lines[-1][-300:])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        user, system = fields.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a request that it never read
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Samples:
    """What the rounds of a contender in a case gave."""

    ttft_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    extra: dict[str, list[float]] = field(default_factory=dict)
    other_cores: list[float] = field(default_factory=list)  # what other programs used meanwhile

    def median(self, name: str) -> float:
        values = self.extra.get(name) or getattr(self, name, [])
        return statistics.median(values) if values else float("nan")


def busy_seconds() -> float:
    """Processor time that anybody used since the machine started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@contextmanager
def one_core_busy() -> Iterator[None]:
    """A program that computes and never waits, on whatever processor the system gives it."""
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        burner.kill()
        burner.wait()


class Ceilings:
    """The limits of the machine for the engine's threads, sampled throughout the run."""

    def __init__(self) -> None:
        self.reads: list[float] = []
        self.products: dict[str, list[float]] = {"fp32": [], "bf16": [], "int8": []}

    def sample(self) -> None:
        self.reads.append(decode.read_bandwidth(512, seconds=0.1))
        for kind, name in ((decode.FP32, "fp32"), (decode.BF16, "bf16"), (decode.INT8, "int8")):
            self.products[name].append(decode.multiply_rate(kind, seconds=0.03))

    @property
    def flops(self) -> dict[str, float]:
        """Operations per second on registers; int4 is multiplied as int8."""
        peaks = {name: max(rates) for name, rates in self.products.items()}
        return peaks | {"int4": peaks["int8"]}

    @property
    def read(self) -> float:
        """Bytes per second, of the better samples: a slow one tells of the neighbours, not of the machine."""
        return float(np.quantile(self.reads, 0.8))

    def document(self) -> dict[str, float]:
        limits = {"memory_read_gb_per_s": self.read, "best_read_gb_per_s": max(self.reads)}
        limits |= {f"{name}_gflops": value for name, value in self.flops.items()}
        return {name: round(value / 1e9, 1) for name, value in limits.items()}


def make_model(preset: str) -> GPT:
    torch.manual_seed(SEED)
    return GPT(GPTConfig.preset(preset)).eval()


def folder_of(model: GPT, preset: str) -> Path:
    """Where files of these very weights are: what a peer has converted once must not stand for others."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().data)
    return ROOT / "build" / "bench_decode" / f"{preset}-{digest.hexdigest()[:8]}"


def export_model(model: GPT, folder: Path) -> None:
    """The model for the peers' converters, with a made-up tokenizer: they want one, and nobody uses it."""
    target = folder / "hf"
    if (target / "tokenizer_config.json").exists():
        return
    save_pretrained(model, target, format="hf")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(rest)}
    letters = [symbols[byte] for byte in range(256)]
    pairs = [(a, b) for a in letters for b in letters][: model.config.vocab_size - 257]
    names = [*letters, *(a + b for a, b in pairs), "<|endoftext|>"]
    (target / "vocab.json").write_text(
        json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8"
    )
    merges = "".join(f"{a} {b}\n" for a, b in pairs)
    (target / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    options = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.max_seq_len}
    (target / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")


def dequantised(packed: PackedModel, model: GPT) -> GPT:
    """The model with the weights that a packed one stands for."""
    result = copy.deepcopy(model)
    parameters = dict(result.named_parameters())
    lanes = decode.LANES
    for name in packed.tensors:
        owner, _, part = name.rpartition(".")
        if part != "data" or owner == "screen":
            continue
        weight = torch.from_numpy(decode.unpack(packed.matrix(owner)).copy())
        if owner.endswith("mlp_in") and model.config.is_gated:  # panels of gate and up in turn
            halves = weight.view(-1, 2, lanes, weight.shape[1]).transpose(0, 1)
            weight = halves.reshape(2, -1, weight.shape[1])[:, : model.config.inner_size].flatten(
                0, 1
            )
        target = parameters["wte.weight" if owner == "embedding" else f"{owner}.weight"]
        with torch.no_grad():
            target.copy_(weight)
    return result


@torch.inference_mode()
def reference_logits(model: GPT, tokens: Sequence[int], first: int) -> np.ndarray:
    """Logits after each token from number `first` on."""
    batch = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    return model.logits(model.hidden(batch, positions)[0, first:]).float().numpy()


def logit_error(decoder: NativeDecoder, model: GPT, prompt: list[int]) -> float:
    """Root mean square error over a prompt read in two steps and some tokens one by one, in standard deviations."""
    half, single = len(prompt) // 2, len(prompt) - 8
    sequence = decoder.add_sequence()
    results = []
    cuts = [0, half, *range(single, len(prompt) + 1)]
    for start, end in pairwise(cuts):
        positions = np.arange(start, end)
        tokens = np.asarray(prompt[start:end])
        owners = np.full(end - start, sequence)
        results.append(decoder.forward(tokens, owners, positions, positions - start))
    decoder.drop(sequence)
    expected = reference_logits(model, prompt, 0)
    error = np.concatenate(results) - expected
    return float(np.sqrt(np.square(error).mean()) / expected.std())


def own_limit(variant: str) -> float:
    if variant.endswith("_dynamic"):
        return OWN_LIMITS["dynamic"]
    return OWN_LIMITS.get(variant.removesuffix("_screen"), OWN_LIMITS["weights"])


def greedy_gap(model: GPT, prompt: list[int], text: Sequence[int]) -> float:
    """How far the logits of a text's tokens are below the largest, at most, in standard deviations."""
    logits = reference_logits(model, [*prompt, *text[:-1]], len(prompt) - 1)
    chosen = logits[np.arange(len(text)), list(text)]
    return float((logits.max(1) - chosen).max() / logits.std())


class Bench:
    def __init__(self, model: GPT, contenders: list[Contender], threads: int) -> None:
        self.model = model
        self.contenders = contenders
        self.threads = threads
        self.references: dict[str, GPT] = {}  # by name of the contender, where not the model
        self.checks: dict[str, dict[str, float]] = {c.name: {} for c in contenders}
        self.samples: dict[str, dict[str, Samples]] = {}
        self.ceilings = Ceilings()

    def prepare_own(self, contender: Contender) -> None:
        """Pack the model, and compare logits with those of the weights that the format stands for."""
        start = time.perf_counter()
        decoder = NativeDecoder.from_model(self.model, format=contender.variant)
        checks = self.checks[contender.name]
        checks["pack_s"] = round(time.perf_counter() - start, 3)
        decoder.save(contender.folder / f"{contender.variant}.leangpt")
        contender.weight_bytes = matrix_bytes(decoder.packed)
        reference = dequantised(decoder.packed, self.model)
        draw = random.Random(1)
        prompt = [draw.randrange(self.model.config.vocab_size) for _ in range(64)]
        error, limit = logit_error(decoder, reference, prompt), own_limit(contender.variant)
        checks["logit_error"] = error
        if not error <= limit:
            contender.error = f"logits are wrong: error {error:.2e} > {limit:.0e}"
        self.references[contender.name] = reference

    def check_tokens(
        self, contender: Contender, case: Case, prompts: list[list[int]], answer: dict[str, Any]
    ) -> None:
        """Raise unless greedy tokens are those of the reference, up to the rounding of the format."""
        limit = (
            4 * own_limit(contender.variant) if contender.is_own else PEER_GAPS[contender.precision]
        )
        model = self.references.get(contender.name, self.model)
        texts = answer["tokens"]
        if [len(text) for text in texts] != case.lengths()[: len(prompts)]:
            raise RuntimeError(f"{case.name}: not as many tokens as asked for")
        gap = greedy_gap(model, prompts[-1], texts[-1][:24])
        checks = self.checks[contender.name]
        checks["greedy_gap"] = max(gap, checks.get("greedy_gap", 0.0))
        if not gap <= limit:
            raise RuntimeError(f"{case.name}: wrong tokens: logit {gap:.2e} too low > {limit:.0e}")

    def run(self, case: Case, workers: dict[str, Worker]) -> None:
        """Time the rounds of a case, after a first that is checked and not timed."""
        prompts, new = case.prompts(self.model.config), case.lengths()
        samples = self.samples[case.name] = {}
        for round_ in range(-1, case.rounds):
            self.ceilings.sample()
            for contender in self.contenders:
                worker = workers.get(contender.name)
                if worker is None or contender.error or not takes_part(contender, case):
                    continue
                try:
                    with ExitStack() as stack:
                        if case.is_busy:
                            stack.enter_context(one_core_busy())
                        busy, own, start = busy_seconds(), worker.cpu_seconds(), time.perf_counter()
                        some = slice(None) if round_ >= 0 else slice(MAX_CHECKED)
                        answer = worker.ask(prompts[some], new[some], case.is_ragged)
                        wall = time.perf_counter() - start
                        others = busy_seconds() - busy - (worker.cpu_seconds() - own)
                    if round_ < 0:
                        self.check_tokens(contender, case, prompts[some], answer)
                        continue
                except RuntimeError as error:
                    contender.error = str(error)
                    print(f"{contender.name}: not timed: {error}", file=sys.stderr)
                    continue
                result = samples.setdefault(contender.name, Samples())
                count = sum(new) if case.is_ragged else case.batch * (case.new - 1)
                result.tokens_per_s.append(count / answer["decode_s"])
                result.ttft_s.append(answer["ttft_s"])
                result.other_cores.append(max(0.0, others / wall - case.is_busy))

    def run_start(self, case: Case) -> None:
        """Fresh processes: seconds to the first token with and without imports, and memory after a text."""
        samples = self.samples[case.name] = {}
        prompts = case.prompts(self.model.config)
        for _ in range(case.rounds):
            for contender in self.contenders:
                if contender.error:
                    continue
                try:
                    with Worker(contender, self.threads) as worker:
                        first = worker.ask(prompts, [1], False)
                        wall = time.perf_counter() - worker.started
                        longer = worker.ask(prompts, [case.new], False)
                except RuntimeError as error:
                    contender.error = str(error)
                    print(f"{contender.name}: {error}", file=sys.stderr)
                    continue
                contender.weight_bytes = worker.hello["weight_bytes"]
                values = {
                    "load_to_token_s": worker.hello["load_s"] + first["ttft_s"] + first["decode_s"],
                    "start_to_token_s": wall,
                    "resident_mb": longer["resident_mb"],
                }
                result = samples.setdefault(contender.name, Samples())
                for name, value in values.items():
                    result.extra.setdefault(name, []).append(value)


def takes_part(contender: Contender, case: Case) -> bool:
    is_screened = contender.variant.endswith("_screen")
    if case.is_busy:  # the effect is the same in every format, and some peers take minutes
        return contender.precision == "int8" and contender.variant != "int8-bf16"
    if case.is_ragged:  # of this engine, the formats that one would take for much text at a time
        is_slow = contender.is_own and contender.variant in ("int8", "int4")
        has_batches = contender.engine not in ("torch", "ctranslate2")
        return has_batches and contender.precision != "fp32" and not is_slow and not is_screened
    return case.name in ("start", "decode-32") or not is_screened


def work_of(case: Case, contender: Contender, config: GPTConfig) -> tuple[float, float]:
    """Bytes that a step of decoding reads, and operations of the prefill."""
    values = 2 * config.n_layer * config.kv_heads * config.head_size
    length = case.prompt_length(config)
    context = length + case.new / 2
    read = contender.weight_bytes + case.batch * context * values * contender.kv_element_bytes
    if contender.variant.endswith("_screen") and case.batch <= 4:
        element_bytes = 4 if contender.precision == "fp32" else 2
        read -= config.vocab_size * config.n_embd * (element_bytes - 1)
    layer = config.n_embd * config.inner_size * (2 + config.is_gated)
    layer += config.n_embd * config.head_size * 2 * (config.n_head + config.kv_heads)
    attention = config.n_head * config.head_size * length  # two products with half of the keys
    a_token = 2 * config.n_layer * (layer + attention)
    flops = case.batch * (length * a_token + 2 * config.vocab_size * config.n_embd)
    return read, flops


def rows_of(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """One row a contender, the fastest of a precision first; `vs peer`: speed over the fastest peer's."""
    samples = bench.samples.get(case.name, {})
    config = bench.model.config
    rows: list[dict[str, Any]] = []
    for contender in bench.contenders:
        result = samples.get(contender.name)
        if result is None:
            continue
        row: dict[str, Any] = {
            "case": case.name,
            "engine": contender.engine,
            "variant": contender.variant,
            "weights": contender.precision,
        }
        if case.name == "start":
            row |= {
                "load to token ms": 1e3 * result.median("load_to_token_s"),
                "start to token ms": 1e3 * result.median("start_to_token_s"),
                "resident MB": result.median("resident_mb"),
            }
            row["speed"] = 1 / row["load to token ms"]
        else:
            speed = statistics.median(result.tokens_per_s)
            p20, p80 = np.quantile(result.tokens_per_s, (0.2, 0.8)).tolist()
            read, _ = work_of(case, contender, config)
            row |= {
                "tokens/s": speed,
                "p20": p20,
                "p80": p80,
                "ms/token": 1e3 / speed,
                "TTFT ms": 1e3 * statistics.median(result.ttft_s),
            }
            if not (case.is_ragged or case.is_busy):
                row["GB/s"] = read * speed / case.batch / 1e9
                row["% of read"] = 100 * row["GB/s"] * 1e9 / bench.ceilings.read
            if case.is_busy:
                quiet = bench.samples.get("decode-32", {}).get(contender.name)
                row["% of quiet"] = (
                    100 * speed / statistics.median(quiet.tokens_per_s) if quiet else float("nan")
                )
            row["speed"] = speed
            row["other cores"] = max(result.other_cores)
        rows.append(row)
    return _ranked(rows)


def prefill_rows(bench: Bench, case: Case) -> list[dict[str, Any]]:
    rows = []
    for contender in bench.contenders:
        result = bench.samples.get(case.name, {}).get(contender.name)
        if result is None:
            continue
        seconds = statistics.median(result.ttft_s)
        p20, p80 = np.quantile(result.ttft_s, (0.2, 0.8)).tolist()
        _, flops = work_of(case, contender, bench.model.config)
        rows.append(
            {
                "case": "prefill-512",
                "engine": contender.engine,
                "variant": contender.variant,
                "weights": contender.precision,
                "TTFT ms": 1e3 * seconds,
                "p20": 1e3 * p20,
                "p80": 1e3 * p80,
                "tokens/s": case.prompt_length(bench.model.config) / seconds,
                "GFLOP/s": flops / seconds / 1e9,
                "% of peak": 100 * flops / seconds / bench.ceilings.flops[contender.precision],
                "speed": 1 / seconds,
                "other cores": max(result.other_cores),
            }
        )
    return _ranked(rows)


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ratio to the fastest peer of the same precision, and sort."""
    best: dict[str, float] = {}
    for row in rows:
        if row["engine"] != "leangpt":
            best[row["weights"]] = max(best.get(row["weights"], 0.0), row["speed"])
    rows.sort(key=lambda row: (list(PRECISIONS).index(row["weights"]), -row["speed"]))
    for row in rows:
        speed = row.pop("speed")
        peer = best.get(row["weights"])
        if best:
            row["vs peer"] = speed / peer if peer else float("nan")
    return rows


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Tokens per second in each case, as bars."""
    import matplotlib.figure

    shown = {n: rows for n, rows in tables.items() if rows and "tokens/s" in rows[0]}
    if not shown:
        raise ValueError("there is nothing to plot: no case with tokens per second ran")
    colours = {"fp32": "#4c72b0", "bf16": "#55a868", "int8": "#dd8452", "int4": "#8172b3"}
    tallest = max(map(len, shown.values()))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    size = (5 * columns, lines * (1.2 + 0.26 * tallest))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, (name, rows) in zip(grid, shown.items(), strict=False):
        rows = sorted(rows, key=lambda row: row["tokens/s"])
        labels = [f"{row['engine']} {row['variant']}" for row in rows]
        speeds = [row["tokens/s"] for row in rows]
        bars = axes.barh(labels, speeds, color=[colours[row["weights"]] for row in rows])
        for bar, row in zip(bars, rows, strict=True):
            is_own = row["engine"] == "leangpt"
            bar.set_alpha(1.0 if is_own else 0.45)
            bar.set_edgecolor("black" if is_own else "none")
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.12)
        axes.set_title(name)
        axes.set_xlabel("tokens per second")
    figure.savefig(path, dpi=120)


def find_peers(pythons: Sequence[str], folder: Path) -> list[Contender]:
    """Every peer once, in the first of the Pythons that has it."""
    found: dict[str, str] = {}
    for python in pythons:
        listing = subprocess.run(
            [python, WORKER, "list"], check=True, capture_output=True, text=True
        )
        for engine in json.loads(listing.stdout):
            found.setdefault(engine, python)
    found.pop("leangpt", None)
    return [
        Contender(engine, variant, python, folder)
        for engine, python in found.items()
        for variant in ENGINES[engine].variants
    ]


def prepare_peer(contender: Contender) -> None:
    """Convert the model, once."""
    engine, variant, folder = contender.engine, contender.variant, contender.folder
    done = folder / f".{engine}-{variant}.done"
    if done.exists():
        return
    print(f"converting the model for {contender.name}", file=sys.stderr)
    command = [contender.python, str(WORKER), "prepare", engine, variant, str(folder)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        contender.error = f"cannot convert the model: {run.stderr.strip().splitlines()[-1][-300:]}"
        print(f"{contender.name}: {contender.error}", file=sys.stderr)
    else:
        done.touch()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    split = str.split

    def some(text: str, known: Sequence[str] = names) -> list[str]:
        chosen = split(text, ",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"must be some of {', '.join(known)}, got {', '.join(unknown)}"
            )
        return chosen

    parser.add_argument("--model", default="gpt2", help="preset, with random weights (gpt2)")
    parser.add_argument("--cases", type=some, default=names, help=f"some of {','.join(names)}")
    parser.add_argument(
        "--formats", type=lambda t: split(t, ","), default=[*FORMATS], help="of this engine"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine")
    parser.add_argument("--rounds", type=int, help="instead of the cases' own")
    parser.add_argument("--peers", nargs="*", metavar="PYTHON", help="(this Python)")
    parser.add_argument("--only", default="", help="engines whose 'engine variant' matches")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write bars as a PNG")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    decode.set_num_threads(options.threads)
    model = make_model(options.model)
    folder = folder_of(model, options.model)
    folder.mkdir(parents=True, exist_ok=True)
    contenders = [
        Contender("leangpt", format, sys.executable, folder) for format in options.formats
    ]
    if options.peers is not None:
        export_model(model, folder)
        contenders += find_peers(options.peers or [sys.executable], folder)
    contenders = [c for c in contenders if re.search(options.only, c.name)]
    if not contenders:
        raise ValueError(f"no engine matches {options.only!r}")
    for contender in contenders:
        if not contender.is_own:
            prepare_peer(contender)
    bench = Bench(model, contenders, options.threads)
    for contender in contenders:
        if contender.is_own:
            bench.prepare_own(contender)
    tables = run_cases(bench, options)
    where = environment("cpu") | {"threads": options.threads, "model": options.model}
    for name, rows in tables.items():
        if rows:
            print(f"\n{name}")
            print_table([{k: v for k, v in row.items() if k != "case"} for row in rows])
    print_checks(bench)
    seconds = time.perf_counter() - started
    print(f"ceilings: {', '.join(f'{n} {v:,}' for n, v in bench.ceilings.document().items())}")
    print(f"{seconds:.0f} seconds")
    if options.plot:
        plot(tables, options.plot)
    print_json(
        {
            "benchmark": "decode",
            "environment": where,
            "ceilings": bench.ceilings.document(),
            "cases": [asdict(case) for case in CASES if case.name in options.cases],
            "checks": bench.checks,
            "errors": {c.name: c.error for c in contenders if c.error},
            "rows": [_rounded(row) for rows in tables.values() for row in rows],
            "seconds": round(seconds, 1),
        }
    )
    return int(any(c.error for c in contenders if c.is_own))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits, and null for what is not a number: JSON has none."""
    return {
        key: (float(f"{value:.4g}") if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
        for key, value in row.items()
    }


def run_cases(bench: Bench, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    cases = [case for case in CASES if case.name in options.cases]
    if options.rounds:
        cases = [Case(**asdict(case) | {"rounds": options.rounds}) for case in cases]
    tables: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        if case.name == "start":
            bench.ceilings.sample()
            bench.run_start(case)
            print(f"{case.name}: measured", file=sys.stderr)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contender in bench.contenders:
            if contender.error or not any(
                takes_part(contender, c) for c in cases if c.name != "start"
            ):
                continue
            try:
                worker = stack.enter_context(Worker(contender, bench.threads))
            except RuntimeError as error:
                contender.error = str(error)
                print(f"{contender.name}: {error}", file=sys.stderr)
                continue
            contender.weight_bytes = worker.hello["weight_bytes"]
            workers[contender.name] = worker
        for case in cases:
            if case.name != "start":
                bench.run(case, workers)
                print(f"{case.name}: measured", file=sys.stderr)
    for case in cases:
        tables[case.name] = rows_of(bench, case)
        if case.name == "decode-512":
            tables["prefill-512"] = prefill_rows(bench, case)
    return tables


def print_checks(bench: Bench) -> None:
    rows = []
    for contender in bench.contenders:
        checks = bench.checks[contender.name]
        rows.append(
            {
                "engine": contender.engine,
                "variant": contender.variant,
                "logit error": f"{checks['logit_error']:.1e}" if "logit_error" in checks else "-",
                "greedy gap": f"{checks['greedy_gap']:.1e}" if "greedy_gap" in checks else "-",
                "pack s": f"{checks['pack_s']:.2f}" if "pack_s" in checks else "-",
                "weights MB": f"{contender.weight_bytes / 1e6:.1f}",
                "not timed because": contender.error,
            }
        )
    print("\nchecks (in standard deviations of the logits)")
    print_table(rows)
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
