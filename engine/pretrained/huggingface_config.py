"""config.json of Hugging Face's transformers, to and from `GPTConfig`: the only place that knows its words.

What a GPT cannot express is refused by name, never ignored; only rates of dropout, which change no prediction, may be
lost, with a warning.
"""

import warnings
from typing import Any

from ..config import Activation, GPTConfig, RopeScaling
from .options import Options

_MODEL_TYPES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}
# their word -> our field, for each type of rotary scaling
_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
_ROPE_COMMON_KEYS = {"rope_type", "type", "rope_theta", "truncate", "partial_rotary_factor"}


def architecture_of(options: Options) -> str:
    """The name of a known architecture, or ValueError with the names of these."""
    names = options.get("architectures", list, [])
    if names:
        name = str(names[0])
    else:
        model_type = options.get("model_type", str, "")
        name = next((a for a, t in _MODEL_TYPES.items() if t == model_type), model_type)
    if name not in _MODEL_TYPES:
        raise ValueError(
            f"{options.where}: architecture must be one of {', '.join(_MODEL_TYPES)}, got {name!r}"
        )
    options.must_be("quantization_config", None, None)
    return name


def read_config(options: Options, architecture: str) -> GPTConfig:
    """The config, or ValueError with file, key and value where a GPT cannot express it."""
    try:
        if architecture == "GPT2LMHeadModel":
            return _gpt2_config(options)
        return _llama_config(options, architecture)
    except ValueError as error:  # what GPTConfig says does not name the file
        where = "" if str(error).startswith(options.where) else f"{options.where}: "
        raise ValueError(f"{where}{error}") from error


def _gpt2_config(options: Options) -> GPTConfig:
    options.must_be("scale_attn_weights", True, True)
    options.must_be("scale_attn_by_inverse_layer_idx", False, False)
    options.must_be("reorder_and_upcast_attn", False, False)
    options.must_be("add_cross_attention", False, False)
    activation = options.get("activation_function", str, "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{options.where}: activation_function must be one of {', '.join(_ACTIVATIONS)}, got "
            f"{activation!r}"
        )
    rates = [options.get(f"{part}_pdrop", float, 0.1) for part in ("embd", "attn", "resid")]
    if len(set(rates)) > 1:
        warnings.warn(
            f"{options.where}: embd_pdrop, attn_pdrop and resid_pdrop differ ({rates}); dropout is set to 0",
            stacklevel=2,
        )
    return GPTConfig(
        vocab_size=options.need("vocab_size", int),
        max_seq_len=options.need("n_positions", int),
        n_layer=options.need("n_layer", int),
        n_head=options.need("n_head", int),
        n_embd=options.need("n_embd", int),
        n_inner=options.get("n_inner", int, 0) or None,
        norm_eps=options.get("layer_norm_epsilon", float, 1e-5),
        activation=_ACTIVATIONS[activation],
        tie_embeddings=options.get("tie_word_embeddings", bool, True),
        dropout=rates[0] if len(set(rates)) == 1 else 0.0,
    )


def _llama_config(options: Options, architecture: str) -> GPTConfig:
    n_head, n_embd = options.need("num_attention_heads", int), options.need("hidden_size", int)
    max_seq_len = options.need("max_position_embeddings", int)
    options.must_be("hidden_act", "silu", "silu")
    options.must_be("partial_rotary_factor", 1.0, 1.0)
    bias = False
    if architecture == "LlamaForCausalLM":
        bias = options.get("attention_bias", bool, False)
        options.must_be("mlp_bias", bias, False)
    elif architecture != "Qwen2ForCausalLM":
        options.must_be("attention_bias", False, False)
    if options.get("attention_dropout", float, 0.0):
        warnings.warn(
            f"{options.where}: attention_dropout alone cannot be expressed; dropout is set to 0",
            stacklevel=2,
        )

    head_dim = options.get("head_dim", int, 128 if architecture == "Qwen3ForCausalLM" else 0)
    n_kv_head = options.get("num_key_value_heads", int, n_head)
    if "num_key_value_heads" not in options.values and architecture != "LlamaForCausalLM":
        options.need("num_key_value_heads", int)  # only Llama means num_attention_heads
    theta, scaling = _rope(options, max_seq_len)
    return GPTConfig(
        vocab_size=options.need("vocab_size", int),
        max_seq_len=max_seq_len,
        n_layer=options.need("num_hidden_layers", int),
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=None if n_kv_head == n_head else n_kv_head,
        head_dim=None if head_dim * n_head in (0, n_embd) else head_dim,
        n_inner=options.need("intermediate_size", int),
        norm="rms_norm",
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        position="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        activation="swiglu",
        bias=bias,
        qkv_bias=True if architecture == "Qwen2ForCausalLM" else None,
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(options, architecture),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
    )


