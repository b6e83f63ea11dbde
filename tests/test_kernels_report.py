"""`leangpt kernels`: what compiled kernels are said to be, and that a worse one is noticed."""

import json
import re
import sys
from types import MappingProxyType

import pytest
import torch
import triton
import triton.language as tl

from leangpt import cli, kernel_report
from leangpt.kernels import contract, cuda_report, sass, triton_ops
from leangpt.kernels.chips import CHIPS, predicted_bound
from leangpt.kernels.triton_recorder import Recorder, num_bytes
from leangpt.kernels.triton_report import Case, Empty, report, versions


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, y_ptr, K, stride,
    USE_DOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK)[:, None]
    sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + rows * stride + ks)
        w = tl.load(w_ptr + rows * stride + ks)
        if USE_DOT:
            sums = tl.dot(x, w.T, sums)
        else:
            sums += tl.sum(x[:, None, :].to(tl.float32) * w[None, :, :], 2)
    tl.store(y_ptr + rows * BLOCK + tl.arange(0, BLOCK)[None, :], sums.to(tl.bfloat16))


@triton.autotune([triton.Config({"BLOCK": n}) for n in (16, 32)], key=["stride"])
@triton.jit
def _tuned_copy_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols * stride, tl.load(x_ptr + cols * stride))


def product(size=64, use_dot=True, stride=128, **options):
    """A case of one kernel; the options are Triton's."""

    def function(x, w):
        y = torch.empty(size, size, dtype=torch.bfloat16)
        _product_kernel[(1,)](
            x, w, y, x.shape[1], stride, USE_DOT=use_dot, BLOCK=size, BLOCK_K=32, **options
        )

    matrix = Empty((size, 128), strides=(stride, 1))
    return Case("tiny", "product", function, (matrix, matrix), flops=2.0 * 128 * size * size)


def kernels(case, arch="sm_80"):
    return kernel_report.by_name(report([case], [arch]))


class TestCode:
    def test_parser(self):
        resources = " Function f:\n  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:408 TEXTURE:0\n"
        listing = """
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/             @!UP1 LDGSTS.E.BYPASS.LTC128B.128 [R3], [R2.64] ;
        /*0040*/                   LDG.E.U16 R6, [R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/              @P2  STG.E.64 [R2.64], R4 ;
        /*0080*/                   STL.64 [R1], R4 ;
        /*0090*/                   LDL R4, [R1] ;
        /*10a0*/                   UTMALDG.2D [UR8], [UR4] ;
.L_x_128:
        /*10b0*/                   BRA `(.L_x_128);
"""
        assert sass.parse(resources, listing) == sass.Code(
            registers=40,
            local_bytes=8,
            spills=2,
            tensor_cores={"HMMA": 1},
            loads={"128": 2, "32": 1, "16": 1},
            stores={"64": 1},
            copies={"cp.async": 1, "TMA": 1},
        )

    @pytest.mark.parametrize(("arch", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])  # fmt: skip
    def test_each_architecture_has_its_tensor_cores(self, arch, instruction):
        [row] = report([product()], [arch])
        assert row.figures["tensor_cores"].keys() == {instruction}
        assert row.figures["loads"].keys() == row.figures["stores"].keys() == {"128"}
        assert row.figures["copies"].keys() == {"cp.async"} and row.figures["spills"] == 0
        assert row.figures["shared_bytes"] >= 2 * 64 * 32 * 2
        assert row.constants == {"USE_DOT": True, "BLOCK": 64, "BLOCK_K": 32}
        assert row.name == "tiny product forward _product_kernel"


