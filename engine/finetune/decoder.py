"""A tuned model in the decode engine: merged where its method can be, else its base with what was added to each sequence."""

import copy
from typing import Any

from ..decoding.adapter import Adapter, Prefix
from ..decoding.choice import decoder_of
from ..decoding.decoder import Decoder
from ..model import GPT, Linear
from .methods import Adapted
from .methods.int8 import dequantize_blocks


def decoder_of_tuned(adapted: Adapted) -> Decoder:
    """A decoder of the model as it is now; later training does not change it."""
    adapted = copy.deepcopy(adapted)
    try:
        return decoder_of(adapted.merge().eval())
    except ValueError:  # the method has no merged form
        prefix, adapter = adapted.additions()
    base = decoder_of(_without_additions(adapted.model).eval())
    return AdaptedDecoder(base, prefix, adapter)


def _without_additions(model: GPT) -> GPT:
    dequantize_blocks(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.delta = None
    model.prefix = None
    return model


class AdaptedDecoder:
    """A decoder that gives every sequence the same prefix and adapter; all else is the base's."""

    def __init__(self, base: Decoder, prefix: Prefix | None, adapter: Adapter | None) -> None:
        self._base = base
        self._prefix = prefix
        self._adapter = None if adapter is None else base.add_adapter(adapter)

    def add_sequence(self) -> int:
        return self._base.add_sequence(self._prefix, self._adapter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)
