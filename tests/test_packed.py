"""Packed model files: mapped back bit for bit, or refused with the reason."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from native_helpers import FORMATS, LLAMA, have_same_bits, make_model, text_of, whole

from leangpt import RopeScaling
from leangpt.decoding.native_decoder import NativeDecoder, pack_model
from leangpt.decoding.packed import MAGIC, PackedModel
from leangpt.decoding.weight_format import WeightFormat

pytestmark = pytest.mark.usefixtures("native_engine")

PREFIX = struct.Struct("<8sQ32s")  # magic, bytes of the header, its sha256
CONFIGS = {
    "gpt2": {"n_head": 2, "n_embd": 32},
    "odd": {"n_head": 3, "n_embd": 51, "n_inner": 77, "vocab_size": 131, "tie_embeddings": False},
    "llama": {
        **{"n_head": 4, "n_embd": 64, "n_kv_head": 2, "qk_norm": True, "qkv_bias": True, **LLAMA},
        "rope_scaling": RopeScaling("yarn", 4.0, original_max_seq_len=16),
    },
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.leangpt"
    NativeDecoder.from_model(make_model(**CONFIGS["gpt2"]), "int8").save(path)
    return path


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[PREFIX.size :][: PREFIX.unpack_from(data)[1]])


def write_header(path: Path, **changes) -> None:
    """Change the header, with the hash that it should have."""
    data = path.read_bytes()
    header = header_of(path)
    text = json.dumps({k: v for k, v in (header | changes).items() if v is not None}).encode()
    prefix = PREFIX.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text
    padding = bytes(-len(prefix) % 4096)
    path.write_bytes(prefix + padding + data[len(data) - header["data_bytes"] :])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


class TestRoundTrip:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("name", CONFIGS)
    def test_logits_have_the_same_bits(self, name, format, tmp_path):
        decoder = NativeDecoder.from_model(make_model(**CONFIGS[name]), format)
        path = tmp_path / "deep" / "model.leangpt"
        decoder.save(path)
        loaded = NativeDecoder.from_packed(path)
        assert loaded.config == decoder.config
        assert str(loaded.packed.format) == format
        text = text_of(30)
        assert have_same_bits(whole(loaded, text), whole(decoder, text))
        assert [p.name for p in path.parent.iterdir()] == ["model.leangpt"]

    def test_with_a_screen(self, tmp_path):
        packed = pack_model(make_model(**CONFIGS["gpt2"]), "bf16_screen")
        packed.save(tmp_path / "model.leangpt")
        loaded = PackedModel.load(tmp_path / "model.leangpt", verify=True)
        assert loaded.format.has_screen
        assert have_same_bits(loaded.memory, packed.memory)

    def test_it_is_mapped_not_copied(self, saved):
        """Memory that is a file's, shared with other processes and read when it is needed."""
        packed = PackedModel.load(saved)
        assert not packed.memory.flags.writeable
        maps = Path("/proc/self/smaps")
        if not maps.exists():
            pytest.skip("this system does not tell of mappings")
        address = packed.memory.ctypes.data
        mapped = [
            line.split() for line in maps.read_text().splitlines() if line.endswith(str(saved))
        ]
        ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
        assert any(first <= address < last for first, last in ranges)
        assert all(fields[1] == "r--s" for fields in mapped)

    def test_tensors_are_aligned(self, saved):
        packed = PackedModel.load(saved)
        assert all(packed.address(name) % 64 == 0 for name in packed.tensors)

    def test_a_second_process_reads_it(self, saved):
        text = text_of(20)
        program = (
            "import sys; from pathlib import Path; from leangpt.decoding.native_decoder import NativeDecoder\n"
            f"d = NativeDecoder.from_packed(Path(sys.argv[1])); text = {text}\n"
            "out = d.forward(text, [d.add_sequence()] * 20, range(20), range(20))\n"
            "assert 'torch' not in sys.modules\n"
            "print(out.tobytes().hex())"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, saved], capture_output=True, text=True, check=True
        )
        expected = whole(NativeDecoder.from_packed(saved), text)
        assert run.stdout.strip() == expected.tobytes().hex()

    def test_the_same_model_gives_the_same_file(self, saved, tmp_path):
        again = tmp_path / "again.leangpt"
        PackedModel.load(saved, verify=True).save(again)
        assert again.read_bytes() == saved.read_bytes()


