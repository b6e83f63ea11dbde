"""The command line: `leangpt prepare | train | finetune | predict | chat | generate | evaluate | export | demo | kernels | info`.

Each command is a dataclass whose fields are its options; the functions only parse, print, and call the library.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from .config import PRESETS, RECIPES, SamplingParams, TrainConfig

DEMO_RUN = Path("runs/demo")


@dataclass(frozen=True)
class Generate:
    """Generate text: from a prompt on the command line, in a file, or on standard input."""

    prompt: Positional[str | None] = None  # "-": read standard input
    model: str = str(
        DEMO_RUN
    )  # hub id, Hugging Face folder, run, checkpoint or packed model; by default the demo's
    file: Path | None = None  # read the prompt from this file
    each_line: bool = False  # every line of the file or of standard input is a prompt of its own
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)
    stream: bool = False  # print text as it is drawn
    interactive: bool = False  # ask for one prompt after the other
    chat: bool = False  # put the prompt through the model's chat template
    system: str | None = None  # chat: a first message of the role "system"
    json: bool = False  # one JSON object a completion and line
    overflow: Literal["error", "truncate"] = (
        "error"  # prompt too long for the context: refuse or cut its left
    )
    speculate: int = (
        0  # guess so many tokens at a time from what the text has repeated: same text, sooner
    )
    format: str | None = (
        None  # of the weights on a CPU, such as int8; by default that of the packed model, or dtype
    )
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = (
        None  # by default float32, where the model is not packed
    )


@dataclass(frozen=True)
class Chat:
    """Talk with a model in the terminal. Ctrl-C stops an answer, Ctrl-D ends; the oldest turns are forgotten when the
    conversation is too long.
    """

    model: str = str(DEMO_RUN)  # a tuned model, or any with a chat template
    system: str | None = None  # a first message of the role "system"
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)
    format: str | None = None  # of the weights on a CPU, such as int8
    device: str = "auto"


@dataclass(frozen=True)
class Predict:
    """Run a tuned model on a file or standard input: rows as JSON, a table, or lines of text; one JSON object a row comes out.

    With --task no training is needed: any model classifies into --labels, or ranks the candidates of each row, by how probable
    it finds them.
    """

    file: Positional[Path | None] = None  # .jsonl, .csv, .tsv, .conll or text; none: standard input
    model: str = "runs/finetune"  # written by `leangpt finetune`; with --task any model
    base: str | None = None  # where the base model is now, if it was moved
    batch_size: int = 16  # rows a forward pass
    skip_bad_rows: bool = False  # and count them, instead of stopping with an error
    format: str | None = None  # of the weights on a CPU, such as int8
    device: str = "auto"
    task: Literal["classify", "rank"] | None = None  # without training
    labels: tuple[str, ...] = ()  # --task classify: as the template should say them
    shots: Path | None = None  # --task: a few rows with their answers, which are shown to the model
    prompt: str | None = None  # --task: template with {fields} of a row
    report: bool = False  # the rows have their answers: print how good the predictions are instead


@dataclass(frozen=True)
class Evaluate:
    """Measure what weight formats cost: perplexity, and how far the predictions are from those of fp32."""

    model: str = str(DEMO_RUN)
    data: Path = Path("data/stdlib")  # prepared data, whose validation set is read, or a text file
    format: str = "bf16,int8,int8_dynamic,int4"  # with commas between; fp32 is always measured
    batches: int = 16  # of eight sequences, at most
    seq_len: int | None = None  # None: the model's max_seq_len, or 1024 where that is longer
    json: bool = False


@dataclass(frozen=True)
class Export:
    """Write a model in another format."""

    out: Positional[Path]
    model: str = str(DEMO_RUN)
    format: Literal["auto", "hf", "native", "packed"] = (
        "auto"  # auto: Hugging Face's where it can express the model; packed: runs on CPUs without PyTorch
    )
    weights: str | None = None  # packed: their format, such as int8 or int4; None: fp32


@dataclass(frozen=True)
class Info:
    """Show what this machine offers: instructions, threads, backends, versions."""

    json: bool = False


@dataclass(frozen=True)
class Demo:
    """Train a small GPT on the sources of Python's standard library, and generate from it."""

    out: Path = DEMO_RUN
    minutes: float = 3.0  # of training, about; the number of steps follows from the measured speed


