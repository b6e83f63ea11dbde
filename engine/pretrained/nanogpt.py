"""nanoGPT's checkpoints: a ckpt.pt with "model" (state dict) and "model_args". Read only, and never by running its pickle."""

from pathlib import Path

from ..config import GPTConfig
from .huggingface import GPT2_MODULES, is_buffer, without_tied_head
from .layout import Names, Weights
from .options import Options
from .tensors import check_tensors, load_weights_only


def read(path: Path) -> Weights:
    checkpoint = Options(str(path), load_weights_only(path))
    config = _config(Options(f"{path}: model_args", checkpoint.need("model_args", dict)))
    tensors = {
        name.removeprefix("_orig_mod."): tensor  # put there by torch.compile
        for name, tensor in check_tensors(path, checkpoint.need("model", dict)).items()
        if not is_buffer(name)
    }
    without_tied_head(str(path), tensors, "transformer.wte.weight")
    return Weights(str(path), config, tensors, Names(GPT2_MODULES))


def _config(args: Options) -> GPTConfig:
    """Its vocab_size may be padded (50304 for GPT-2's 50257 tokens), and stays so."""
    try:
        return GPTConfig(
            vocab_size=args.need("vocab_size", int),
            max_seq_len=args.need("block_size", int),
            n_layer=args.need("n_layer", int),
            n_head=args.need("n_head", int),
            n_embd=args.need("n_embd", int),
            bias=args.get("bias", bool, True),
            dropout=args.get("dropout", float, 0.0),
            activation="gelu",  # not GPT-2's approximation of it
        )
    except ValueError as error:
        raise ValueError(f"{args.where}: {error}") from error
