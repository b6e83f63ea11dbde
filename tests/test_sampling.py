"""Drawing tokens: the generator of random numbers, the filters, the exact distribution, penalties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leangpt import SamplingParams
from leangpt.decoding.sampling import Draw
from leangpt.decoding.torch_sampling import draw
from leangpt.generation.completion import Draft, Request
from leangpt.kernels import ops, reference

# Salmon et al., 2011: known answers of philox4x32-10, published with Random123
PHILOX = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX.values(), ids=PHILOX)
def test_philox_known_answers(counter, key, words):
    seed = torch.tensor([signed(key[0] | key[1] << 32)])
    result = reference.philox(tuple(torch.tensor([word]) for word in counter), seed)
    assert [word.item() for word in result] == words


def python_philox(counter: list[int], seed: int) -> list[int]:
    """The paper's formulas in Python's integers."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    sample_index=st.integers(0, 2**31),
    position=st.integers(0, 2**31),
    vocab_size=st.integers(1, 10),
)
def test_noise_is_a_function_of_seed_index_position_and_token(
    seed, sample_index, position, vocab_size
):
    arguments = (torch.tensor([n]) for n in (signed(seed), sample_index, position))
    noise = reference.exponential_noise(vocab_size, *arguments)
    words = [
        python_philox([token // 4, position, sample_index, 0], seed)[token % 4]
        for token in range(vocab_size)
    ]
    expected = [-np.log1p(-(word + 0.5) / 2**32) for word in words]
    np.testing.assert_allclose(noise[0].numpy(), expected, rtol=1e-14)


def sample(logits: Tensor, **options) -> Tensor:
    """`ops.sample` with the same options for all rows, unless they are tensors."""
    count = len(logits)
    values = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
        "sample_index": 0,
        "position": torch.arange(count),
    }
    arguments = {
        name: value if isinstance(value, Tensor) else torch.full((count,), value)
        for name, value in (values | options).items()
    }
    return ops.sample(logits, **arguments)


def exact(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution, from the definition: sort, cut, renormalise; one step after the other."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
        p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        count = 1
        while p[order[:count]].sum() < top_p:
            count += 1
        p = np.where(p >= p[order[count - 1]], p, 0)
        p /= p.sum()
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


FILTERS = {
    "none": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_k beyond the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "top_k of hot": {"temperature": 1.7, "top_k": 6},
    "top_p of top_k": {"top_k": 5, "top_p": 0.8},
    "min_p of top_p": {"top_p": 0.9, "min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
}
CHI_SQUARE_999 = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26]


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("varied", ["position", "sample_index", "seed"])
def test_frequencies_are_those_of_the_exact_distribution(options, varied):
    """Chi-square at 0.1 %, over draws that differ in one part of the key only; none outside of what the filters keep."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.3, 0.0, 1.9, -0.4, 0.7, 1.1, -2.0, 0.2])
    count = 50_000
    key = {"position": 3, "sample_index": 5, "seed": 7, varied: torch.arange(count)}
    drawn = sample(logits.expand(count, -1), **options, **key)
    expected = exact(logits.double().numpy(), **options) * count
    observed = np.bincount(drawn.numpy(), minlength=len(logits))
    kept = expected > 0
    assert observed[~kept].sum() == 0
    assert (expected[kept] > 5).all()
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < CHI_SQUARE_999[kept.sum() - 2]


def kept_tokens(logits: list[float], **options) -> set[int]:
    """What the filters keep: at this temperature every such token is drawn sooner or later."""
    count = 2000
    row = torch.tensor(logits, dtype=torch.float64)
    return set(sample(row.expand(count, -1), **options).tolist())


class TestFilters:
    LOGITS = np.log([0.4, 0.2, 0.2, 0.1, 0.1]).tolist()

    @pytest.mark.parametrize(
        ("top_k", "kept"), [(1, {0}), (2, {0, 1, 2}), (3, {0, 1, 2}), (4, set(range(5)))]
    )
    def test_top_k_keeps_ties_of_its_last(self, top_k, kept):
        assert kept_tokens(self.LOGITS, top_k=top_k) == kept

    @pytest.mark.parametrize(
        ("top_p", "kept"),
        [(0.01, {0}), (0.39, {0}), (0.41, {0, 1, 2}), (0.79, {0, 1, 2}), (0.81, set(range(5)))],
    )
    def test_top_p_keeps_the_fewest_that_reach_it_and_ties(self, top_p, kept):
        assert kept_tokens(self.LOGITS, top_p=top_p) == kept

    @pytest.mark.parametrize(
        ("min_p", "kept"), [(0.24, set(range(5))), (0.26, {0, 1, 2}), (0.51, {0}), (1.0, {0})]
    )
    def test_min_p_is_relative_to_the_best(self, min_p, kept):
        assert kept_tokens(self.LOGITS, min_p=min_p) == kept

    def test_top_p_counts_after_top_k(self):
        # of the three kept, 0.4 is half; alone it would not reach 0.45
        assert kept_tokens(self.LOGITS, top_k=2, top_p=0.45) == {0}
        assert kept_tokens(self.LOGITS, top_p=0.45) == {0, 1, 2}

    def test_temperature_comes_before_top_p(self):
        assert kept_tokens([2.0, 0.0], top_p=0.8) == {0}
        assert kept_tokens([2.0, 0.0], top_p=0.8, temperature=4.0) == {0, 1}

    def test_all_equal(self):
        for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
            assert kept_tokens([1.0] * 5, **options) == set(range(5))

    def test_a_token_of_probability_zero_is_never_drawn(self):
        assert kept_tokens([0.0, -np.inf, 0.0]) == {0, 2}
        assert kept_tokens([0.0, -np.inf, 0.0], top_k=3, top_p=0.999) == {0, 2}


def test_temperature_zero_is_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 3.0]])
    assert sample(logits, temperature=0.0).tolist() == [1, 0, 3]
    assert sample(logits, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5).tolist() == [1, 0, 3]


def test_small_temperatures_approach_the_largest():
    logits = torch.randn(50, 20)
    assert torch.equal(sample(logits, temperature=1e-6), logits.argmax(-1))


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(data):
    """Mixed parameters, in any order and company, draw what each row draws alone."""
    count = data.draw(st.integers(1, 6))
    rows = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(count, 13, generator=rows)

    def column(strategy: st.SearchStrategy, dtype: torch.dtype) -> Tensor:
        values = data.draw(st.lists(strategy, min_size=count, max_size=count))
        return torch.tensor(values, dtype=dtype)

    options = {
        "temperature": column(st.sampled_from([0.0, 0.5, 1.0, 3.0]), torch.float64),
        "top_k": column(st.sampled_from([0, 1, 5, 99]), torch.int64),
        "top_p": column(st.sampled_from([0.2, 0.9, 1.0]), torch.float64),
        "min_p": column(st.sampled_from([0.0, 0.3]), torch.float64),
        "seed": column(st.integers(-(2**63), 2**63 - 1), torch.int64),
        "sample_index": column(st.integers(0, 1000), torch.int64),
        "position": column(st.integers(0, 1000), torch.int64),
    }
    together = ops.sample(logits, **options)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    shuffled = ops.sample(logits[order], **{name: v[order] for name, v in options.items()})
    assert torch.equal(shuffled, together[order])
    for i in range(count):
        alone = ops.sample(logits[i : i + 1], **{name: v[i : i + 1] for name, v in options.items()})
        assert alone.item() == together[i].item()


def test_penalties_as_defined():
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0], [2.0, -2.0, 0.5, 1.0]])
    in_context = torch.tensor([[True, True, True, False], [True, False, False, False]])
    in_text = torch.tensor([[False, False, False, True], [True, True, False, False]])
    repetition, presence = torch.tensor([4.0, 1.0]), torch.tensor([0.25, 0.5])
    out = ops.penalize(logits, in_context, in_text, repetition, presence)
    assert out.tolist() == [[0.5, -8.0, 0.0, 0.75], [1.5, -2.5, 0.5, 1.0]]


def make_draft(
    prompt: list[int], index: int = 0, seed: int = 0, vocab_limit: int = 99, **params
) -> Draft:
    request = Request(0, prompt, SamplingParams(**params), seed, 10, vocab_limit, None)
    return Draft(request, index)


def draw_for(logits: Tensor, *drafts: Draft) -> list[Draw]:
    return draw(logits, [draft.sampling() for draft in drafts])


class TestDraw:
    """From drafts to the arguments of the ops."""

    def test_every_parameter_reaches_the_draw(self):
        logits = torch.randn(6, 50)
        settings = [
            {"temperature": 0.0},
            {"temperature": 0.7, "seed": 5},
            {"temperature": 1.0, "top_k": 3, "seed": 2**64 - 1},
            {"temperature": 1.0, "top_p": 0.3, "index": 4},
            {"temperature": 1.0, "min_p": 0.6, "seed": 2**63},
            {"temperature": 1.0},
        ]
        drafts = [make_draft([1] * (i + 1), **s) for i, s in enumerate(settings)]
        drawn = [d.token for d in draw_for(logits, *drafts)]
        for i, s in enumerate(settings):
            s = dict(s)
            seed, index = signed(s.pop("seed", 0)), s.pop("index", 0)
            expected = sample(logits[i : i + 1], **s, seed=seed, sample_index=index, position=i + 1)
            assert drawn[i] == expected.item()

    def test_repetition_counts_prompt_and_text_presence_only_text(self):
        logits = torch.tensor([3.0, 2.9, 2.8, 2.0])
        repeating = make_draft([0], temperature=0.0, repetition_penalty=2.0)
        present = make_draft([0], temperature=0.0, presence_penalty=0.5)
        plain = make_draft([0], temperature=0.0)
        for expected in ([1, 0, 0], [2, 1, 0], [3, 2, 0]):
            drawn = draw_for(logits.expand(3, -1).clone(), repeating, present, plain)
            assert [d.token for d in drawn] == expected
            for draft, d in zip([repeating, present, plain], drawn, strict=True):
                draft.append(d)

    def test_logprobs_are_the_models_own(self):
        """Before penalties, temperature and filters."""
        logits = torch.randn(2, 9)
        options = {"temperature": 3.0, "top_k": 2, "repetition_penalty": 5.0, "logprobs": 4}
        drafts = [make_draft([1, 2], **options), make_draft([1], temperature=0.0)]
        with_logprobs, without = draw_for(logits, *drafts)
        expected = logits[0].double().log_softmax(-1)
        assert with_logprobs.logprob == expected[with_logprobs.token].item()
        best = expected.argsort(descending=True)[:4]
        assert list(with_logprobs.top_logprobs.items()) == [
            (i.item(), expected[i].item()) for i in best
        ]
        assert without.logprob is without.top_logprobs is None

    def test_more_logprobs_than_tokens(self):
        [drawn] = draw_for(torch.randn(1, 5), make_draft([1], logprobs=99))
        assert len(drawn.top_logprobs) == 5

    def test_tokens_beyond_the_tokenizer_are_never_drawn(self):
        logits = torch.tensor([[0.0, 0.0, 0.0, 50.0, 50.0]])
        for index in range(20):
            draft = make_draft([1], vocab_limit=3, index=index, temperature=1.0, logprobs=0)
            [drawn] = draw_for(logits, draft)
            assert drawn.token < 3
            assert drawn.logprob < -50  # of the model, which would have drawn another one

    def test_each_row_has_its_own_vocabulary(self):
        logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(3, -1)
        drafts = [make_draft([1], vocab_limit=limit, temperature=0.0) for limit in (2, 99, 1)]
        assert [d.token for d in draw_for(logits, *drafts)] == [1, 3, 0]

    def test_guesses_count_as_drawn(self):
        """The draw after guesses is that of a draft that had drawn them."""
        logits = torch.randn(1, 20)
        options = {
            "temperature": 1.0,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.7,
            "seed": 3,
        }
        drawn, guessed = make_draft([5, 6], **options), make_draft([5, 6], **options)
        for token in (7, 8, 5):
            drawn.append(Draw(token, None, None))
        assert guessed.sampling([7, 8, 5]) == drawn.sampling()
        assert draw(logits, [guessed.sampling([7, 8, 5])]) == draw_for(logits, drawn)

    def test_arguments_are_left_as_they_are(self):
        logits = torch.randn(1, 5)
        before = logits.clone()
        draw_for(logits, make_draft([1], vocab_limit=3, repetition_penalty=3.0))
        assert torch.equal(logits, before)

    def test_low_precision_is_penalized_in_float32(self):
        # in bfloat16 1.1 is 1.1015625, and the second logit would fall to the first
        logits = torch.tensor([[1.0078125, 1.109375]], dtype=torch.bfloat16)
        [drawn] = draw_for(logits, make_draft([1], temperature=0.0, repetition_penalty=1.1))
        assert drawn.token == 1

    def test_nan_is_an_error(self):
        logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
        with pytest.raises(RuntimeError, match="logits are NaN"):
            draw_for(logits, make_draft([1]), make_draft([1]))