@dataclass(frozen=True)
class Kernels:
    """Compile the GPU kernels for GPUs that need not be there, Triton's at the shapes of two models, and look at their code.

    report: registers, spills, shared memory, tensor-core instructions, widths of accesses, what should bound the op.
    check: compare with kernels/contract.json; what is worse there, new or gone is an error.
    update: write that file.

    Check and update compile only what has changed since that file was written.
    """

    action: Positional[Literal["report", "check", "update"]]
    arch: str = "sm_80,sm_90,sm_100,sm_120"  # with commas between
    json: bool = False  # report: one JSON document
    anew: bool = False  # check, update: compile also what has not changed


def _prepare(argv: Sequence[str]) -> None:
    from .data.prepare import PrepareConfig, prepare

    prepare(_parse(PrepareConfig, "prepare", argv))


def _train(argv: Sequence[str]) -> None:
    from .training import load_config, train

    # these choose the defaults of the others, so they are read first
    preset, rest = _take_option(argv, "--preset", "")
    recipe, rest = _take_option(rest, "--recipe", "")
    out = Path(_take_option(rest, "--out", str(TrainConfig.out))[0])
    if "--resume" in rest and (out / "train.json").exists() and not (preset or recipe):
        default = dataclasses.replace(load_config(out), out=out)
    else:
        default = TrainConfig.recipe(recipe or "lean", preset or "small")
    description = (
        f"{TrainConfig.__doc__}\n\n--preset {{{','.join(PRESETS)}}} chooses the defaults of --arch.*\n\n"
        f"--recipe {{{','.join(RECIPES)}}} those of the others: lean is the quickest way to a low loss, gpt2 the classic one, "
        "with GPT-2's block, whose model Hugging Face loads"
    )
    summary = train(_parse(TrainConfig, "train", rest, default=default, description=description))
    if summary.reason == "interrupted":
        raise KeyboardInterrupt