class TestContract:
    """Each plant makes a kernel worse in one way."""

    @pytest.fixture
    def agreed(self):
        return kernels(product())

    def test_the_same_kernel_is_no_difference(self, agreed):
        assert contract.differences(agreed, kernels(product())) == []

    @pytest.mark.parametrize(
        ("plant", "words"),
        [
            ({"maxnreg": 32}, ("spills 0 -> ", "local_bytes 0 -> ")),
            ({"use_dot": False, "size": 16}, ("no HMMA any more",)),
            ({"stride": 129}, ("narrower loads", "no cp.async any more")),
            ({"size": 128, "num_warps": 4}, ("occupancy", "registers")),
        ],
        ids=str,
    )
    def test_a_worse_kernel_is_told(self, agreed, plant, words):
        lines = contract.differences(agreed, kernels(product(**plant)))
        for word in words:
            assert any(
                line.startswith("tiny product forward _product_kernel sm_80: ") and word in line
                for line in lines
            ), lines

    def test_some_narrow_accesses_among_wide_ones(self):
        row = {**self.row(), "loads": {"128": 8}}
        found = contract.differences({"k": {"a": row}}, {"k": {"a": row | {"loads": {"128": 8, "16": 4}}}})  # fmt: skip
        assert found == ["k a: narrower loads, bits: number {'128': 8} -> {'128': 8, '16': 4}"]

    @staticmethod
    def row():
        [[row]] = [list(archs.values()) for archs in kernels(product()).values()]
        return row

    def test_only_what_has_changed_is_compiled(self, agreed, monkeypatch):
        """Another kernel, option or architecture, and figures that somebody wrote."""
        monkeypatch.delattr(triton, "compile")
        assert kernel_report.by_name(report([product()], ["sm_80"], agreed)) == agreed
        [[name, rows]] = agreed.items()
        written = {name: {"sm_80": rows["sm_80"] | {"registers": 8}}}
        moved = {name: {"sm_90": rows["sm_80"]}}
        for case, arch, contract_ in (
            (product(stride=129), "sm_80", agreed),
            (product(num_warps=8), "sm_80", agreed),
            (product(), "sm_80", written),
            (product(), "sm_90", moved),
        ):
            with pytest.raises(AttributeError, match="compile"):
                report([case], [arch], contract_)

    def test_better_is_no_difference(self):
        row = self.row()
        better = row | {"registers": row["registers"] - 8, "copies": row["copies"] | {"TMA": 1}}
        assert contract.differences({"k": {"a": row}}, {"k": {"a": better}}) == []

    def test_new_and_gone(self):
        assert contract.differences({"k": {"a": {}}}, {"l": {"a": {}}}) == ["k a: gone", "l a: new"]

    def test_other_versions_are_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(contract, "PATH", tmp_path / "contract.json")
        contract.save({"triton": "3.7.1"}, {"k": {"a": {}, "b": {}}, "l": {"a": {}}})
        assert contract.load({"triton": "3.7.1"}) == {"k": {"a": {}, "b": {}}, "l": {"a": {}}}
        with pytest.raises(ValueError, match="of triton 3.7.1, and this is triton 3.8.0"):
            contract.load({"triton": "3.8.0"})


class TestRecorder:
    def test_nothing_is_computed(self):
        """10^13 multiplications would be noticed."""
        torch.use_deterministic_algorithms(False)  # which would write the memory
        recorder = Recorder("sm_90")
        with recorder.recording():
            a = torch.empty(20_000, 20_000)
            b = (a @ a).sum()
            b.add_(1)
        assert b.shape == () and recorder.library_products == 1
        # the product has two operands and a result, the sum one operand and a result, and so has the last
        assert recorder.num_bytes == 4 * (3 * a.numel() + a.numel() + 1 + 1)

    def test_broadcast_dimensions_count_once(self):
        assert num_bytes((torch.empty(1, 8).expand(4, 8), [torch.empty(3)], None, 5)) == 4 * (8 + 3)

    def test_every_configuration_of_an_autotuned_kernel(self):
        """None is timed, and nothing of it stays in Triton's memory of what was fastest."""
        case = Case("tiny", "copy", lambda x, y: _tuned_copy_kernel[(1,)](x, y, 1), (Empty((32,)),) * 2)  # fmt: skip
        rows = report([case], ["sm_80"])
        assert [row.kernel for row in rows] == [
            f"_tuned_copy_kernel configuration {i}" for i in (1, 2)
        ]
        assert [row.constants["BLOCK"] for row in rows] == [16, 32]
        assert _tuned_copy_kernel.cache == {}

    def test_triton_is_as_before(self):
        before = triton.runtime.driver._active
        with pytest.raises(ZeroDivisionError), Recorder("sm_90").recording():
            assert triton.runtime.driver.active.get_current_target().arch == 90
            raise ZeroDivisionError
        assert triton.runtime.driver._active is before
        assert triton.knobs.runtime.jit_cache_hook is None


class TestChips:
    @pytest.mark.parametrize(
        ("needs", "blocks"),
        [
            ((32, 0, 4), 16),  # 64 warps
            ((255, 0, 4), 2),  # 65536 registers
            ((32, 80 * 1024, 4), 2),  # 164 KB of shared memory
            ((32, 164 * 1024, 4), 0),
        ],
        ids=str,
    )
    def test_blocks_per_sm(self, needs, blocks):
        assert CHIPS["sm_80"].blocks_per_sm(*needs) == blocks

    def test_tensor_memory_counts(self):
        assert CHIPS["sm_100"].blocks_per_sm(32, 0, 4, tensor_memory_columns=256) == 2

    def test_predicted_bound(self):
        a100 = CHIPS["sm_80"]
        assert predicted_bound(0, 1e9, a100) == "memory"
        assert predicted_bound(312e9, 2039e6, a100).startswith("memory (tensor cores 100%)")
        assert predicted_bound(312e9, 1019.5e6, a100) == "tensor cores (memory 50%)"


