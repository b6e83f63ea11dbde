"""What a user can choose: the model (`GPTConfig`), its training (`TrainConfig`), how text is drawn (`SamplingParams`).

All are frozen and validate themselves; change one with `dataclasses.replace`. The command line is generated from them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

Norm = Literal["layer_norm", "rms_norm"]
Position = Literal["learned", "rotary"]
Activation = Literal["gelu_tanh", "gelu", "relu2", "swiglu"]
Schedule = Literal["cosine", "wsd", "constant"]
OptimizerName = Literal["muon", "adamw"]
Precision = Literal["auto", "float32", "bfloat16"]


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_choice(name: str, value: str, choices: Any) -> None:
    _check(value in get_args(choices), f"{name} must be one of {get_args(choices)}, got {value!r}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value is None or value > 0, f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context length of pre-training.

    References: linear, https://arxiv.org/abs/2306.15595; yarn, https://arxiv.org/abs/2309.00071;
    llama3, https://arxiv.org/abs/2407.21783.
    """

    type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int = 8192  # llama3, yarn: the context length of pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None is 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        _check_choice("rope_scaling.type", self.type, Literal["linear", "llama3", "yarn"])
        _check(self.factor >= 1, f"rope_scaling.factor must be at least 1, got {self.factor}")


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of a GPT. The defaults are GPT-2 (124M); the options reach to Llama, Mistral and Qwen."""

    vocab_size: int = 50257
    max_seq_len: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # key/value heads; None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_inner: int | None = (
        None  # width inside the MLP; None: 4 n_embd, or 8/3 n_embd where it is gated
    )
    norm: Norm = "layer_norm"
    norm_eps: float = 1e-5
    position: Position = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    activation: Activation = "gelu_tanh"
    bias: bool = True  # in every linear layer and LayerNorm
    qkv_bias: bool | None = None  # None: as `bias`
    qk_norm: bool = False  # RMSNorm of each query and key head
    value_residual: bool = False  # the first block's values are added to those of all others
    sliding_window: int | None = None  # keys seen by a query, itself included; None: all before it
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, Norm)
        _check_choice("position", self.position, Position)
        _check_choice("activation", self.activation, Activation)
        _check_positive(self, "vocab_size", "max_seq_len", "n_layer", "n_head", "n_embd")
        _check_positive(self, "n_kv_head", "head_dim", "n_inner", "sliding_window")
        _check_positive(self, "norm_eps", "rope_theta")
        _check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        _check(
            self.head_dim is not None or self.n_embd % self.n_head == 0,
            f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}) unless head_dim is given",
        )
        _check(
            self.n_head % self.kv_heads == 0,
            f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.kv_heads})",
        )
        _check(
            self.position == "learned" or self.head_size % 2 == 0,
            f"rotary positions need an even head_dim, got {self.head_size}",
        )
        _check(
            self.rope_scaling is None or self.position == "rotary",
            "rope_scaling needs position='rotary'",
        )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def is_gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def inner_size(self) -> int:
        if self.n_inner is not None:
            return self.n_inner
        # a gated MLP has three matrices: 8/3 keeps its size, in multiples of 64
        return math.ceil(self.n_embd * 8 / 3 / 64) * 64 if self.is_gated else 4 * self.n_embd

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the preset of that exact name, or raise with the list of names."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`; unknown keys are an error."""
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        _check(not unknown, f"unknown model option: {', '.join(sorted(unknown))}")
        scaling = values.get("rope_scaling")
        if isinstance(scaling, dict):
            values = values | {"rope_scaling": RopeScaling(**scaling)}
        return cls(**values)


