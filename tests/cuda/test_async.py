"""Steps of the CUDA engine that start before the draws of the one before are read: the same draws, however late the device is.

In the emulator, streams that do nothing before they are waited for show what is read or overwritten too early.
"""

import pytest
import torch
from native_helpers import LLAMA, append, have_same_bits, make_model, text_of, whole

from leangpt import Generator, SamplingParams
from leangpt.decoding.cuda_decoder import CudaDecoder
from leangpt.decoding.decoder import AsyncDecoder
from leangpt.decoding.native_decoder import pack_model
from leangpt.decoding.sampling import RowSampling
from leangpt.kernels import decode

pytestmark = pytest.mark.usefixtures("native_engine")


@pytest.fixture(autouse=True)
def _engine(request):
    if decode.cuda_obstacle() is not None:
        request.getfixturevalue("emulated")


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def _streams(request, cuda):
    with cuda.settings(is_deferred=request.param):
        yield


@pytest.fixture
def _late(cuda):
    with cuda.settings(is_deferred=True):
        yield


def make() -> CudaDecoder:
    torch.manual_seed(1)
    return CudaDecoder(pack_model(make_model(n_head=2, n_embd=32, **LLAMA), "bf16"), num_blocks=60)


def row(i: int, position: int, logprobs: int | None = None) -> RowSampling:
    return RowSampling(0.9, 0, 1.0, 0.0, 7 + i, i, position, 1.0, 0.0, (), (), 53, logprobs)


@pytest.mark.usefixtures("_streams")
def test_tokens_that_are_not_known_yet():
    """Batches that shrink, change their order and grow again, graphs and a piece of a prompt among them."""
    decoder = make()
    assert isinstance(decoder, AsyncDecoder)
    orders = [[0], [0], [0], [0, 1, 2], [2, 0, 1], [1, 2], [2, 1, 0], [0, 1], [0, 1], [0, 1]]
    prompts = [text_of(4 + i, seed=i) for i in range(3)]

    def run(is_async: bool) -> list[list]:
        sequences = [decoder.add_sequence() for _ in prompts]
        lengths, last, draws, reads = [0] * 3, [0] * 3, [], []
        before: list[int] = []  # the sequences of the step before, whose draws are not read
        for step, order in enumerate(orders):
            batch: list[list] = [[], [], [], [], []]
            for i in order:
                if lengths[i] == 0:
                    new = prompts[i]
                else:
                    new = [-1 - before.index(i) if is_async and i in before else last[i]]
                batch[0] += new
                batch[1] += [sequences[i]] * len(new)
                batch[2] += range(lengths[i], lengths[i] + len(new))
                lengths[i] += len(new)
                batch[3].append(len(batch[0]) - 1)
                batch[4].append(row(i, lengths[i], (None, 2, 0)[i]))
            if is_async:
                reads.append((order, decoder.start_sample(*batch)))
                before = order
            else:
                reads.append((order, lambda batch=batch: decoder.sample(*batch)))
            while len(reads) > int(is_async and step + 1 < len(orders)):
                drawn_for, read = reads.pop(0)
                draws.append(read())
                for i, draw in zip(drawn_for, draws[-1], strict=True):
                    last[i] = draw.token
        for sequence in sequences:
            decoder.drop(sequence)
        return draws

    expected = run(is_async=False)
    assert run(is_async=True) == expected
    assert decoder.num_graphs >= 2
    assert run(is_async=True) == expected


