"""What needs no torch does not import it: a packed model generates without."""

import os
import subprocess
import sys

import pytest
import torch

from leangpt import GPT, Generator, GPTConfig, SamplingParams
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.kernels import decode

NO_TORCH = "import sys; assert 'torch' not in sys.modules, 'torch was imported'"


def run(program: str, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *argv],
        env={k: v for k, v in os.environ.items() if k != "LEANGPT_THREADS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import leangpt",
        "from leangpt import Generator, SamplingParams, Completion, GPTConfig",
        "import leangpt.kernels",
        "import leangpt.generation.chat, leangpt.data.tokenizer, leangpt.cli",
        "import leangpt.decoding.decoder, leangpt.decoding.choice",
    ],
)
def test_imports_without_torch(statement):
    run(f"{statement}; {NO_TORCH}")


def test_the_ops_are_there_when_they_are_used():
    run(
        "import leangpt.kernels as k; k.ops.linear, k.reference.linear, k.use_backend, k.log_backend"
    )
    run(
        "from leangpt.kernels import ops, reference, describe_backends; import sys; sys.modules['torch']"
    )
    with pytest.raises(AssertionError, match="has no attribute 'opps'"):
        run("import leangpt.kernels; leangpt.kernels.opps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, in_ci):
    if decode.unavailable_reason:
        assert not in_ci, f"CI must test the engine: {decode.unavailable_reason}"
        pytest.skip(decode.unavailable_reason)
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=16, max_seq_len=64))
    NativeDecoder.from_model(model, "int8").save(folder / "model.leangpt")
    ByteTokenizer().save(folder)
    return folder


class TestPacked:
    def test_it_generates_without_torch(self, folder):
        program = f"""
import sys
from leangpt import Generator, SamplingParams
for name in sys.argv[1:]:
    generator = Generator.from_pretrained(name, speculate=3)
    params = SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True, n=2)
    print([c.token_ids for c in generator.generate(["Once", "upon"], params)])
    generator.score("Once")
{NO_TORCH}
"""
        out = run(program, str(folder), str(folder / "model.leangpt")).splitlines()
        assert out[0] == out[1]
        decoder = NativeDecoder.from_packed(folder / "model.leangpt")
        params = SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True, n=2)
        expected = Generator(decoder, ByteTokenizer()).generate(["Once", "upon"], params)
        assert out[0] == str([c.token_ids for c in expected])

    def test_so_does_the_command_line(self, folder):
        program = f"""
import sys
from leangpt.cli import main
assert main(["generate", "x", "--model", sys.argv[1], "--max-new-tokens", "4", "--seed", "1"]) == 0
{NO_TORCH}
"""
        params = SamplingParams(max_new_tokens=4, seed=1)
        [completion] = Generator.from_pretrained(str(folder)).generate("x", params)
        assert run(program, str(folder)) == f"x{completion.text}\n"

    @pytest.mark.parametrize("options", [{"format": "int8"}, {"dtype": "float32"}], ids=str)
    def test_a_packed_file_is_what_it_is(self, folder, options):
        with pytest.raises(ValueError, match="is packed in a format of its own"):
            Generator.from_pretrained(str(folder / "model.leangpt"), **options)
        with pytest.raises(FileNotFoundError, match="must be a model"):  # there is nothing else
            Generator.from_pretrained(str(folder), **options)