class TestWriting:
    def test_a_full_disk_leaves_the_old_file(self, saved, monkeypatch):
        before = saved.read_bytes()

        def no_space(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            NativeDecoder.from_model(make_model(**CONFIGS["gpt2"]), "int4").save(saved)
        assert saved.read_bytes() == before
        assert list(saved.parent.iterdir()) == [saved]

    def test_a_kill_leaves_the_old_file(self, saved):
        before = saved.read_bytes()
        program = (
            "import os, sys; from pathlib import Path; from leangpt.decoding.packed import PackedModel\n"
            "packed = PackedModel.load(Path(sys.argv[1]))\n"
            "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
            "packed.save(Path(sys.argv[1]))"
        )
        run = subprocess.run([sys.executable, "-c", program, saved], check=False)
        assert run.returncode == -9
        assert saved.read_bytes() == before

    def test_a_file_in_use_may_be_replaced(self, saved):
        decoder = NativeDecoder.from_packed(saved)
        expected = whole(decoder, text_of(20))
        NativeDecoder.from_model(make_model(**CONFIGS["odd"])).save(saved)
        assert have_same_bits(whole(decoder, text_of(20)), expected)


class TestDamage:
    def refuses(self, path: Path, message: str, **options) -> None:
        with pytest.raises(ValueError, match=message) as error:
            PackedModel.load(path, **options)
        assert str(error.value).startswith(f"{path}: ")

    def test_cut_short(self, saved):
        data = saved.read_bytes()
        lengths = [
            0,
            1,
            7,
            8,
            15,
            16,
            47,
            48,
            49,
            500,
            4095,
            4096,
            4097,
            len(data) // 2,
            len(data) - 1,
        ]
        for length in lengths:
            saved.write_bytes(data[:length])
            self.refuses(saved, "cut short|not a packed|damaged")

    def test_overlong(self, saved):
        saved.write_bytes(saved.read_bytes() + b"\0")
        self.refuses(saved, "cut short or overlong")

    @pytest.mark.parametrize(
        "magic", [b"GGUF\x03\0\0\0", b"PK\x03\x04\0\0\0\0", b"LEANGPT\1"], ids=str
    )
    def test_of_another_kind(self, saved, magic):
        saved.write_bytes(magic + saved.read_bytes()[8:])
        self.refuses(saved, "not a packed leangpt model")

    @pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
    def test_absurd_length_of_the_header(self, saved, length):
        data = saved.read_bytes()
        saved.write_bytes(data[:8] + struct.pack("<Q", length) + data[16:])
        self.refuses(saved, "damaged")

    def test_any_flipped_byte_of_the_header(self, saved):
        data = saved.read_bytes()
        end = PREFIX.size + PREFIX.unpack_from(data)[1]
        for at in [*range(PREFIX.size), *range(PREFIX.size, end, 37)]:
            saved.write_bytes(data)
            flip(saved, at)
            self.refuses(saved, "not a packed|damaged")

    def test_a_flipped_byte_of_the_weights_is_found_when_asked_for(self, saved):
        packed = PackedModel.load(saved, verify=True)
        for at in (1, packed.num_bytes // 2, packed.num_bytes):
            data = saved.read_bytes()
            flip(saved, len(data) - at)
            PackedModel.load(saved)
            self.refuses(saved, "damaged: the weights do not have the hash", verify=True)
            saved.write_bytes(data)

    def test_of_another_version(self, saved):
        write_header(saved, version=header_of(saved)["version"] + 1)
        self.refuses(saved, "packed by another version of leangpt .*pack the model again")

    def test_tensors_that_are_not_those_of_the_config(self, saved):
        """Nothing of them is trusted: the engine reads where they say."""
        header = header_of(saved)
        tensors = header["tensors"]
        first = next(iter(tensors))
        config = header["config"]
        for change in (
            {"tensors": tensors | {first: [2**40, tensors[first][1]]}},
            {"tensors": tensors | {first: [tensors[first][0], 2**40]}},
            {"tensors": {k: v for k, v in tensors.items() if k != first}},
            {"tensors": tensors | {"more": [0, 64]}},
            {"tensors": {}},
            {"config": config | {"n_layer": 3}},
            {"config": config | {"vocab_size": 1 << 30}},
            {"config": config | {"tie_embeddings": False}},
            {"format": "int4"},
            {"format": "fp32"},
        ):
            write_header(saved, **header)
            write_header(saved, **change)
            self.refuses(saved, "damaged: its tensors are not those of its config")

    @pytest.mark.parametrize(
        "change",
        [
            {"config": None},
            {"format": None},
            {"tensors": None},
            {"data_bytes": None},
            {"version": None},
            {"rope_magnitude": None},
            {"rope_magnitude": "large"},
            {"format": "int5"},
            {"config": {"n_layer": -1}},
            {"config": {"depth": 3}},
            {"config": []},
            {"tensors": [1, 2]},
            {"data_bytes": "many"},
        ],
        ids=str,
    )
    def test_a_header_of_something_else(self, saved, change):
        write_header(saved, **change)
        self.refuses(saved, "damaged|another version|cut short")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            PackedModel.load(tmp_path / "none.leangpt")


class TestFormatNames:
    @pytest.mark.parametrize("name", [*FORMATS, "fp32_screen", "bf16_screen"])
    def test_names_come_back(self, name):
        assert str(WeightFormat.parse(name)) == name

    @pytest.mark.parametrize(
        ("name", "kind", "group", "is_asymmetric", "is_dynamic"),
        [
            ("fp32", "fp32", 0, False, False),
            ("int8", "int8", 0, False, False),
            ("int8_g64_dynamic", "int8", 64, False, True),
            ("int4", "int4", 32, False, False),
            ("int4_g32", "int4", 32, False, False),
            ("int4_asym_g128_dynamic", "int4", 128, True, True),
        ],
    )
    def test_meaning(self, name, kind, group, is_asymmetric, is_dynamic):
        assert WeightFormat.parse(name) == WeightFormat(kind, group, is_asymmetric, is_dynamic)
        assert WeightFormat.parse(name).digits == (1 if is_dynamic else 3)

    @pytest.mark.parametrize(
        "name",
        [
            *("", "fp16", "FP32", " fp32", "int8 ", "int8_g16", "int8_g", "int8_asym", "int4_g256"),
            *(
                "fp32_g32",
                "bf16_dynamic",
                "bf16_asym",
                "int8_screen",
                "int4_dynamic_g32",
                "int4_g32_asym",
                "int4\n",
            ),
        ],
    )
    def test_others_are_errors(self, name):
        with pytest.raises(ValueError, match="format must be fp32") as error:
            WeightFormat.parse(name)
        assert repr(name) in str(error.value)


def test_weights_lie_in_private_memory():
    """A mapping that could be shared, which Python's mmap makes by default, gets no huge pages."""
    packed = pack_model(make_model(), "int8")
    address = packed.memory.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            assert permissions.endswith("p")
            return
    raise AssertionError("the weights lie in no mapping of this process")
