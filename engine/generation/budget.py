"""How many pages of a decoder's cache are promised to the work that runs on it.

Work starts only when the pages it may need at worst are free, so that nothing that has started runs out of them.
"""

from ..decoding.decoder import Decoder
from .completion import Request


class CacheBudget:
    """Counts pages; a decoder whose cache grows has room for everything."""

    def __init__(self, decoder: Decoder) -> None:
        self.num_blocks = decoder.num_blocks
        self.kv_block_size = decoder.kv_block_size
        self._num_promised = 0

    def has_room(self, num_blocks: int) -> bool:
        return self.num_blocks is None or self._num_promised + num_blocks <= self.num_blocks

    def promise(self, num_blocks: int) -> None:
        self._num_promised += num_blocks

    def give_back(self, num_blocks: int) -> None:
        self._num_promised -= num_blocks

    def blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.kv_block_size)

    def blocks_of_fork(self, num_tokens: int, num_shared_tokens: int) -> int:
        """Pages of its own: all but the full ones it shares."""
        return self.blocks_of(num_tokens) - num_shared_tokens // self.kv_block_size

    def blocks_of_prompt(self, request: Request) -> int:
        """Pages of what several completions share: the prompt but its last token."""
        return self.blocks_of(len(request.tokens) - 1) if request.params.n > 1 else 0

    def blocks_of_draft(self, request: Request) -> int:
        """Pages that one completion needs besides."""
        num_shared = len(request.tokens) - 1 if request.params.n > 1 else 0
        # the last token that is drawn is never appended
        return self.blocks_of_fork(len(request.tokens) + request.max_new_tokens - 1, num_shared)

    def check(self, name: str, num_blocks: int) -> None:
        """Refuse what would not fit into an empty cache."""
        if self.num_blocks is not None and num_blocks > self.num_blocks:
            raise ValueError(
                f"{name} may need {num_blocks} pages of {self.kv_block_size} tokens, the cache has only "
                f"{self.num_blocks}: shorten it, lower max_new_tokens, or give the decoder a larger cache"
            )
