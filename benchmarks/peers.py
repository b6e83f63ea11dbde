"""Decode engines behind one interface, each run as a process of its own: this project's, and its peers.

    python benchmarks/peers.py list                             the engines that this Python has, as JSON
    python benchmarks/peers.py prepare ENGINE VARIANT FOLDER    convert FOLDER/hf (a Hugging Face GPT-2) for a peer
    python benchmarks/peers.py serve ENGINE VARIANT FOLDER      answer requests, JSON lines, until the input ends

`bench_decode.py` starts it, with the Python that a peer is installed in: it needs nothing of this project but the module
`leangpt` for the project's own engine. Every engine gets the same tokens, draws greedily and never stops early.

A request is {"prompts": [[token, ...], ...], "new": [tokens, ...], "ragged": bool}, an answer {"ttft_s", "decode_s", "tokens"}.
Prompts that are not ragged have one length, and run as one batch; ragged ones are many, and run as the engine sees fit.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]
Answer = tuple[
    float, float, list[list[int]]
]  # seconds to the first tokens, seconds after them, new tokens

MAX_RUNNING = 32  # sequences of a ragged batch that run together


def resident_mb() -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Engine(Protocol):
    """A loaded model of one variant."""

    weight_bytes: int  # what decoding one token reads of the weights

    def generate(self, prompts: Prompts, new: int) -> Answer:
        """A batch of prompts of one length, `new` tokens for each."""
        ...

    def generate_ragged(self, prompts: Prompts, new: Sequence[int]) -> list[list[int]]:
        """Many prompts of several lengths, and as many new tokens for each as `new` says."""
        ...


class Leangpt:
    """This project's engine, from a packed file; the variant is the weight format."""

    module, variants = "leangpt", ()

    @staticmethod
    def load_modules() -> None:
        import leangpt.decoding.native_decoder  # noqa: F401

    def __init__(self, variant: str, folder: Path, threads: int) -> None:
        from leangpt.decoding.native_decoder import NativeDecoder
        from leangpt.kernels import decode

        decode.set_num_threads(threads)
        self.decoder = NativeDecoder.from_packed(folder / f"{variant}.leangpt")
        self.weight_bytes = matrix_bytes(self.decoder.packed)

    def generate(self, prompts: Prompts, new: int) -> Answer:
        import numpy as np

        decoder, length = self.decoder, len(prompts[0])
        start = time.perf_counter()
        sequences = [decoder.add_sequence() for _ in prompts]
        draws = decoder.sample(
            np.concatenate([np.asarray(prompt) for prompt in prompts]),
            np.repeat(sequences, length),
            np.tile(np.arange(length), len(prompts)),
            np.arange(1, len(prompts) + 1) * length - 1,
            [self._greedy(length)] * len(prompts),
        )
        tokens = [[draw.token for draw in draws]]
        first = time.perf_counter()
        for position in range(length, length + new - 1):
            draws = decoder.sample(
                tokens[-1],
                sequences,
                [position] * len(prompts),
                range(len(prompts)),
                [self._greedy(position + 1)] * len(prompts),
            )
            tokens.append([draw.token for draw in draws])
        end = time.perf_counter()
        for sequence in sequences:
            decoder.drop(sequence)
        return first - start, end - first, [list(row) for row in zip(*tokens, strict=True)]

    def generate_ragged(self, prompts: Prompts, new: Sequence[int]) -> list[list[int]]:
        from leangpt import Generator, SamplingParams

        with Generator(self.decoder, max_batch_size=MAX_RUNNING) as generator:
            params = [SamplingParams(temperature=0, max_new_tokens=n, ignore_eos=True) for n in new]
            return [c.token_ids for c in generator.generate(prompts, params)]

    @staticmethod
    def _greedy(position: int) -> Any:
        from leangpt.decoding.sampling import RowSampling

        return RowSampling(
            temperature=0,
            top_k=0,
            top_p=1,
            min_p=0,
            seed=0,
            sample_index=0,
            position=position,
            repetition_penalty=1,
            presence_penalty=0,
            context=(),
            text=(),
            vocab_limit=2**31,
            logprobs=None,
        )