@pytest.mark.usefixtures("_streams")
def test_other_steps_between_start_and_reading():
    decoder = make()
    text, other = text_of(20), text_of(20, seed=1)
    expected = whole(decoder, other)
    a = decoder.add_sequence()
    alone = decoder.sample(text, [a] * 20, range(20), [19, 3], [row(0, 20, 3), row(1, 4)])
    decoder.truncate(a, 19)
    draws = decoder.start_sample([text[19]], [a], [19], [0], [row(0, 20, 3)])
    assert have_same_bits(whole(decoder, other), expected)
    targets = whole(decoder, other, output="logprob_of", targets=text)
    fork = decoder.fork(a)
    after = decoder.start_sample([-1, -1], [a, fork], [20, 20], [0, 1], [row(0, 21), row(0, 21)])
    decoder.drop(fork)  # while its step is on its way
    assert draws() == alone[:1]
    assert after()[0] == after_known(decoder, text, alone[0].token)
    again = whole(decoder, other, output="logprob_of", targets=text)
    assert have_same_bits(again, targets)
    assert decoder.sample([other[0]], [decoder.add_sequence()], [0], [0], [row(2, 1)])


def after_known(decoder, text, token):
    sequence = decoder.add_sequence()
    append(decoder, (sequence, 0, text), rows=[])
    [draw] = decoder.sample([token], [sequence], [20], [0], [row(0, 21)])
    return draw


@pytest.mark.usefixtures("_streams")
def test_what_is_refused():
    decoder = make()
    a = decoder.add_sequence()
    with pytest.raises(
        ValueError, match="token -1 stands for a draw of the step before, which drew 0"
    ):
        decoder.start_sample([-1], [a], [0], [0], [row(0, 1)])
    with pytest.raises(ValueError, match="token ids must be in"):
        decoder.sample([-1], [a], [0], [0], [row(0, 1)])
    first = decoder.start_sample([3], [a], [0], [0], [row(0, 1)])
    with pytest.raises(ValueError, match="token -2 stands for a draw .*, which drew 1"):
        decoder.start_sample([-2], [a], [1], [0], [row(0, 2)])
    with pytest.raises(ValueError, match="the next position of sequence"):
        decoder.start_sample([-1], [a], [5], [0], [row(0, 2)])
    second = decoder.start_sample([-1], [a], [1], [0], [row(0, 2)])
    with pytest.raises(RuntimeError, match="two steps have draws that nobody took"):
        decoder.start_sample([-1], [a], [2], [0], [row(0, 3)])
    assert len(first()) == len(second()) == 1
    with pytest.raises(RuntimeError, match="there are no draws to take"):
        second()


def test_nan_is_drawn_on():
    """Where logits are NaN the draw is none, which the next step must survive."""
    model = make_model(n_head=2, n_embd=32)
    model.wte.weight[3, 5] = torch.nan
    decoder = CudaDecoder(pack_model(model, "bf16"), num_blocks=4)
    a = decoder.add_sequence()
    first = decoder.start_sample([3], [a], [0], [0], [row(0, 1)])
    second = decoder.start_sample([-1], [a], [1], [0], [row(0, 2)])
    for read in (first, second):
        with pytest.raises(RuntimeError, match="logits are NaN"):
            read()


@pytest.mark.usefixtures("_late")
def test_texts_are_the_same_as_step_by_step():
    """The generator starts steps ahead; and here is one that cannot."""
    decoder = make()

    class Synchronous:
        def __init__(self, decoder: CudaDecoder) -> None:
            for name in ("add_adapter", "add_sequence", "fork", "truncate", "drop", "forward"):
                setattr(self, name, getattr(decoder, name))
            self.config, self.sample = decoder.config, decoder.sample
            self.kv_block_size, self.num_blocks = decoder.kv_block_size, decoder.num_blocks

    params = [
        SamplingParams(max_new_tokens=2 + 3 * i, temperature=0.8, seed=i, n=1 + i % 2, logprobs=1)
        for i in range(3)
    ]
    prompts = [text_of(3 + 5 * i, seed=i) for i in range(3)]
    texts = [
        Generator(d, max_batch_size=2, max_batch_tokens=9).generate(prompts, params)
        for d in (decoder, Synchronous(decoder))
    ]
    assert texts[0] == texts[1]
    assert decoder.num_free_blocks == 60