def _take_option(argv: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of an option that decides what the others are, and the arguments without it."""
    rest = list(argv)
    for i, word in enumerate(rest):
        if word == name or word.startswith(f"{name}="):
            value = word.partition("=")[2] or (rest[i + 1] if i + 1 < len(rest) else "")
            return value, rest[:i] + rest[i + (1 if "=" in word else 2) :]
    return default, rest


def _finetune(argv: Sequence[str]) -> None:
    from .finetune import TASKS, FinetuneConfig, finetune
    from .finetune.checkpoint import has_checkpoint, load_options
    from .finetune.methods import METHODS

    usage = f"usage: leangpt finetune TASK --data FILE [OPTIONS]\n\nTASK: {', '.join(TASKS)}\n--method: {', '.join(METHODS)}"
    if not argv or argv[0] in ("-h", "--help"):
        print(
            usage + "\n\n`leangpt finetune TASK --method METHOD --help` lists the options of both."
        )
        raise SystemExit(0 if argv else 2)
    if argv[0] not in TASKS:
        raise ValueError(f"there is no task {argv[0]!r}\n\n{usage}")
    task = TASKS[argv[0]]
    default = FinetuneConfig(task(), METHODS["full"]())
    out = Path(_take_option(argv, "--out", str(default.out))[0])
    if "--resume" in argv and has_checkpoint(out):  # the defaults are what it was started with
        default = dataclasses.replace(load_options(out), out=out, overwrite=False)
        if default.task.name != task.name:
            raise ValueError(
                f"{out}: the training that was begun is of the task {default.task.name}"
            )
    # --method has options of its own, so it is read first
    name, rest = _take_option(argv[1:], "--method", default.method.name)
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    if name != default.method.name:
        default = dataclasses.replace(default, method=method())
    description = f"Fine-tune a model for {task.name}, by {name}.\n\n--method {{{','.join(METHODS)}}} chooses what is trained."
    kind = FinetuneConfig[task, method]  # type: ignore[valid-type]
    options = {"default": default, "description": description}
    outcome = finetune(_parse(kind, f"finetune {argv[0]}", rest, **options))
    print(outcome)
    if outcome.is_interrupted:
        raise KeyboardInterrupt


def _predict(argv: Sequence[str]) -> None:
    options = _parse(Predict, "predict", argv)
    from .finetune.dataset import parse_rows
    from .finetune.predictor import predict_rows, rows_of_input
    from .finetune.rows import BadRows
    from .machine import default_device

    bad_rows = BadRows(options.skip_bad_rows)
    device = default_device() if options.device == "auto" else options.device
    if options.task is None:
        from .finetune import load_tuned

        if options.labels or options.shots or options.prompt:
            raise ValueError("--labels, --shots and --prompt are options of --task")
        tuned = load_tuned(options.model, options.base, device)
        tuned.batch_size, tuned.format = options.batch_size, options.format
        predictor: Any = tuned
    else:
        from .finetune.zero_shot import ZeroShot

        generator = _load_generator(options.model, options.device, options.format)
        predictor = ZeroShot.create(
            options.task, generator, options.labels, options.shots, options.prompt
        )
    rows = rows_of_input(options.file, predictor.task, bad_rows)
    if options.report:
        parsed = list(parse_rows(rows, predictor.task.parse, bad_rows))
        if not parsed:
            raise ValueError("there is no row to report on")
        print(predictor.report([sample for _, sample in parsed]).text)
    else:
        for row, prediction in predict_rows(predictor, rows, bad_rows):
            print(json.dumps(row.values | prediction, ensure_ascii=False), flush=True)
    for message in bad_rows.messages:
        print(f"skipped {message}", file=sys.stderr)
    if bad_rows.count:
        print(f"{bad_rows.count} rows were skipped", file=sys.stderr)


def _load_generator(name: str, device: str, format: str | None) -> Any:
    """A generator of any model, tuned ones too."""
    from .finetune.storage import is_tuned, load_tuned
    from .generation.generator import Generator
    from .machine import default_device

    if not is_tuned(name):
        return Generator.from_pretrained(name, device=device, format=format)
    tuned = load_tuned(name, device=default_device() if device == "auto" else device)
    tuned.format = format
    return tuned.generator


def _chat(argv: Sequence[str]) -> None:
    options = _parse(Chat, "chat", argv)
    generator = _load_generator(options.model, options.device, options.format)
    if generator.chat_template is None:
        raise ValueError(
            f"{options.model}: has no chat template, it was not trained to chat: "
            "`leangpt finetune chat` makes one that is, `leangpt generate` completes text"
        )
    _converse(generator, Generate(sampling=options.sampling, system=options.system, chat=True))


def _read_prompts(options: Generate) -> list[str]:
    if options.file is not None:
        text = _decode(options.file.read_bytes(), str(options.file))
    elif options.prompt not in (None, "-"):
        return [options.prompt]
    elif options.prompt == "-" or not sys.stdin.isatty():
        text = _decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = ""
    return text.splitlines() if options.each_line else [text]


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start} ({error.reason})") from error


def _print_completion(completion: Any, options: Generate, prompts: Sequence[str]) -> None:
    if options.json:
        row = {"prompt": prompts[completion.prompt_index], **dataclasses.asdict(completion)}
        print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        prompt = "" if options.chat else prompts[completion.prompt_index]
        print(prompt + completion.text, flush=True)


def _generate(argv: Sequence[str]) -> None:
    options = _parse(Generate, "generate", argv)
    if options.json and (options.stream or options.interactive):
        raise ValueError("--json prints whole completions: leave out --stream and --interactive")
    if options.model == str(DEMO_RUN) and not DEMO_RUN.exists():
        raise FileNotFoundError(
            f"there is no {DEMO_RUN} yet: run `leangpt demo` (or `make demo`) here, or choose a --model"
        )
    from .generation.generator import Generator

    generator = Generator.from_pretrained(
        options.model,
        format=options.format,
        dtype=options.dtype,
        device=options.device,
        speculate=options.speculate,
    )
    if options.interactive:
        _converse(generator, options)
        return
    prompts = _read_prompts(options)
    if options.stream:
        for prompt in prompts:
            if not options.chat:
                print(prompt, end="")
            _print_stream(generator, prompt, options)
    elif options.chat:
        for i, prompt in enumerate(prompts):
            completion = generator.chat(_messages(options, prompt), options.sampling)
            _print_completion(dataclasses.replace(completion, prompt_index=i), options, prompts)
    else:
        completions = generator.generate(
            prompts,
            options.sampling,
            overflow=options.overflow,
            progress=len(prompts) > 1 and sys.stderr.isatty(),
        )
        for completion in completions:
            _print_completion(completion, options, prompts)


def _messages(options: Generate, prompt: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": prompt}]


def _print_stream(
    generator: Any, prompt: str, options: Generate, messages: list[dict[str, str]] | None = None
) -> str:
    if options.chat:
        pieces = generator.stream_chat(messages or _messages(options, prompt), options.sampling)
    else:
        pieces = generator.stream(prompt, options.sampling, overflow=options.overflow)
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


def _converse(generator: Any, options: Generate) -> None:
    """One prompt after the other until end of input; with --chat the messages before are kept, as far as they fit."""
    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            if options.chat:
                messages.append({"role": "user", "content": prompt})
                messages = generator.trim_history(messages, options.sampling)
            answer = _print_stream(generator, prompt, options, messages)
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            print(" (stopped; Ctrl-D ends)")
        except ValueError as error:
            print(f"leangpt: {error}", file=sys.stderr)


def _evaluate(argv: Sequence[str]) -> None:
    from .data.tokenizer import load_tokenizer
    from .decoding.weight_format import WeightFormat
    from .evaluate import evaluate, read_text
    from .pretrained import load_model, resolve_model

    options = _parse(Evaluate, "evaluate", argv)
    formats = [name.strip() for name in options.format.split(",")]
    for name in formats:
        WeightFormat.parse(name)  # a mistake is told before the model is loaded
    path = resolve_model(options.model)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    model = load_model(path)
    seq_len = min(model.config.max_seq_len, 1024) if options.seq_len is None else options.seq_len
    text = read_text(options.data, tokenizer, seq_len, options.batches)
    rows = evaluate(model, text, formats, progress=sys.stderr.isatty())
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    print(f"{text.num_targets:,} tokens of {options.data}, in windows of {seq_len}")
    print("format             perplexity  vs fp32   bits/byte  KL, nats  same top-1        MB")
    for row in rows:
        change = row.perplexity / rows[0].perplexity - 1
        print(
            f"{row.format:18} {row.perplexity:10.4f} {change:+8.3%}  {row.bits_per_byte:10.5f} {row.kl:9.6f}  "
            f"{row.top_1_agreement:10.2%} {row.num_bytes / 1e6:9.2f}"
        )


def _export(argv: Sequence[str]) -> None:
    from .data.tokenizer import load_tokenizer
    from .pretrained import load_model, resolve_model, save_packed, save_pretrained

    options = _parse(Export, "export", argv)
    if options.weights is not None and options.format != "packed":
        raise ValueError("--weights is an option of --format packed")
    path = resolve_model(options.model)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    model = load_model(path)
    if options.format == "packed":
        save_packed(model, options.out, options.weights or "fp32", tokenizer)
    else:
        save_pretrained(model, options.out, tokenizer, format=options.format)
    print(f"wrote {options.out}")


def _demo(argv: Sequence[str]) -> None:
    from .demo import run_demo

    options = _parse(Demo, "demo", argv)
    run_demo(options.out, options.minutes)


def _kernels(argv: Sequence[str]) -> None:
    options = _parse(Kernels, "kernels", argv)
    try:
        from . import kernel_report
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError("Triton is not installed: run `pip install triton`") from error
    archs = [name.strip() for name in options.arch.split(",")]
    if options.action == "update" and options.arch != Kernels.arch:
        raise ValueError("the contract has all architectures: leave out --arch")
    match options.action:
        case "report":
            found = kernel_report.make_report(archs)
            print(kernel_report.to_json(*found) if options.json else kernel_report.to_text(*found))
        case "check":
            kernel_report.check(archs, options.anew)
        case "update":
            kernel_report.update(options.anew)


def _info(argv: Sequence[str]) -> None:
    from .machine import describe

    options = _parse(Info, "info", argv)
    rows = describe()
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        for name, value in rows.items():
            print(f"{name:18} {value}")


COMMANDS = {
    "prepare": (_prepare, "turn text files into token shards"),
    "train": (_train, "train a GPT on prepared data"),
    "finetune": (_finetune, "fine-tune a model for a task"),
    "predict": (_predict, "run a tuned model on a file or standard input"),
    "chat": (_chat, "talk with a model in the terminal"),
    "generate": (_generate, "generate text from a model"),
    "evaluate": (_evaluate, "measure what low-bit weights cost"),
    "export": (_export, "write a model in another format"),
    "demo": (_demo, "train a small GPT in minutes and generate from it"),
    "kernels": (_kernels, "show and check what the GPU kernels compile to, without a GPU"),
    "info": (_info, "show what this machine offers"),
}
USAGE = "usage: leangpt COMMAND [OPTIONS]\n\n" + "\n".join(
    f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()
)


def _parse(kind: Any, command: str, argv: Sequence[str], **options: Any) -> Any:
    return tyro.cli(
        kind,
        prog=f"leangpt {command}",
        args=list(argv),
        config=(tyro.conf.AvoidSubcommands,),
        **options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 after an error of the user's, 2 for usage, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n\n`leangpt COMMAND --help` lists the options of a command.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"leangpt: there is no command {argv[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        if "LEANGPT_THREADS" in os.environ:  # imports torch, which not every command needs
            from .machine import use_threads

            use_threads()
        COMMANDS[argv[0]][0](argv[1:])
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        ValueError,
        OSError,
    ) as error:  # what the user can mend; anything else shows its traceback
        print(f"leangpt {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nleangpt {argv[0]}: interrupted", file=sys.stderr)
        return 130
    return 0
