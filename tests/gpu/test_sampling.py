"""`sample` on Triton draws the tokens of the reference: any logits and settings, and what only float64 can tell apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from leangpt.kernels import ops, reference, use_backend

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pick(count: int, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (count,))]


def random_options(count: int, vocab_size: int) -> dict[str, Tensor]:
    """Any combination of filters, some of them off."""
    top_k = torch.randint(1, vocab_size + 3, (count,)) * torch.randint(2, (count,))
    top_p = torch.where(torch.rand(count) < 0.5, 1.0, torch.rand(count, dtype=torch.float64))
    return {
        "temperature": pick(count, 0.0, 1e-3, 0.3, 1.0, 1.0, 3.0, 100.0),
        "top_k": top_k,
        "top_p": top_p,
        "min_p": pick(count, 0.0, 0.0, 1e-6, 0.05, 0.5, 1.0),
        "seed": torch.randint(-(2**63), 2**63 - 1, (count,)),
        "sample_index": torch.randint(2**32, (count,)),
        "position": torch.randint(2**32, (count,)),
    }


def plain_options(count: int) -> dict[str, Tensor]:
    """No filter, temperature 1."""
    off = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    values = {name: torch.full((count,), v, dtype=torch.float64) for name, v in off.items()}
    return random_options(count, 1) | values | {"top_k": values["top_k"].long()}


def draw(logits: Tensor, options: dict[str, Tensor], backend: str = "triton") -> list[int]:
    with use_backend(backend):  # type: ignore[arg-type]
        arguments = {name: value.to(DEVICE) for name, value in options.items()}
        return ops.sample(logits.to(DEVICE), **arguments).tolist()


def check_draws(logits: Tensor, options: dict[str, Tensor]) -> list[int]:
    tokens = draw(logits, options)
    assert tokens == draw(logits, options, "reference")
    return tokens


@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "equal", "masked"])
@pytest.mark.parametrize("vocab_size", [2, 7, 100, 1023])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_draws_are_those_of_the_reference(dtype, vocab_size, kind):
    torch.manual_seed(vocab_size)
    count = 25
    logits = 3 * torch.randn(count, vocab_size)
    if kind == "peaked":
        logits[torch.arange(count), torch.randint(vocab_size, (count,))] += 30
    elif kind == "ties":
        logits = logits.round()
    elif kind == "equal":
        logits[:] = 1.5
    elif kind == "masked":
        logits[torch.rand(logits.shape) < 0.7] = -torch.inf  # sometimes a whole row
    check_draws(logits.to(dtype), random_options(count, vocab_size))


@pytest.mark.parametrize(
    ("dtype", "vocab_size"), [(BF16, 1025), (BF16, 2064), (BF16, 50257), (FP32, 50257)]
)
def test_large_vocabularies(dtype, vocab_size):
    count = 4
    options = random_options(count, vocab_size)
    options["temperature"] = torch.tensor([0.0, 0.8, 1.0, 2.0], dtype=torch.float64)
    options["top_k"] = torch.tensor([0, 50, 0, 40_000])
    options["top_p"] = torch.tensor([1.0, 1.0, 0.9, 0.5], dtype=torch.float64)
    check_draws((2 * torch.randn(count, vocab_size)).to(dtype), options)


def test_noise_of_every_token_is_that_of_the_reference():
    """Equal logits: the token of least noise is drawn, which is another one for each row."""
    tokens = check_draws(torch.zeros(8, 50257), plain_options(8))
    assert len(set(tokens)) == 8


@pytest.mark.parametrize("filter_", ["top_k", "top_p", "min_p"])
def test_filters_that_end_at_the_token_that_would_be_drawn(filter_):
    """That token is the last one kept or the first one not: the filter differs by 1e-9 only."""
    count = 40
    logits, options = torch.randn(count, 1003), plain_options(count)
    tokens = torch.tensor(draw(logits, options))[:, None]
    wide = logits.double()
    of_token = wide.gather(1, tokens)
    reaches, exceeds = wide >= of_token, wide > of_token
    probability = wide.softmax(-1)
    if filter_ == "top_k":
        last, first = reaches.sum(-1), exceeds.sum(-1)
    elif filter_ == "top_p":
        last = (probability * reaches).sum(-1) * (1 - 1e-9)
        first = (probability * exceeds).sum(-1) * (1 - 1e-9)
    else:
        ratio = (of_token.squeeze(1) - wide.amax(-1)).exp()
        last, first = ratio * (1 - 1e-9), ratio * (1 + 1e-9)
    can_leave = exceeds.any(-1)  # the best token always stays
    assert check_draws(logits, options | {filter_: last}) == tokens.flatten().tolist()
    others = check_draws(logits[can_leave], {n: v[can_leave] for n, v in (options | {filter_: first}).items()})  # fmt: skip
    assert (torch.tensor(others) != tokens.flatten()[can_leave]).all()


def test_draws_that_only_float64_tells_apart():
    """The second token of each row is lifted to the first, to within one rounding of its logit, or one to either side."""
    count, vocab_size = 60, 1003
    options = plain_options(count)
    noise = reference.exponential_noise(
        vocab_size, options["seed"], options["sample_index"], options["position"]
    )
    (first, second), index = (values.unbind(-1) for values in (-noise.log()).topk(2))
    logits = torch.zeros(count, vocab_size)
    lift = (first - second).float()
    lift[::3] = torch.nextafter(lift[::3], torch.tensor(9.0))
    lift[1::3] = torch.nextafter(lift[1::3], torch.tensor(0.0))
    rows = torch.arange(count)
    logits[rows, index[1]] = lift
    drawn = torch.tensor(check_draws(logits, options))
    assert 0 < (drawn == index[0]).sum() < count


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    values=st.lists(
        st.sampled_from((0.0, -0.0, 1e-40, 1.0, 1 + 2**-23, -1.0, 3e38, -3e38, 88.0, -104.0)),
        min_size=2,
        max_size=15,
    ),
    seed=st.integers(0, 2**32),
)
def test_any_logits(values, seed):
    """Subnormal, huge, and those whose differences are near the threshold of a filter."""
    torch.manual_seed(seed)
    check_draws(torch.tensor(values).repeat(3, 1), random_options(3, len(values)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(value):
    """NaN and infinity are drawn whatever the settings, as torch's argmax has it; -infinity never is."""
    logits = torch.randn(30, 35)
    logits[torch.arange(30), torch.arange(30)] = value
    tokens = check_draws(logits, random_options(30, 35))
    assert [token == row for row, token in enumerate(tokens)] == [value != -torch.inf] * 30


