"""Who is measured: the peers, the models that they need, and what each must read to decode one token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import Sizes

BLOCK_SIZE = 32
FP32 = 4.0
INT4_FP32_SCALES = 0.5 + 4 / BLOCK_SIZE  # onnxruntime's MatMulNBits, symmetric
INT4_FP16_SCALES = 0.5 + 2 / BLOCK_SIZE  # ours, and llama.cpp's Q4_0


@dataclass(frozen=True)
class Model:
    """A folder that one script writes in one environment, from the backbone (or, for the backbone, from a shape), or
    from another model, its `source`."""

    environment: str
    script: str
    options: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Peer:
    """One row of the tables.

    stored: which part of the model's folder it needs. passes, heads: how often a step reads the layers' and the
    lm_head's weights. streams: caches that a step reads. Bytes are per weight and per cached value; adapter_bytes None:
    no adapter. slow: too slow for long contexts and many steps. apart: in a separate process, where its memory differs.
    """

    label: str
    precision: str
    environment: str
    runner: str
    model: str
    weight_bytes: float
    mode: str = "one"
    stored: tuple[str, ...] = (".",)
    passes: int = 1
    heads: int = 1
    streams: int = 1
    adapter_bytes: float | None = None
    cache_bytes: int = 4
    slow: bool = False
    apart: bool = False

    @property
    def process(self) -> tuple[str, ...]:
        """Peers with the same one share a process."""
        return (self.environment, self.runner, self.model, *([self.mode] if self.apart else []))

    def bytes_per_step(self, sizes: Sizes, context: int, folder: Path) -> float:
        """What one decode step must read: weights, adapter, caches."""
        weights = (self.passes * sizes.layer_weights + self.heads * sizes.head_weights) * self.weight_bytes
        adapter = 0.0 if self.adapter_bytes is None else sizes.adapter_weights * self.adapter_bytes
        if (folder / "imsm_model.json").is_file():  # the artifact says so itself, the adapter included
            reads = json.loads((folder / "imsm_model.json").read_text(encoding="utf-8"))["reads"]
            weights, adapter = self.passes * reads["bytes"], 0.0
        elif (file := folder / "base.gguf").is_file() and self.stored[0] == file.name:
            weights = file.stat().st_size
        elif (folder / "genai_config.json").is_file():  # its widths may be mixed; an adapter is in the graph
            weights, adapter = (folder / "model.onnx.data").stat().st_size, 0.0
        return weights + adapter + self.streams * sizes.cache_values_per_token * context * self.cache_bytes

    def disk_mb(self, folder: Path) -> float:
        """Size of what it needs on disk, in 10^6 bytes."""
        paths = [folder / name for name in self.stored]
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        return sum(file.stat().st_size for file in files) / 1e6


BACKBONE = "backbone"
MODELS = {
    BACKBONE: Model("own", "build_backbone.py"),
    "ours-int4-base": Model("own", "build_ours.py", ("--precision", "int4", "--base-only")),
    "ours-int4-siamese": Model("own", "build_ours.py", ("--precision", "int4")),
    "ours-int4-nearest": Model("own", "build_ours.py", ("--precision", "int4", "--four-bits")),
    "ours-fp32-base": Model("own", "build_ours.py", ("--precision", "fp32", "--base-only")),
    "ours-fp32-siamese": Model("own", "build_ours.py", ("--precision", "fp32")),
    "genai-int4": Model("genai", "build_genai.py"),
    "genai-int4-pruned": Model("genai", "build_genai.py", ("--prune-lm-head",)),
    "genai-int4-lora": Model("genai", "build_genai.py", ("--lora",)),
    "genai-int4-mixed": Model("genai", "build_genai.py", ("--algorithm", "k_quant_mixed")),
    "gguf": Model("llama", "build_gguf.py"),
    "gguf-f16": Model("llama", "build_gguf.py", ("--type", "F16")),
    "gguf-q4_k_m": Model("llama", "quantize_gguf.py", ("--type", "Q4_K_M"), source="gguf-f16"),
    "optimum-fp32": Model("optimum", "build_optimum.py"),
}


def _ours(precision: str, weight_bytes: float) -> dict[str, Peer]:
    place = ("own", "runner_ours.py")
    base, siamese = f"ours-{precision}-base", f"ours-{precision}-siamese"
    return {
        base: Peer("ours, base alone", precision, *place, base, weight_bytes),
        siamese: Peer("ours, siamese", precision, *place, siamese, weight_bytes, streams=2, adapter_bytes=FP32),
        f"ours-{precision}-naive": Peer(
            "ours, base run twice", precision, *place, base, weight_bytes, "twice", passes=2, heads=2, streams=2
        ),
    }


def _genai(label: str, model: str, adapter_bytes: float | None = None) -> Peer:
    return Peer(label, "int4", "genai", "runner_genai.py", model, INT4_FP32_SCALES, adapter_bytes=adapter_bytes)


def _llama(label: str, mode: str, model: str = "gguf") -> Peer:
    lora = mode.endswith("-lora")
    return Peer(
        label,
        "int4",
        "llama",
        "runner_llama.py",
        model,
        INT4_FP16_SCALES,
        mode,
        stored=("base.gguf", "lora.gguf") if lora else ("base.gguf",),
        streams=2 if mode.startswith("two") else 1,
        adapter_bytes=2.0 if lora else None,
        cache_bytes=2,
    )


def _torch(label: str, mode: str, passes: int, heads: int, streams: int, apart: bool = False) -> Peer:
    return Peer(
        label,
        "fp32",
        "own",
        "runner_torch.py",
        BACKBONE,
        FP32,
        mode,
        stored=("base",) if mode == "one" else (".",),
        passes=passes,
        heads=heads,
        streams=streams,
        adapter_bytes=None if mode == "one" else FP32,
        slow=apart,
        apart=apart,
    )


PEERS = {
    **_ours("int4", INT4_FP16_SCALES),
    "ours-int4-nearest": Peer(
        "ours, siamese, all in 4 bits",
        "int4",
        "own",
        "runner_ours.py",
        "ours-int4-nearest",
        INT4_FP16_SCALES,
        streams=2,
        adapter_bytes=FP32,
    ),
    "genai": _genai("onnxruntime-genai", "genai-int4"),
    "genai-pruned": _genai("onnxruntime-genai, lm_head pruned", "genai-int4-pruned"),
    "genai-lora": _genai("onnxruntime-genai, unmerged LoRA", "genai-int4-lora", INT4_FP32_SCALES),
    "genai-mixed": _genai("onnxruntime-genai, k_quant_mixed", "genai-int4-mixed"),
    "llama": _llama("llama.cpp Q4_0", "one"),
    "llama-two": _llama("llama.cpp Q4_0, two sequences", "two"),
    "llama-lora": _llama("llama.cpp Q4_0, LoRA", "one-lora"),
    "llama-lora-two": _llama("llama.cpp Q4_0, LoRA, two sequences", "two-lora"),
    "llama-k": _llama("llama.cpp Q4_K_M", "one", "gguf-q4_k_m"),
    "llama-k-lora": _llama("llama.cpp Q4_K_M, LoRA", "one-lora", "gguf-q4_k_m"),
    **_ours("fp32", FP32),
    "torch": _torch("PyTorch, one stream", "one", 1, 1, 1),
    "torch-two": _torch("PyTorch, two streams with caches", "two", 2, 1, 2),
    "torch-released": _torch("PyTorch, the released IMSM loop", "released", 2, 3, 0, apart=True),
    "optimum": Peer("optimum-onnx ORTModelForCausalLM", "fp32", "optimum", "runner_optimum.py", "optimum-fp32", FP32),
}
PRECISIONS = ("int4", "fp32")


def reference(precision: str) -> str:
    """The peer that the tables' ratios are about."""
    return f"ours-{precision}-siamese"
