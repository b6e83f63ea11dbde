"""What prompt lookup saves: the same greedy texts with and without it, timed in turn.

    python benchmarks/bench_speculation.py --model runs/demo

"repetitive" prompts are a piece of code given twice, so that the text goes on with what stood before; "ordinary" ones are the first
lines of source files. The texts are compared first: they must be the same.
"""

import argparse
import inspect
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH is set

from harness import environment, print_json, print_table, time_interleaved

from leangpt import Generator, SamplingParams

MODULES = ("argparse", "json.decoder", "textwrap", "queue")
SPECULATE = 8


def prompts(model: Generator, repetitive: bool, new_tokens: int) -> list[list[int]]:
    """Token ids, as many as leave room for the new ones."""
    assert model.tokenizer is not None
    room = model.decoder.config.max_seq_len - new_tokens
    found = []
    for name in MODULES:
        __import__(name)
        tokens = model.tokenizer.encode(inspect.getsource(sys.modules[name]))
        found.append(2 * tokens[: room // 2] if repetitive else tokens[:room])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo", help="(%(default)s)")
    parser.add_argument("--formats", default="fp32,int8", help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=96, help="(%(default)s)")
    options = parser.parse_args()
    params = SamplingParams(max_new_tokens=options.new_tokens, temperature=0, ignore_eos=True)
    rows = []
    for weights in options.formats.split(","):
        engines = {
            k: Generator.from_pretrained(options.model, format=weights, speculate=k)
            for k in (0, SPECULATE)
        }
        for kind in ("repetitive", "ordinary"):
            texts = prompts(engines[0], kind == "repetitive", options.new_tokens)
            for text in texts:
                plain, guessed = (e.generate([text], params)[0].token_ids for e in engines.values())
                if plain != guessed:
                    sys.exit(f"{weights}: the text is another one with prompt lookup")
            calls = {
                str(k): lambda e=e, texts=texts: [e.generate([text], params) for text in texts]
                for k, e in engines.items()
            }
            timings = time_interleaved(calls, "cpu", rounds=7, warm_up=1)
            per_s = {k: len(texts) * options.new_tokens / t.p50 for k, t in timings.items()}
            rows.append(
                {
                    "weights": weights,
                    "text": kind,
                    "tokens/s": per_s["0"],
                    f"with speculate={SPECULATE}": per_s[str(SPECULATE)],
                    "times": per_s[str(SPECULATE)] / per_s["0"],
                }
            )
    print_table(rows)
    mean = statistics.geometric_mean(row["times"] for row in rows)
    print(f"\ngeometric mean: {mean:.2f} times")
    print_json({"benchmark": "speculation", "environment": environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