def matrix_bytes(packed: Any) -> int:
    """Bytes of a packed model that a token reads: all but tables that are only looked up, and the copy of the head."""
    tables = ["positions", "frequencies", "screen"]
    if not packed.config.tie_embeddings:
        tables.append("embedding")
    return sum(
        size for name, (_, size) in packed.tensors.items() if name.partition(".")[0] not in tables
    )


class LlamaCpp:
    """llama.cpp through the low-level API of llama-cpp-python; keys and values in 16 bits, its default."""

    module, variants = "llama_cpp", ("f32", "bf16", "q8_0", "q4_0")

    @staticmethod
    def load_modules() -> None:
        import llama_cpp  # noqa: F401
        import numpy as np  # noqa: F401

    @staticmethod
    def prepare(variant: str, folder: Path) -> None:
        write_gguf(folder / "hf", folder / f"{variant}.gguf", variant)

    def __init__(self, variant: str, folder: Path, threads: int) -> None:
        import ctypes

        import llama_cpp

        self.api, self.threads = llama_cpp, threads
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # lives as long as the library
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        if "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            # its AMX layout crashes where token table and head are one
            options.use_extra_bufts = False
        path = folder / f"{variant}.gguf"
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        config = json.loads((folder / "hf" / "config.json").read_text())
        self.vocab_size = config["vocab_size"]
        self.weight_bytes = path.stat().st_size - 4 * config["n_positions"] * config["n_embd"]
        self.context, self.shape = None, (0, 0)

    def _use_context(self, num_sequences: int, length: int) -> None:
        """A context as large as a case needs: to make one is no part of the measured time."""
        api, shape = self.api, (num_sequences, -(-length // 32) * 32)
        if self.shape == shape:
            return
        if self.context:
            api.llama_free(self.context)
            api.llama_batch_free(self.batch)
        options = api.llama_context_default_params()
        options.n_ctx = shape[0] * shape[1]
        options.n_batch = max(512, shape[0] * shape[1])
        options.n_ubatch = 512
        options.n_seq_max = num_sequences
        options.n_threads = options.n_threads_batch = self.threads
        options.no_perf = True
        options.kv_unified = False
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {options.n_ctx} tokens")
        self.batch = api.llama_batch_init(options.n_batch, 0, 1)
        self.shape = shape

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wanted); the most probable token after each wanted row."""
        import numpy as np

        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        pointers = (
            self.api.llama_get_logits_ith(self.context, i) for i, row in enumerate(rows) if row[3]
        )
        return [int(np.ctypeslib.as_array(p, shape=(self.vocab_size,)).argmax()) for p in pointers]

    def generate(self, prompts: Prompts, new: int) -> Answer:
        length = len(prompts[0])
        self._use_context(len(prompts), length + new)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        rows = [
            (token, i, sequence, i == length - 1)
            for sequence, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        tokens = [self._decode(rows)]
        first = time.perf_counter()
        for position in range(length, length + new - 1):
            rows = [(token, position, s, True) for s, token in enumerate(tokens[-1])]
            tokens.append(self._decode(rows))
        end = time.perf_counter()
        return first - start, end - first, [list(row) for row in zip(*tokens, strict=True)]

    def generate_ragged(self, prompts: Prompts, new: Sequence[int]) -> list[list[int]]:
        """Prompts join as soon as a place is free, in steps of at most 512 tokens."""
        lengths = [len(p) + n for p, n in zip(prompts, new, strict=True)]
        self._use_context(MAX_RUNNING, -(-max(lengths) // 256) * 256)
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_clear(memory, True)
        texts: list[list[int]] = [[] for _ in prompts]
        waiting, free = list(range(len(prompts))), list(range(MAX_RUNNING))
        running: dict[int, int] = {}  # prompt by place
        while waiting or running:
            rows, places = [], []
            for place, i in running.items():
                position = len(prompts[i]) + len(texts[i]) - 1
                rows.append((texts[i][-1], position, place, True))
                places.append(place)
            while waiting and free and len(rows) + len(prompts[waiting[0]]) <= 512:
                i, place = waiting.pop(0), free.pop()
                running[place] = i
                last = len(prompts[i]) - 1
                rows += [(token, n, place, n == last) for n, token in enumerate(prompts[i])]
                places.append(place)
            for place, token in zip(places, self._decode(rows), strict=True):
                i = running[place]
                texts[i].append(token)
                if len(texts[i]) == new[i]:
                    self.api.llama_memory_seq_rm(memory, place, -1, -1)
                    del running[place]
                    free.append(place)
        return texts


class OpenVino:
    """OpenVINO GenAI; a variant is the format of the weights and the precision of the arithmetic."""

    module, variants = "openvino_genai", ("fp32", "fp32-bf16", "int8", "int8-bf16", "int4")

    @staticmethod
    def load_modules() -> None:
        import numpy as np  # noqa: F401
        import openvino  # noqa: F401
        import openvino_genai  # noqa: F401

    @staticmethod
    def prepare(variant: str, folder: Path) -> None:
        weights = variant.partition("-")[0]
        target = folder / f"openvino-{weights}"
        if (target / "openvino_model.bin").exists():
            return
        tool = Path(sys.executable).with_name("optimum-cli")  # of optimum-intel
        options = ["--task", "text-generation-with-past", "--weight-format", weights]
        command = [tool, "export", "openvino", "-m", folder / "hf", *options, target]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, stdout=sys.stderr, env=env)

    def __init__(self, variant: str, folder: Path, threads: int) -> None:
        import openvino_genai

        weights, _, precision = variant.partition("-")
        self.api = openvino_genai
        self.folder = folder / f"openvino-{weights}"
        self.options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision or "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.pipeline = openvino_genai.LLMPipeline(
            str(self.folder), "CPU", ATTENTION_BACKEND="SDPA", **self.options
        )
        self.batcher = None
        config = json.loads((folder / "hf" / "config.json").read_text())
        table = config["n_positions"] * config["n_embd"]
        size = (self.folder / "openvino_model.bin").stat().st_size
        self.weight_bytes = size - table * (4 if weights == "fp32" else 1)
        if weights == "fp32" and precision == "bf16":
            self.weight_bytes //= 2

    def _config(self, new: int) -> Any:
        config = self.api.GenerationConfig()
        config.max_new_tokens = new
        config.do_sample = False
        config.ignore_eos = True
        config.eos_token_id = -1
        config.stop_token_ids = set()
        return config

    def generate(self, prompts: Prompts, new: int) -> Answer:
        import numpy as np
        import openvino

        tokens = np.array(prompts, dtype=np.int64)
        inputs = self.api.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(tokens * 0 + 1))
        start = time.perf_counter()
        result = self.pipeline.generate(inputs, self._config(new))
        total = time.perf_counter() - start
        first = result.perf_metrics.get_ttft().mean / 1e3
        return first, total - first, [list(map(int, row)) for row in result.tokens]

    def generate_ragged(self, prompts: Prompts, new: Sequence[int]) -> list[list[int]]:
        import numpy as np
        import openvino

        if self.batcher is None:
            scheduling = self.api.SchedulerConfig()
            scheduling.max_num_seqs = MAX_RUNNING
            scheduling.max_num_batched_tokens = 512
            scheduling.cache_size = 2  # GiB
            self.batcher = self.api.ContinuousBatchingPipeline(
                str(self.folder), scheduling, "CPU", self.options
            )
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self.batcher.generate(inputs, [self._config(n) for n in new])
        return [list(map(int, result.m_generation_ids[0])) for result in results]


class CTranslate2:
    """CTranslate2; it has no batches whose prompts end at different lengths."""

    module, variants = "ctranslate2", ("float32", "int8_float32")

    @staticmethod
    def load_modules() -> None:
        import ctranslate2  # noqa: F401

    @staticmethod
    def prepare(variant: str, folder: Path) -> None:
        import ctranslate2

        converter = ctranslate2.converters.TransformersConverter(str(folder / "hf"))
        converter.convert(str(folder / f"ctranslate2-{variant}"), quantization=variant, force=True)

    def __init__(self, variant: str, folder: Path, threads: int) -> None:
        import ctranslate2

        path = folder / f"ctranslate2-{variant}"
        self.names = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))
        self.generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=variant, inter_threads=1, intra_threads=threads
        )
        config = json.loads((folder / "hf" / "config.json").read_text())
        table = 4 * config["n_positions"] * config["n_embd"]
        self.weight_bytes = (path / "model.bin").stat().st_size - table

    def generate(self, prompts: Prompts, new: int) -> Answer:
        times: list[float] = []

        def note(_: Any) -> bool:
            times.append(time.perf_counter())
            return False

        names = [[self.names[token] for token in prompt] for prompt in prompts]
        start = time.perf_counter()
        results = self.generator.generate_batch(
            names,
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        first = times[len(prompts) - 1]
        return first - start, times[-1] - first, [r.sequences_ids[0] for r in results]

    def generate_ragged(self, prompts: Prompts, new: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError(
            "CTranslate2 does not batch prompts that end at different lengths"
        )


class PyTorch:
    """A plain GPT-2 on PyTorch's ops, with a key/value cache of fixed size, as one would write it."""

    module, variants = "torch", ("fp32", "bf16", "dynamic_int8")

    @staticmethod
    def load_modules() -> None:
        import safetensors.torch  # noqa: F401
        import torch  # noqa: F401

    @staticmethod
    def prepare(variant: str, folder: Path) -> None:
        pass  # it reads the Hugging Face folder

    def __init__(self, variant: str, folder: Path, threads: int) -> None:
        import warnings

        import torch
        from safetensors.torch import load_file
        from torch import nn

        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.set_num_threads(threads)
        config = json.loads((folder / "hf" / "config.json").read_text())
        self.n_head, self.eps = config["n_head"], config["layer_norm_epsilon"]
        self.dtype = torch.bfloat16 if variant == "bf16" else torch.float32
        weights = {
            name.removeprefix("transformer."): tensor.to(self.dtype)
            for name, tensor in load_file(folder / "hf" / "model.safetensors").items()
        }

        def linear(name: str) -> nn.Module:
            weight = weights[f"{name}.weight"].T if name != "wte" else weights["wte.weight"]
            module = nn.Linear(*weight.shape[::-1], bias=name != "wte", dtype=self.dtype)
            with torch.no_grad():
                module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.copy_(weights[f"{name}.bias"])
            return module

        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        layers = [[linear(f"h.{i}.{n}") for n in names] for i in range(config["n_layer"])]
        model = nn.ModuleList([*map(nn.ModuleList, layers), nn.ModuleList([linear("wte")])])
        if variant == "dynamic_int8":
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        self.layers, self.head = list(model)[:-1], model[-1][0]
        self.wte, self.wpe = weights["wte.weight"], weights["wpe.weight"]
        self.norms = {n: w for n, w in weights.items() if "ln_" in n}
        matrices = sum(w.numel() for n, w in weights.items() if w.ndim == 2 and n != "wpe.weight")
        self.weight_bytes = matrices * {"fp32": 4, "bf16": 2, "dynamic_int8": 1}[variant]
        self.shape, self.cache = (0, 0), None

    def _use_cache(self, batch: int, length: int) -> None:
        import torch

        if self.shape != (batch, length):
            C = self.wte.shape[1]
            shape = (len(self.layers), 2, batch, self.n_head, length, C // self.n_head)
            self.cache, self.shape = torch.zeros(shape, dtype=self.dtype), (batch, length)

    def _norm(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        weight, bias = self.norms[f"{name}.weight"], self.norms[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)

    def _step(self, tokens: Any, start: int) -> Any:
        """The most probable token after each sequence of the batch."""
        import torch.nn.functional as F

        B, T = tokens.shape
        end = start + T
        x = self.wte[tokens] + self.wpe[start:end]
        for i, (qkv, attn_out, mlp_in, mlp_out) in enumerate(self.layers):
            q, k, v = (
                part.view(B, T, self.n_head, -1).transpose(1, 2)
                for part in qkv(self._norm(x, f"h.{i}.ln_1")).chunk(3, dim=-1)
            )  # (B, H, T, D)
            keys, values = self.cache[i]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            y = F.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], is_causal=T > 1
            )
            x = x + attn_out(y.transpose(1, 2).reshape(B, T, -1))
            inner = F.gelu(mlp_in(self._norm(x, f"h.{i}.ln_2")), approximate="tanh")
            x = x + mlp_out(inner)
        return self.head(self._norm(x[:, -1], "ln_f")).argmax(-1, keepdim=True)

    def generate(self, prompts: Prompts, new: int) -> Answer:
        import torch

        length = len(prompts[0])
        self._use_cache(len(prompts), length + new)
        with torch.inference_mode():
            start = time.perf_counter()
            steps = [self._step(torch.tensor(prompts), 0)]
            tokens = [steps[0][:, 0].tolist()]
            first = time.perf_counter()
            for position in range(length, length + new - 1):
                steps.append(self._step(steps[-1], position))
                tokens.append(steps[-1][:, 0].tolist())
            end = time.perf_counter()
        return first - start, end - first, [list(row) for row in zip(*tokens, strict=True)]

    def generate_ragged(self, prompts: Prompts, new: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError("the plain model does not batch prompts of several lengths")


ENGINES: dict[str, Any] = {
    "leangpt": Leangpt,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "ctranslate2": CTranslate2,
    "torch": PyTorch,
}


def write_gguf(source: Path, target: Path, variant: str) -> None:
    """Write a Hugging Face GPT-2 as GGUF; quantized variants have all matrices in the format, the token table too."""
    import gguf
    import numpy as np

    config = json.loads((source / "config.json").read_text())
    weights = {
        name.removeprefix("transformer."): array
        for name, array in read_safetensors(source / "model.safetensors").items()
    }
    kind = gguf.GGMLQuantizationType[variant.upper()]
    name = "ALL_F32" if variant == "f32" else f"MOSTLY_{variant.upper()}"
    temporary = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(str(temporary), "gpt2")
    writer.add_name("gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType[name])
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = (source / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary))
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(vocabulary) - 1)
    writer.add_eos_token_id(len(vocabulary) - 1)

    def add(name: str, array: np.ndarray, is_matrix: bool = False) -> None:
        array = np.ascontiguousarray(array)
        if is_matrix and variant != "f32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)

    add("token_embd.weight", weights["wte.weight"], True)  # the head too
    add("position_embd.weight", weights["wpe.weight"])
    add("output_norm.weight", weights["ln_f.weight"])
    add("output_norm.bias", weights["ln_f.bias"])
    names = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    for i in range(config["n_layer"]):
        for ours, theirs in names.items():
            weight, bias = (weights[f"h.{i}.{ours}.{part}"] for part in ("weight", "bias"))
            add(f"blk.{i}.{theirs}.weight", weight.T, weight.ndim == 2)
            add(f"blk.{i}.{theirs}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(target)


def read_safetensors(path: Path) -> dict[str, Any]:
    """The float32 tensors of a file, without the package."""
    import numpy as np

    data = np.fromfile(path, dtype=np.uint8)
    length = int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{path}: {name} must be F32, got {entry['dtype']}")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = data[start:end].view(np.float32).reshape(entry["shape"])
    return tensors


def _serve(
    engine: str, variant: str, folder: Path, answer: Callable[[dict[str, Any]], None]
) -> None:
    kind = ENGINES[engine]
    start = time.perf_counter()
    kind.load_modules()
    imported, imports_mb = time.perf_counter(), resident_mb()
    model: Engine = kind(variant, folder, int(os.environ["OMP_NUM_THREADS"]))
    answer(
        {
            "import_s": imported - start,
            "load_s": time.perf_counter() - imported,
            "weight_bytes": model.weight_bytes,
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        prompts, new = request["prompts"], request["new"]
        if request["ragged"]:
            start = time.perf_counter()
            tokens = model.generate_ragged(prompts, new)
            result = {"ttft_s": 0.0, "decode_s": time.perf_counter() - start}
        else:
            ttft, decode, tokens = model.generate(prompts, new[0])
            result = {"ttft_s": ttft, "decode_s": decode}
        answer(result | {"tokens": tokens, "resident_mb": resident_mb() - imports_mb})


def main(arguments: list[str]) -> int:
    if arguments == ["list"]:
        found = [n for n, e in ENGINES.items() if importlib.util.find_spec(e.module) is not None]
        print(json.dumps(found))
        return 0
    command, engine, variant, folder = arguments
    if command == "prepare":
        ENGINES[engine].prepare(variant, Path(folder))
        return 0
    # libraries print too: answers have a channel of their own
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=channel, flush=True)

    _serve(engine, variant, Path(folder), answer)
    channel.close()
    os._exit(0)  # threads of some libraries abort while Python ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
