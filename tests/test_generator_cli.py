"""`leangpt generate`: formats, guessing ahead, progress."""

import json
import sys

import pytest
import torch

from leangpt import GPT, GPTConfig, cli
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.pretrained import save_pretrained

TINY = GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=16, max_seq_len=64)
SHORT = ["--max-new-tokens", "30", "--seed", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    save_pretrained(GPT(TINY), folder, ByteTokenizer())
    return str(folder)


def run(capsys, *argv):
    status = cli.main(["generate", *argv, *SHORT])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_speculation_leaves_the_text_as_it_is(model, capsys):
    # float64: there the batch does not show in the logits
    options = ["--model", model, "--json", "--dtype", "float64"]
    status, plain, _ = run(capsys, "ababab", *options)
    assert status == 0 and len(json.loads(plain)["token_ids"]) == 30
    assert run(capsys, "ababab", *options, "--speculate", "4") == (0, plain, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speculate", "-1"], "speculate must be at least 0, got -1"),
        (["--format", "int8", "--dtype", "float64"], "format='int8' needs the native decoder"),
    ],
    ids=str,
)
def test_refusals(model, capsys, options, message):
    status, out, err = run(capsys, "x", "--model", model, *options)
    assert (status, out) == (1, "")
    assert message in err and "Traceback" not in err


def test_many_prompts_on_a_terminal_show_progress(model, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts").write_text("ab\ncd\nef\n", encoding="utf-8")
    lines = ["--file", str(tmp_path / "prompts"), "--each-line", "--model", model]
    _, plain, err = run(capsys, *lines)
    assert err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run(capsys, *lines)
    assert (status, out) == (0, plain)
    assert "3/3" in err
    assert run(capsys, "ab", "--model", model)[2] == ""