class TestCommand:
    @pytest.fixture(autouse=True)
    def _one_small_kernel(self, monkeypatch, tmp_path):
        monkeypatch.setattr(kernel_report, "cases", lambda: [product()])
        monkeypatch.setattr(contract, "PATH", tmp_path / "contract.json")
        for name, value in {"obstacle": None, "version": "13.0.0", "report": []}.items():
            monkeypatch.setattr(cuda_report, name, lambda *_, value=value: value)

    def run(self, capsys, *argv):
        status = cli.main(["kernels", *argv])
        return status, *capsys.readouterr()

    def test_report(self, capsys):
        status, out, _ = self.run(capsys, "report", "--arch", "sm_80, sm_120")
        assert status == 0 and "tiny product forward: 0.0 GFLOP" in out
        assert "A100 by memory" in out and "RTX 5090" in out and "0 spills" in out
        assert "no measured speed" in " ".join(out.split())

    def test_json(self, capsys):
        document = json.loads(self.run(capsys, "report", "--arch", "sm_80", "--json")[1])
        assert document["versions"] == versions() | {"nvcc": "13.0.0"} and document["cuda"] == []
        [row] = document["rows"]
        assert row["kernel"] == "_product_kernel" and row["arch"] == "sm_80"
        assert row["registers"] > 0 and row["tensor_cores"]["HMMA"] > 0
        assert row["predicted_bound"].startswith("memory")

    def test_check_and_update(self, capsys, monkeypatch):
        assert self.run(capsys, "update")[0] == 0
        status, out, _ = self.run(capsys, "check")
        assert status == 0 and "4 kernels and architectures are as" in out and "changed" not in out
        assert "4 kernels" in self.run(capsys, "check", "--anew")[1]
        monkeypatch.setattr(kernel_report, "cases", lambda: [product(num_stages=4)])
        assert "1 of them have changed" in self.run(capsys, "check", "--arch", "sm_80")[1]
        monkeypatch.setattr(kernel_report, "cases", lambda: [product(maxnreg=32)])
        status, out, err = self.run(capsys, "check", "--arch", "sm_80")
        assert status == 1 and "sm_80: spills 0 -> " in out and "sm_90" not in out
        assert "accept them with `leangpt kernels update`" in err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["report", "--arch", "sm_75"], "arch must be one of sm_80, sm_90, sm_100, sm_120"),
            (["update", "--arch", "sm_80"], "leave out --arch"),
            (["check", "--arch", "sm_80"], "contract.json"),
        ],
        ids=str,
    )
    def test_refuses(self, argv, message, capsys):
        status, _, err = self.run(capsys, *argv)
        assert status == 1 and message in err and "Traceback" not in err

    def test_without_triton_it_says_what_to_install(self, capsys, monkeypatch):
        monkeypatch.delattr("leangpt.kernel_report")
        monkeypatch.setitem(sys.modules, "leangpt.kernel_report", None)
        error = ModuleNotFoundError("No module named 'triton'", name="triton")

        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "leangpt.kernel_report":
                    raise error

        monkeypatch.delitem(sys.modules, "leangpt.kernel_report")
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        status, _, err = self.run(capsys, "report")
        assert status == 1 and "pip install triton" in err


