"""The heads of tasks give what transformers' do on the same weights: GPT2ForSequenceClassification and
GPT2ForTokenClassification.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from leangpt.finetune.modules import Classifier, Tagger, TaskModule
from leangpt.finetune.padding import IGNORED, PADDING
from leangpt.pretrained import load_model

transformers.logging.set_verbosity_error()

NUM_LABELS, PAD = 4, 60
LENGTHS = (3, 11, 7)


def build(kind: str, folder) -> transformers.PreTrainedModel:
    """A model of transformers whose every weight is random; the GPT-2 of it is in the folder."""
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, num_labels=NUM_LABELS, pad_token_id=PAD,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    model = getattr(transformers, f"GPT2For{kind}Classification")(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    base = transformers.GPT2LMHeadModel(config).double()
    base.transformer.load_state_dict(model.transformer.state_dict())
    base.save_pretrained(folder)
    return model


def padded(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    width = max(LENGTHS) + 2
    ends = [(0, width - len(r)) if side == "right" else (width - len(r), 0) for r in rows]
    return torch.stack([F.pad(r, end, value=value) for r, end in zip(rows, ends, strict=True)])


def logits_of(model: torch.nn.Module, texts: list[Tensor]) -> Tensor:
    """Padding is on the right, where it leaves the positions as they are."""
    mask = padded([torch.ones_like(text) for text in texts], 0)
    return model(padded(texts, PAD), attention_mask=mask).logits


def assert_same_gradients(ours: TaskModule, theirs: torch.nn.Module, head: str) -> None:
    expected = dict(theirs.named_parameters())
    assert ours.head is not None and ours.model.wpe is not None
    block = ours.model.blocks[0]
    for name, p in {
        f"{head}.weight": ours.head.weight,
        "transformer.wte.weight": ours.model.wte.weight,
        "transformer.wpe.weight": ours.model.wpe.weight,
        "transformer.h.0.attn.c_attn.bias": block.qkv.bias,
        "transformer.h.0.mlp.c_proj.bias": block.mlp_out.bias,
        "transformer.ln_f.weight": ours.model.norm_f.weight,
    }.items():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=0, atol=1e-10)


@pytest.fixture
def texts() -> list[Tensor]:
    return [torch.randint(PAD, (length,)) for length in LENGTHS]


@pytest.mark.parametrize("side", ["right", "left"])
def test_classifier(side, texts, tmp_path):
    theirs = build("Sequence", tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    ours = Classifier(model, NUM_LABELS, is_multi_label=False, class_weights=None)
    with torch.no_grad():
        ours.head.weight.copy_(theirs.score.weight)  # theirs has no bias; ours starts at 0
    tokens, labels = padded(texts, PADDING, side), torch.tensor([1, 3, 0])
    expected = logits_of(theirs, texts)
    torch.testing.assert_close(ours.scores(ours.last_hidden(tokens)), expected, rtol=0, atol=1e-10)
    F.cross_entropy(expected, labels).backward()
    ours(tokens, labels, "mean").backward()
    assert_same_gradients(ours, theirs, "score")


@pytest.mark.parametrize("side", ["right", "left"])
def test_tagger(side, texts, tmp_path):
    theirs = build("Token", tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    ours = Tagger(model, NUM_LABELS, class_weights=None)
    with torch.no_grad():
        ours.head.weight.copy_(theirs.classifier.weight)
        ours.head.bias.copy_(theirs.classifier.bias)
    tags = [torch.randint(NUM_LABELS, text.shape) for text in texts]
    expected = logits_of(theirs, texts)
    for text, row in zip(texts, expected, strict=True):
        actual = ours.scores(ours.hidden(text[None]))[0]
        torch.testing.assert_close(actual, row[: len(text)], rtol=0, atol=1e-10)
    F.cross_entropy(expected.flatten(0, 1), padded(tags, IGNORED).flatten()).backward()
    ours(padded(texts, PADDING, side), padded(tags, IGNORED, side), "mean").backward()
    assert_same_gradients(ours, theirs, "classifier")
