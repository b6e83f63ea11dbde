"""How a model is fine-tuned: which of its parameters train, and what small ones are added to it.

    method = methods.create("lora", rank=8, alpha=16)   # a frozen dataclass of options; METHODS names them
    adapted = method.attach(model, max_steps=1000)      # the model changes in place
    adapted.trainable_parameters()                      # what the optimizer is for
    adapted.optimizer_step(optimizer)                   # in place of optimizer.step()
    adapted.save(folder)                                # only what was trained, with the hash of the base model
    adapted = methods.load(folder, model)               # onto the same base; another one is an error
    plain = adapted.merge()                             # a GPT without additions, where the method has one

What is added hangs on the model's own matrices (`Linear.delta`, `GPT.prefix`), so that the names of the base's
parameters stay, and a model without additions runs as before.
"""

from .base import Adapted, Method, base_hash
from .peft_files import load_peft, save_peft
from .storage import METHODS, create, from_dict, load

__all__ = [
    "METHODS",
    "Adapted",
    "Method",
    "base_hash",
    "create",
    "from_dict",
    "load",
    "load_peft",
    "save_peft",
]
