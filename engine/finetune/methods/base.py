"""What all methods share: `Method` (its options), `Adapted` (a model that it is attached to), the hash of a base model."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ...decoding.adapter import Adapter, Prefix
from ...files import atomic_write, write_json
from ...model import GPT, Linear

Target = Literal["qkv", "attn_out", "mlp_in", "mlp_out"]  # the matrices of each block
TARGETS: tuple[Target, ...] = get_args(Target)
WEIGHTS_FILE, OPTIONS_FILE = "adapter.safetensors", "adapter.json"
FORMAT_VERSION = 1


def base_hash(model: GPT) -> str:
    """SHA-256 over the names, shapes and values of a model's weights, as float32.

    The dtype that they are held in does not count, as long as the values are the same.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().data)
    return digest.hexdigest()


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def named_targets(model: GPT, targets: tuple[Target, ...]) -> Iterator[tuple[str, Linear]]:
    """The matrices of all blocks that have one of these names."""
    for i, block in enumerate(model.blocks):
        for target in targets:
            yield f"blocks.{i}.{target}", getattr(block, target)


@dataclass(frozen=True)
class Method:
    """The options of a method."""

    name: ClassVar[str]
    learning_rate: ClassVar[float]  # of AdamW, the best one in benchmarks/records/fine_tuning.md

    def default_learning_rate(self, width: int) -> float:
        """Where the user gives none, for a model of `width` channels."""
        del width
        return self.learning_rate

    def attach(self, model: GPT, max_steps: int | None = None) -> "Adapted":
        """Freeze what is not trained and add what is; the model changes in place.

        Args:
            model: plain.
            max_steps: optimizer steps of the training to come, over which AdaLoRA plans its ranks; None where there will be
                none.

        Raises:
            ValueError: the model has additions already, or the options do not fit it.
        """
        check(
            not model.has_additions,
            "a method is attached to the model already: merge it, or load the base model again",
        )
        base = base_hash(model)
        model.requires_grad_(False)
        return self._attach(model, base, max_steps)

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> "Adapted":
        raise NotImplementedError

    def restore(self, model: GPT, tensors: Mapping[str, Tensor]) -> "Adapted":
        """Attach it as it was when `Adapted.tensors` gave these.

        Raises:
            ValueError: a tensor is missing, superfluous, or of a wrong shape.
        """
        adapted = self.attach(model)
        adapted.fill(tensors)
        return adapted


class Adapted:
    """A model that a method is attached to."""

    def __init__(self, method: Method, model: GPT, base: str) -> None:
        self.method = method
        self.model = model
        self.base_hash = base  # of the model before it was attached

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.trainable_parameters().values())

    def optimizer_step(self, optimizer: Optimizer) -> None:
        """Take a step with the gradients that are there, and do what the method does after each step."""
        optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """All that the training changed, but the optimizer's state; tensors of the model, not copies."""
        return {name: p.detach() for name, p in self.trainable_parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state_dict` gave."""
        self.fill(state)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it."""
        return Adapted.state_dict(self)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained parameters."""
        parameters = self.trainable_parameters()
        for problem, wrong in (
            ("missing", parameters.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - parameters.keys()),
        ):
            check(not wrong, f"{problem} tensor {', '.join(sorted(wrong)[:5])}")
        for name, parameter in parameters.items():
            check(
                parameter.shape == tensors[name].shape,
                f"{name} must be {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}",
            )
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def save(self, folder: str | Path) -> None:
        """Write what was trained (adapter.safetensors), the method's options and the base model's hash (adapter.json).

        The options are written last: a folder that has them is whole.
        """
        folder = Path(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        (folder / OPTIONS_FILE).unlink(missing_ok=True)
        with atomic_write(folder / WEIGHTS_FILE) as file:
            save_file(tensors, file.name, metadata={"format": "pt"})
        write_json(
            folder / OPTIONS_FILE,
            {
                "format_version": FORMAT_VERSION,
                "method": self.method.name,
                "options": dataclasses.asdict(self.method),
                "base_sha256": self.base_hash,
            },
        )

    def additions(self) -> tuple[Prefix | None, Adapter | None]:
        """What a sequence of a decoder of the plain base model is to be added with: `add_sequence(prefix=, adapter=)`.

        Raises:
            ValueError: the method changed the base's own weights.
        """
        raise NotImplementedError

    def merge(self) -> GPT:
        """Work the additions into the model's matrices, and take them off; returns the model, which is plain after that.

        Raises:
            ValueError: the method has no such form.
        """
        raise NotImplementedError
