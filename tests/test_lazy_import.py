"""What needs no torch does not import it: a packed model generates without."""

import os
import subprocess
import sys

import pytest

from leangpt.data.tokenizer import ByteTokenizer

NO_TORCH = "import sys; assert 'torch' not in sys.modules, 'torch was imported'"
# stands for the native decoder, whatever it is built on
FAKE_DECODER = """
import sys, types
from leangpt import GPTConfig
from leangpt.sampling import Draw

class NativeDecoder:
    config = GPTConfig(vocab_size=257, max_seq_len=99)
    kv_block_size, num_blocks = 16, 20
    def from_packed(path):
        print(path.name)
        return NativeDecoder()
    def add_sequence(self): return 1
    def fork(self, sequence): return 2
    def truncate(self, sequence, length): pass
    def drop(self, sequence): pass
    def forward(self, *_): raise AssertionError
    def sample(self, tokens, sequences, positions, output_rows, rows):
        return [Draw(97, None, None) for _ in rows]

sys.modules["leangpt.native_decoder"] = types.SimpleNamespace(NativeDecoder=NativeDecoder)
"""


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
        "import leangpt.chat, leangpt.data.tokenizer, leangpt.cli",
        "import leangpt.decoder, leangpt.decoder_choice",
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


class TestPacked:
    @pytest.fixture
    def folder(self, tmp_path):
        ByteTokenizer().save(tmp_path)
        (tmp_path / "model.leangpt").touch()
        return tmp_path

    def test_it_generates_without_torch(self, folder):
        program = f"""{FAKE_DECODER}
from leangpt import Generator, SamplingParams
for name in sys.argv[1:]:
    generator = Generator.from_pretrained(name, speculate=3)
    params = SamplingParams(max_new_tokens=4, n=2)
    print(generator.generate(["Once", "upon"], params)[0].text)
{NO_TORCH}
"""
        out = run(program, str(folder), str(folder / "model.leangpt"))
        assert out == "model.leangpt\naaaa\n" * 2

    def test_so_does_the_command_line(self, folder):
        program = f"""{FAKE_DECODER}
from leangpt.cli import main
assert main(["generate", "x", "--model", sys.argv[1], "--max-new-tokens", "4"]) == 0
{NO_TORCH}
"""
        assert run(program, str(folder)) == "model.leangpt\nxaaaa\n"

    @pytest.mark.parametrize(
        "options", ['format="int8"', 'dtype="float32"', 'device="cuda"'], ids=str
    )
    def test_a_packed_file_is_what_it_is(self, folder, options):
        program = f"""{FAKE_DECODER}
from leangpt import Generator
try:
    Generator.from_pretrained(sys.argv[1], {options})
except ValueError as error:
    assert "is packed, for the CPU and in a format of its own" in str(error), error
else:
    raise AssertionError
"""
        run(program, str(folder / "model.leangpt"))