def test_one_token_and_no_rows():
    assert check_draws(torch.randn(5, 1), random_options(5, 1)) == [0] * 5
    assert draw(torch.randn(0, 7), plain_options(0)) == []


def test_any_strides_and_float32_settings():
    options = random_options(6, 33)
    wide = torch.randn(6, 70).to(DEVICE)
    check_draws(wide[:, ::2][:, :33], options)
    check_draws(torch.randn(33, 6).to(DEVICE).t(), options)
    same = {name: value[:1].expand(6) for name, value in options.items()}
    assert len(set(check_draws(wide[:1, :33].repeat(6, 1), same))) == 1
    narrow = {n: v.float() if v.is_floating_point() else v for n, v in options.items()}
    check_draws(wide[:, 5:38], narrow)


def test_opcheck():
    arguments = (torch.randn(4, 7), *random_options(4, 7).values())
    arguments = tuple(argument.to(DEVICE) for argument in arguments)
    torch.library.opcheck(torch.ops.leangpt_triton.sample, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    logits, options = torch.randn(5, 7), random_options(5, 7)

    @torch.compile(fullgraph=True, backend=backend)
    def step(logits, options):
        return ops.sample(2 * logits, **options)

    expected = draw(2 * logits, options)
    with use_backend("triton"):
        arguments = {name: value.to(DEVICE) for name, value in options.items()}
        assert step(logits.to(DEVICE), arguments).tolist() == expected


def test_fake_tensors():
    with FakeTensorMode(), use_backend("triton"):
        options = {
            name: torch.empty(4, dtype=value.dtype, device="cuda")
            for name, value in random_options(1, 7).items()
        }
        tokens = ops.sample(torch.empty(4, 7, dtype=BF16, device="cuda"), **options)
        assert (tokens.shape, tokens.dtype, tokens.device.type) == ((4,), torch.int64, "cuda")