def _rope(options: Options, max_seq_len: int) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from transformers 4's rope_theta and rope_scaling or 5's rope_parameters."""
    key = "rope_scaling" if options.get("rope_scaling", dict, {}) else "rope_parameters"
    values = options.get(key, dict, {})
    if values and all(
        isinstance(value, dict) for value in values.values()
    ):  # one for each layer type
        first, *others = values.values()
        if any(other != first for other in others):
            raise ValueError(
                f"{options.where}: {key} must be the same for all layers, got {values}"
            )
        values = first
    rope = Options(f"{options.where}: {key}", {k: v for k, v in values.items() if v is not None})
    theta = rope.get("rope_theta", float, options.get("rope_theta", float, 10000.0))
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return theta, None
    if kind not in _ROPE_KEYS:
        raise ValueError(
            f"{rope.where}: rope_type must be one of default, {', '.join(_ROPE_KEYS)}, got {kind!r}"
        )
    rope.must_be("truncate", True, True)
    rope.must_be("partial_rotary_factor", 1.0, 1.0)
    keys = _ROPE_KEYS[kind]
    unknown = rope.values.keys() - keys - _ROPE_COMMON_KEYS
    if unknown:
        raise ValueError(f"{rope.where}: {', '.join(sorted(unknown))} has no meaning for {kind}")
    rope.need("factor", float)
    scaling: dict[str, Any] = {"type": kind}
    if "original_max_position_embeddings" in keys:
        scaling["original_max_seq_len"] = max_seq_len
    for theirs, ours in keys.items():
        if theirs in rope.values:
            scaling[ours] = rope.need(theirs, int if ours == "original_max_seq_len" else float)
    return theta, RopeScaling(**scaling)


def _sliding_window(options: Options, architecture: str) -> int | None:
    """The window of all layers; None where there is none."""
    if architecture == "LlamaForCausalLM":
        return None
    is_qwen = architecture.startswith("Qwen")
    if is_qwen and not options.get("use_sliding_window", bool, False):
        return None
    if options.values.get("sliding_window", 4096) is None:
        return None
    window = options.get("sliding_window", int, 4096)
    n_layer = options.need("num_hidden_layers", int)
    layers = options.get("layer_types", list, [])
    if layers:
        num_sliding = sum(layer == "sliding_attention" for layer in layers)
    else:
        num_sliding = (
            max(n_layer - options.get("max_window_layers", int, 28), 0) if is_qwen else n_layer
        )
    if num_sliding not in (0, n_layer):
        raise ValueError(
            f"{options.where}: sliding_window must be the same for all layers, got {num_sliding} of "
            f"{n_layer} layers with it (layer_types, max_window_layers)"
        )
    return window if num_sliding else None


def closest_architecture(config: GPTConfig) -> tuple[str, list[str]]:
    """The architecture for a config, and the options that stand in its way, as `name=value`; none: it fits."""
    if config.norm == "layer_norm":
        architecture = "GPT2LMHeadModel"
        wrong = {
            "position": config.position != "learned",
            "activation": config.activation not in _ACTIVATIONS.values(),
            "n_kv_head": config.kv_heads != config.n_head,
            "head_dim": config.head_size * config.n_head != config.n_embd,
            "qk_norm": config.qk_norm,
            "sliding_window": config.sliding_window is not None,
            "value_residual": config.value_residual,
        }
    else:
        wrong = {
            "position": config.position != "rotary",
            "activation": config.activation != "swiglu",
            "value_residual": config.value_residual,
        }
        # transformers' Llama insists on this even where head_dim is given
        is_divisible = config.n_embd % config.n_head == 0
        if config.qk_norm:
            architecture = "Qwen3ForCausalLM"
            wrong["bias"] = config.bias
            wrong["qkv_bias"] = config.has_qkv_bias and not config.bias
        elif config.bias:
            architecture = "LlamaForCausalLM"
            wrong["sliding_window"] = config.sliding_window is not None
            wrong["head_dim"] = not is_divisible
        elif config.has_qkv_bias:
            architecture = "Qwen2ForCausalLM"
        elif config.sliding_window is not None or not is_divisible:
            architecture = "MistralForCausalLM"
        else:
            architecture = "LlamaForCausalLM"
    return architecture, [
        f"{k}={getattr(config, k)!r}" for k, is_wrong in wrong.items() if is_wrong
    ]


def write_config(config: GPTConfig, architecture: str) -> dict[str, Any]:
    """The options of an architecture that fits; rotary ones in the words of transformers 4, which 5 reads too."""
    is_gpt2 = architecture == "GPT2LMHeadModel"
    return {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        **(_gpt2_values(config) if is_gpt2 else _llama_values(config, architecture)),
    }


def _gpt2_values(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_seq_len,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": next(
            theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation
        ),
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def _llama_values(config: GPTConfig, architecture: str) -> dict[str, Any]:
    window = config.sliding_window
    values: dict[str, Any] = {
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
    }
    if (scaling := config.rope_scaling) is not None:
        options = {
            theirs: getattr(scaling, ours) for theirs, ours in _ROPE_KEYS[scaling.type].items()
        }
        given = {key: value for key, value in options.items() if value is not None}
        values["rope_scaling"] = {"rope_type": scaling.type, **given}
    match architecture:
        case "LlamaForCausalLM":
            values |= {"attention_bias": config.bias, "mlp_bias": config.bias}
        case "MistralForCausalLM":
            values |= {"sliding_window": window}
        case "Qwen2ForCausalLM" | "Qwen3ForCausalLM":
            values |= {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "max_window_layers": config.n_layer if window is None else 0,
            }
    return values