# what wins where training is short (benchmarks/records/demo.md)
_LEAN: dict[str, Any] = {
    "norm": "rms_norm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "qk_norm": True,
    "value_residual": True,
}
# for CPUs; training sets vocab_size to that of the data's tokenizer
_SMALL_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 4, "n_head": 2, "n_embd": 128, "max_seq_len": 256},
    "mini": {"n_layer": 2, "n_head": 4, "n_embd": 256, "max_seq_len": 256},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "max_seq_len": 256},
}
_GPT2_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
PRESETS = {name: size | _LEAN for name, size in _SMALL_SIZES.items()} | _GPT2_SIZES
# what a recipe changes in the defaults of `TrainConfig`
RECIPES: dict[str, dict[str, Any]] = {
    "lean": {},
    "gpt2": {
        "optimizer": "adamw",
        "schedule": "cosine",
        "learning_rate": 1e-3,
        "beta2": 0.99,
    },
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Filters apply in the order temperature, top_k, top_p, min_p (see `reference.sample`)."""

    max_new_tokens: int | None = 128  # None: until the context is full
    temperature: float = 0.8  # 0: greedy
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most probable token
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt and text so far
    presence_penalty: float = 0.0  # subtracted from logits of tokens in the text so far
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the tokenizer's end of text
    ignore_eos: bool = False
    seed: int | None = None  # None: draw one; `Completion.seed` tells it
    logprobs: int | None = None  # None: none; 0: of the drawn tokens; k: of the k most probable too
    n: int = 1  # completions of each prompt

    def __post_init__(self) -> None:
        _check_positive(self, "max_new_tokens", "top_k", "repetition_penalty", "n")
        for name in ("temperature", "repetition_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(math.isfinite(value), f"{name} must be finite, got {value}")
        _check(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        _check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _check(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        _check(
            self.seed is None or 0 <= self.seed < 2**64,
            f"seed must be in [0, 2**64), got {self.seed}",
        )
        _check(
            self.logprobs is None or self.logprobs >= 0,
            f"logprobs must be at least 0, got {self.logprobs}",
        )
        if isinstance(self.stop, str):
            raise TypeError(f"stop must be a tuple of strings, got the string {self.stop!r}")
        _check(all(self.stop), "a stop string must not be empty")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. A step is one optimizer update over `batch_size` sequences, on however many processes."""

    data: Path = Path("data/stdlib")  # a folder written by `leangpt prepare`
    out: Path = Path("runs/train")  # the run: checkpoints, logs, loss curve
    resume: bool = False  # go on with the run in `out`; where there is none, start it
    model: str | None = None  # start from these weights (hub id or folder); `arch` is theirs then
    arch: GPTConfig = field(
        default_factory=lambda: GPTConfig.preset("small")
    )  # vocab_size: the data's

    batch_size: int = 16  # sequences a step, over all processes
    micro_batch_size: int | None = None  # sequences a forward pass; None: all that this process has
    seq_len: int | None = None  # None: max_seq_len of the model
    short_fraction: float = 0.0  # share of the steps, the first ones, that cut sequences in half
    max_steps: int = 2000  # the whole run's; the schedule ends there
    minutes: float | None = None  # about so long: max_steps follows from the measured speed
    max_minutes: float | None = None  # stop early on the clock, which resuming does not reset
    target_loss: float | None = None  # stop once the validation loss (nats per token) is this low

    optimizer: OptimizerName = "muon"  # muon: for the blocks' matrices, AdamW for the rest
    learning_rate: float = 2e-3  # the highest
    min_learning_rate: float | None = None  # the last step's; None: 0, or cosine: a tenth
    warmup_steps: int = 100  # in which the rate rises from zero
    schedule: Schedule = "wsd"  # of the rate: warm-up, stable, decay
    decay_fraction: float = 0.5  # wsd: share of the steps in which the rate falls
    weight_decay: float = 0.1  # of matrices, the token table too; not norms, biases, positions
    beta1: float = 0.9  # AdamW's decay of the mean of gradients
    beta2: float = 0.95  # AdamW's decay of the mean of their squares
    muon_lr_scale: float = 3.0  # Muon's learning rate, as a multiple of AdamW's
    muon_momentum: float = 0.95  # Muon's decay of the mean of gradients
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping

    eval_every: int = 250  # steps
    eval_batches: int = 16  # batches of the fixed validation set
    sample_every: int = 500  # steps; 0: no samples in the log
    sample_prompt: str = ""  # what samples begin with
    sample_tokens: int = 96  # length of a sample
    checkpoint_every: int = 500  # steps; every best evaluation is kept too
    keep_last: int = 2  # checkpoints kept besides the best
    spike_factor: float = 3.0  # skip steps of gradient norms this many times the mean; 0: none
    max_skipped: int = 20  # skipped steps in a row that end the run

    seed: int = 1337  # of new weights, of the order of the data, of dropout, of samples
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto: cuda where there is one
    dtype: Precision = "auto"  # of matrix products; auto: bfloat16 where the hardware multiplies it
    compile: bool = False  # torch.compile the model
    tensorboard: bool = True  # log for TensorBoard too
    wandb_project: str | None = None  # log to this project of Weights & Biases too
    progress: bool = True  # progress bar, validation losses and samples on the terminal

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, Schedule)
        _check_choice("optimizer", self.optimizer, OptimizerName)
        _check_positive(self, "batch_size", "micro_batch_size", "seq_len", "max_steps")
        _check_positive(self, "max_minutes", "learning_rate", "eval_every", "eval_batches")
        _check_positive(self, "minutes", "muon_lr_scale")
        _check_positive(self, "checkpoint_every", "keep_last", "max_skipped", "sample_tokens")
        _check_choice("dtype", self.dtype, Precision)
        for name in ("warmup_steps", "sample_every", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            _check(value >= 0, f"{name} must not be negative, got {value}")
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        _check(
            0 <= self.last_learning_rate <= self.learning_rate,
            f"min_learning_rate must be in [0, learning_rate], got {self.min_learning_rate}",
        )
        _check(
            0 <= self.short_fraction <= 1,
            f"short_fraction must be in [0, 1], got {self.short_fraction}",
        )
        _check(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"spike_factor must be 0 or above 1, got {self.spike_factor}",
        )
        _check(
            0 < self.decay_fraction <= 1,
            f"decay_fraction must be in (0, 1], got {self.decay_fraction}",
        )
        _check(
            self.seq_len is None or self.model is not None or self.seq_len <= self.arch.max_seq_len,
            f"seq_len ({self.seq_len}) must not exceed the model's max_seq_len ({self.arch.max_seq_len})",
        )

    @classmethod
    def recipe(cls, name: str, preset: str = "small") -> Self:
        """The defaults of a recipe, for the model size of a preset.

        `lean` is the quickest way to a low loss that was measured. `gpt2` is the classic one, as nanoGPT trains: GPT-2's block,
        AdamW and a cosine; Hugging Face's GPT-2 loads what comes out.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
        arch = GPTConfig.preset(preset)
        if name == "gpt2":
            arch = GPTConfig(**(_SMALL_SIZES | _GPT2_SIZES)[preset])
        return cls(arch=arch, **RECIPES[name])

    @property
    def short_steps(self) -> int:
        return round(self.short_fraction * self.max_steps)

    @property
    def last_learning_rate(self) -> float:
        if self.min_learning_rate is not None:
            return self.min_learning_rate
        return self.learning_rate / 10 if self.schedule == "cosine" else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return values | {"data": str(self.data), "out": str(self.out)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown keys are an error."""
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        _check(not unknown, f"unknown training option: {', '.join(sorted(unknown))}")
        paths = {name: Path(values[name]) for name in ("data", "out")}
        return cls(**values | paths | {"arch": GPTConfig.from_dict(values["arch"])})
