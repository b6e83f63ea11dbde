"""`leangpt evaluate`: the cost of weight formats; `leangpt export --format packed`."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native_helpers import dequantized, make_model
from train_helpers import make_data

from leangpt import GPT, Generator, GPTConfig, SamplingParams, cli, evaluate
from leangpt.data.batches import TokenDataset, evaluation_batches
from leangpt.data.tokenizer import ByteTokenizer, load_tokenizer
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.evaluate import EvaluationText
from leangpt.kernels import decode
from leangpt.pretrained import load_model, save_pretrained

pytestmark = pytest.mark.usefixtures("native_engine")

SHAPE = {"vocab_size": 257, "n_layer": 1, "n_head": 2, "n_embd": 32, "max_seq_len": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_pretrained(make_model(std=0.2, **SHAPE), folder, ByteTokenizer())
    return folder


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected_quality(model, rounded, windows):
    """Loss, KL and agreement, by torch in float64."""
    sums = np.zeros(3)
    for window in windows:
        tokens = torch.from_numpy(window)
        with torch.no_grad():
            p, q = (F.log_softmax(m.double()(tokens[None, :-1])[0], -1) for m in (model, rounded))
        sums += [
            F.nll_loss(q, tokens[1:], reduction="sum").item(),
            F.kl_div(q, p, log_target=True, reduction="sum").item(),
            (p.argmax(-1) == q.argmax(-1)).sum().item(),
        ]
    return sums / sum(len(window) - 1 for window in windows)


@pytest.mark.parametrize("logits_at_once", [2**22, 5 * 257], ids=["whole", "chunks"])
def test_figures_are_those_of_torch(logits_at_once, monkeypatch):
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", logits_at_once)
    model = make_model(std=0.2, **SHAPE)
    draw = np.random.default_rng(0)
    windows = [draw.integers(257, size=size) for size in (33, 33, 12)]
    text = EvaluationText(windows, bytes_per_token=2.5)
    rows = evaluate.evaluate(model, text, ["int8", "int4", "int8"])
    assert [row.format for row in rows] == ["fp32", "int8", "int4"]
    for row in rows:
        decoder = NativeDecoder.from_model(model.float(), row.format)
        loss, kl, agreement = expected_quality(model, dequantized(decoder), windows)
        # the cache of low-bit formats is in bfloat16
        tolerance = 1e-6 if row.format == "fp32" else 0.02
        assert row.kl == pytest.approx(
            kl, rel=tolerance, abs=1e-9 if row.format == "fp32" else 2e-4
        )
        assert math.log(row.perplexity) == pytest.approx(loss, rel=max(1e-6, tolerance / 10))
        assert row.bits_per_byte == pytest.approx(math.log2(row.perplexity) / 2.5)
        assert row.top_1_agreement == pytest.approx(agreement, abs=0.05)
        assert row.num_bytes == decoder.packed.num_bytes
    assert rows[0].kl == 0 and rows[0].top_1_agreement == 1
    assert rows[0].kl < rows[1].kl < rows[2].kl
    assert rows[0].num_bytes > rows[1].num_bytes > rows[2].num_bytes


def test_prepared_data_is_read_as_training_reads_it(model, data):
    text = evaluate.read_text(data, load_tokenizer(model), 16, 2)
    dataset = TokenDataset(data, "val")
    batches = list(evaluation_batches(dataset, 8, 16, 2))
    windows = torch.from_numpy(np.stack(text.windows))
    assert torch.equal(windows[:, :-1], torch.cat([tokens for tokens, _ in batches]))
    assert torch.equal(windows[:, 1:], torch.cat([targets for _, targets in batches]))
    assert text.bytes_per_token == dataset.bytes_per_token


def test_a_text_file_is_read_to_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10 + "é", encoding="utf-8")
    text = evaluate.read_text(tmp_path / "a.txt", ByteTokenizer(), 10, 1)
    assert [len(window) for window in text.windows] == [11, 11, 11, 2]
    assert text.num_targets == 31 and text.bytes_per_token == 1
    joined = [text.windows[0][0], *(token for window in text.windows for token in window[1:])]
    assert bytes(joined) == (tmp_path / "a.txt").read_bytes()
    assert len(evaluate.read_text(tmp_path / "a.txt", ByteTokenizer(), 2, 1).windows) == 8


def test_command(model, data, capsys):
    argv = [
        "evaluate",
        "--model",
        model,
        "--data",
        data,
        "--batches",
        "1",
        "--format",
        "int8, int4",
    ]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["format", "fp32", "int8", "int4"]
    rows = json.loads(run(capsys, *argv, "--json")[1])
    assert [row["format"] for row in rows] == ["fp32", "int8", "int4"]
    assert f"{rows[2]['perplexity']:.4f}" in out


class TestRefusals:
    def test_unknown_format(self, model, data, capsys):
        status, _, err = run(
            capsys, "evaluate", "--model", model, "--data", data, "--format", "int3"
        )
        assert status == 1 and "format must be fp32" in err and "'int3'" in err

    def test_another_tokenizer(self, model, data, capsys, tmp_path):
        manifest = json.loads((data / "manifest.json").read_text())
        manifest["tokenizer"]["fingerprint"] = "0" * 64
        for path in data.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        status, _, err = run(capsys, "evaluate", "--model", model, "--data", tmp_path)
        assert status == 1 and "must be prepared with the model's tokenizer" in err

    def test_no_engine(self, model, data, capsys, monkeypatch):
        monkeypatch.setattr(decode, "unavailable_reason", "not built")
        status, _, err = run(capsys, "evaluate", "--model", model, "--data", data)
        assert status == 1 and "the native decode engine is not built" in err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--batches", "0"], "batches must be positive, got 0"),
            (["--seq-len", "40"], "windows must have 2 to 33 tokens, got 41"),
            (["--data", "nowhere"], "no prepared data here"),
        ],
        ids=str,
    )
    def test_options(self, model, data, capsys, options, message):
        status, _, err = run(capsys, "evaluate", "--model", model, "--data", data, *options)
        assert status == 1 and message in err and "Traceback" not in err

    def test_damaged_weights(self):
        model = make_model(**SHAPE)
        model.norm_f.weight[3] = torch.nan
        with pytest.raises(ValueError, match="logits are NaN"):
            evaluate.evaluate(model, EvaluationText([np.arange(9)], 1.0), ["int8"])

    def test_a_token_that_the_model_does_not_have(self):
        with pytest.raises(ValueError, match="vocab_size \\(257\\), got 300"):
            text = EvaluationText([np.array([1, 300])], 1.0)
            evaluate.evaluate(make_model(**SHAPE), text, ["int8"])


class TestExport:
    PARAMS = SamplingParams(max_new_tokens=8, seed=1, ignore_eos=True)

    def test_a_packed_folder_generates_what_the_format_gives(self, model, capsys, tmp_path):
        argv = ["export", tmp_path / "out", "--model", model, "--format", "packed"]
        assert run(capsys, *argv, "--weights", "int4")[0] == 0
        assert {p.name for p in (tmp_path / "out").iterdir()} >= {
            "model.leangpt",
            "tokenizer_leangpt.json",
        }
        packed = Generator.from_pretrained(str(tmp_path / "out"))
        direct = Generator.from_pretrained(str(model), format="int4")
        assert packed.decoder.packed.format == direct.decoder.packed.format
        [a], [b] = (g.generate("abc", self.PARAMS) for g in (packed, direct))
        assert a.text == b.text
        assert run(capsys, *argv)[0] == 0  # again, in place of the old one: fp32
        assert str(Generator.from_pretrained(str(tmp_path / "out")).decoder.packed.format) == "fp32"

    def test_a_later_export_does_not_leave_the_packed_model(self, model, capsys, tmp_path):
        out = tmp_path / "out"
        assert run(capsys, "export", out, "--model", model, "--format", "packed")[0] == 0
        assert run(capsys, "export", out, "--model", model)[0] == 0
        assert not (out / "model.leangpt").exists() and (out / "config.json").exists()

    def test_a_chat_template_comes_along(self, model, capsys, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        tokenizers = pytest.importorskip("tokenizers")
        alphabet = {chr(ord("a") + i): i for i in range(26)} | {"<unk>": 26}
        kind = tokenizers.models.WordLevel(alphabet, unk_token="<unk>")
        tokenizers.Tokenizer(kind).save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'a' }}"}))
        save_pretrained(GPT(GPTConfig(**SHAPE)), source)
        assert (
            run(capsys, "export", tmp_path / "out", "--model", source, "--format", "packed")[0] == 0
        )
        assert Generator.from_pretrained(str(tmp_path / "out")).chat_template is not None

    def test_refusals(self, model, capsys, tmp_path):
        argv = ["export", tmp_path / "out", "--model", model]
        status, _, err = run(capsys, *argv, "--weights", "int4")
        assert status == 1 and "--weights is an option of --format packed" in err
        status, _, err = run(capsys, *argv, "--format", "packed", "--weights", "int5")
        assert status == 1 and "format must be fp32" in err and not (tmp_path / "out").exists()
        status, _, err = run(capsys, "export", model, "--model", model, "--format", "packed")
        assert status == 1 and "holds a model that is not packed" in err
        load_model(model)  # it is as it was
