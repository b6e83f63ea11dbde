"""Methods of fine-tuning side by side: how good, how many parameters, how much time and memory.

    python examples/finetune/make_data.py data/finetune
    python benchmarks/bench_finetune.py --data data/finetune/classify.jsonl
    python benchmarks/bench_finetune.py --methods lora --rates 1e-3 3e-3 1e-2 --no-memory    # which learning rate is best

The first table fine-tunes a model for classification with `leangpt finetune`, a process for each method, all with the same rows,
batches and number of steps; time is the processor's, which other programs beside it change little. The second is of a training
step of a larger model (GPT-2's shape, random weights, float32), a process for each method too: what is in memory before the
step, and the most within it. Linux only: memory is read from /proc.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH is set

from harness import environment, print_json, print_table

from leangpt import GPT, GPTConfig
from leangpt.finetune import methods

METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": (),
    "lora, int8 base": ("--int8-base",),
    "adalora": (),
    "adapter": (),
    "prefix": (),
    "head": (),
}
# name: method, options, whether the blocks are recomputed
STEPS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full": ("full", {}, False),
    "lora": ("lora", {}, False),
    "lora, int8 base": ("lora", {"int8_base": True}, False),
    "lora, recomputed blocks": ("lora", {}, True),
    "lora, both": ("lora", {"int8_base": True}, True),
    "head": ("head", {"lm_head": True}, False),
}


def finetune(name: str, rate: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Run the command for a method, at a learning rate or the method's own; a row of the first table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tuned"
        command = [
            *(sys.executable, "-P", "-m", "leangpt", "finetune", "classify"),
            *("--method", name.partition(",")[0], *METHODS[name]),
            *("--model", options.model, "--data", options.data, "--out", str(out)),
            *("--max-steps", str(options.steps), "--max-len", str(options.max_len)),
            *(("--val-data", options.val_data) if options.val_data else ()),
            "--no-progress",
            *(("--learning-rate", str(rate)) if rate else ()),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{name}: {' '.join(command)} failed")
        report = json.loads((out / "report.json").read_text())
        training = json.loads((out / "task.json").read_text())["training"]
        saved = sum((out / file).stat().st_size for file in os.listdir(out) if ".safe" in file)
    return {
        "method": name,
        "learning_rate": training["learning_rate"],
        "accuracy": report["metrics"]["accuracy"],
        "val_loss": report["val_loss"],
        "trainable": report["num_trainable"],
        "saved_mb": saved / 1e6,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def measure_step(name: str, preset: str, batch_size: int, seq_len: int) -> dict[str, Any]:
    """A row of the second table, in a process of its own."""
    method, options, recomputes = STEPS[name]
    model = GPT(GPTConfig.preset(preset))
    adapted = methods.create(method, **options).attach(model, max_steps=10)
    model.recomputes_blocks = recomputes
    optimizer = torch.optim.AdamW(adapted.trainable_parameters().values(), fused=True)
    tokens = torch.randint(model.config.vocab_size, (batch_size, seq_len))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(2):  # the optimizer's moments are there from the second on
        model(tokens, tokens).backward()
        adapted.optimizer_step(optimizer)
        optimizer.zero_grad()
    return {
        "method": name,
        "trainable": adapted.num_trainable,
        "before_mb": before,
        "peak_mb": _memory("VmHWM"),
    }


def _memory(field: str) -> float:
    """Of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/demo", help="of the first table (%(default)s)")
    parser.add_argument("--data", default="data/finetune/classify.jsonl", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of 16 rows (%(default)s)")
    parser.add_argument("--max-len", type=int, default=128, help="tokens a row (%(default)s)")
    parser.add_argument("--val-data", help="rows to validate; by default a tenth of the data")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*METHODS],
        help=f"of the first table ({', '.join(METHODS)})",
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[None], help="learning rates (the method's own)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the second table")
    parser.add_argument("--preset", default="gpt2", help="of the second table (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="there (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="there (%(default)s)")
    options = parser.parse_args()

    tuned = []
    for name, rate in itertools.product(options.methods, options.rates):
        tuned.append(finetune(name, rate, options))
        print(tuned[-1], file=sys.stderr)
    print_table(tuned)
    print()
    steps = []
    if not options.no_memory:
        # memory that is given back must leave the process, and not wait in the allocator
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            shape = (options.preset, options.batch_size, options.seq_len)
            steps = pool.starmap(measure_step, [(name, *shape) for name in STEPS], chunksize=1)
        print_table(steps)
    document = {"benchmark": "finetune", "environment": environment("cpu")}
    print_json(document | {"options": vars(options), "classify": tuned, "steps": steps})


if __name__ == "__main__":
    main()