class TestCuda:
    @pytest.fixture
    def figures(self):
        return {
            (name, arch): row
            for name, archs in json.loads(contract.PATH.read_text(encoding="utf-8"))[
                "kernels"
            ].items()
            for arch, row in archs.items()
            if name.startswith(cuda_report.PREFIX)
        }

    def test_every_file_is_in_the_contract(self, figures):
        sources = {path.name for path in cuda_report.CSRC.glob("cuda/*.cu")}
        assert {name.split()[1] for name, _ in figures} == sources
        assert {arch for _, arch in figures} == set(CHIPS)

    def test_bars(self, figures):
        """No spills; products on tensor cores, with copies and accesses as wide as there are."""
        for key, row in figures.items():
            assert row["spills"] == row["local_bytes"] == 0, key
            assert row["blocks_per_sm"], key
            if re.search("split_k_kernel|tile_kernel|attend_kernel", key[0]):
                assert row["tensor_cores"].keys() == {"HMMA"}, key
                assert row["copies"]["cp.async"] and row["loads"]["128"] > 8, key

    def test_a_kernel(self, monkeypatch):
        if cuda_report.obstacle():
            pytest.skip(str(cuda_report.obstacle()))
        found = cuda_report._compile(cuda_report.CSRC / "cuda" / "layer_norm.cu", "sm_80")
        assert [kernel.name for kernel in found] == [
            f"cuda layer_norm.cu normalize_kernel<{dtype}>" for dtype in ("float", "unsigned short")
        ]
        figures = found[0].figures
        assert figures["num_warps"] == 8 and figures["registers"] > 16 and figures["spills"] == 0
        assert list(figures["loads"]) == ["128", "32"] and list(figures["stores"]) == ["128"]
        agreed = kernel_report.by_name(found)
        monkeypatch.delattr(cuda_report, "kept")  # which compiles
        source = cuda_report.CSRC / "cuda" / "layer_norm.cu"
        assert kernel_report.by_name(cuda_report._compile(source, "sm_80", agreed)) == agreed
        with pytest.raises(NameError, match="kept"):
            cuda_report._compile(source, "sm_90", agreed)

    def test_without_nvcc_they_are_left_out(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr(kernel_report, "cases", lambda: [product()])
        monkeypatch.setattr(contract, "PATH", tmp_path / "contract.json")
        kernels = kernel_report.by_name(report([product()], ["sm_80"]))
        contract.save(versions() | {"nvcc": "13.0.0"}, kernels | {"cuda a.cu f": {"sm_80": {}}})
        monkeypatch.setattr(cuda_report, "_nvcc", lambda: None)
        assert cli.main(["kernels", "check", "--arch", "sm_80"]) == 0
        assert "CUDA kernels are left out: there is no nvcc" in capsys.readouterr().out
        assert cli.main(["kernels", "update"]) == 1
        assert "the contract has the CUDA kernels too" in capsys.readouterr().err


class TestBars:
    """What the contract says of the kernels as they are."""

    PRODUCTS = ("_attention_", "_linear_kernel", "_mlp_bwd_kernel", "_add_weight_gradient_kernel")
    TENSOR_CORES = MappingProxyType(
        {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
    )
    # a program stores one row or one token, which is less than 16 bytes a thread
    NARROW_STORES = ("_block_sums_kernel", "_segment_sums_kernel", "_sample_kernel")
    # GPT-2 has an odd number of tokens: rows of logits begin anywhere
    NARROW_LOADS = ("gpt2 sample forward _sample_kernel",)

    @pytest.fixture
    def figures(self):
        document = json.loads(contract.PATH.read_text(encoding="utf-8"))
        return {
            (name, arch): row
            for name, archs in document["kernels"].items()
            for arch, row in archs.items()
            if not name.startswith(cuda_report.PREFIX)
        }

    def test_every_op_is_in_it(self, figures):
        ops = {name.split()[1] for name, _ in figures}
        assert ops == set(triton_ops.__all__)
        assert {arch for _, arch in figures} == set(CHIPS)

    def test_no_spills(self, figures):
        """But for sm_120, which is listed without a bar."""
        spilled = [key for key, row in figures.items() if row["spills"] or row["local_bytes"]]
        assert [key for key in spilled if key[1] != "sm_120"] == []

    def test_tensor_cores_in_every_product(self, figures):
        products = {key: row for key, row in figures.items() if any(p in key[0] for p in self.PRODUCTS)}  # fmt: skip
        for (name, arch), row in products.items():
            assert row["tensor_cores"].keys() == {self.TENSOR_CORES[arch]}, (name, arch)
            assert row["copies"], (name, arch)
        ops = {name.split()[1] for name, _ in products}
        assert ops >= {"attention", "attention_varlen", "linear", "mlp", "linear_cross_entropy"}

    def test_wide_accesses_where_memory_is_the_bound(self, figures):
        for (name, arch), row in figures.items():
            if row["tensor_cores"]:
                continue
            if name not in self.NARROW_LOADS:
                assert "128" in row["loads"] or "256" in row["loads"], (name, arch)
            if not any(kernel in name for kernel in self.NARROW_STORES):
                assert "128" in row["stores"] or "256" in row["stores"], (name, arch)

    def test_every_kernel_fits(self, figures):
        assert [key for key, row in figures.items() if not row["blocks_per_sm"]] == []
