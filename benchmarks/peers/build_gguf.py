"""llama.cpp's files from the shared backbone: base.gguf with every matrix in one type, and lora.gguf in float16.

Runs in llama.cpp's environment. llama-cpp-python ships no converter, so the files are written with `gguf`, as
llama.cpp's own converter writes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

Array = NDArray[Any]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "F16": gguf.LlamaFileType.MOSTLY_F16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--type", choices=FILE_TYPES, default="Q4_0")
    args = parser.parse_args()
    config = json.loads((args.backbone / "base" / "config.json").read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    write_base(config, args.backbone / "base", args.out / "base.gguf", args.type)
    write_lora(config, args.backbone / "checkpoint" / "adapter", args.out / "lora.gguf")


def write_base(config: dict[str, Any], folder: Path, target: Path, type_name: str) -> None:
    """The backbone: matrices in `type_name`, vectors in float32, no vocabulary but its size."""
    matrix_type = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("random")
    writer.add_file_type(FILE_TYPES[type_name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    if config["model_type"] == "gemma3_text":
        rotations = config["rope_parameters"]
        writer.add_rope_freq_base(rotations["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(rotations["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config["sliding_window"])
    else:
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = tensor_names(config)
    for name, array in tensors(folder):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        target_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target_name is None:
            raise SystemExit(f"gguf has no name for {name}")
        array = rotated(config, name, array)
        if array.ndim == 2:
            writer.add_tensor(target_name, quantize(array, matrix_type), raw_dtype=matrix_type)
        elif config["model_type"] == "gemma3_text":  # its norms multiply by 1 + weight, llama.cpp's by the weight
            writer.add_tensor(target_name, array + 1)
        else:
            writer.add_tensor(target_name, array)
    finish(writer)


def write_lora(config: dict[str, Any], folder: Path, target: Path) -> None:
    """The adapter: both factors of each projection, in float16 as llama.cpp's converter writes them by default."""
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter["lora_alpha"]))
    names = tensor_names(config)
    for name, array in tensors(folder):
        module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        target_name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if factor == "lora_B":  # only the rows that come out are in another order
            array = rotated(config, f"{module}.weight", array)
        writer.add_tensor(f"{target_name}.{factor.lower()}", array.astype(np.float16))
    finish(writer)


def rotated(config: dict[str, Any], name: str, array: Array) -> Array:
    """For Llama, llama.cpp rotates neighbouring pairs where transformers rotates halves: its queries and keys have
    their rows in that order."""
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def tensor_names(config: dict[str, Any]) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])


def tensors(folder: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of the safetensors files in `folder` as float32, read without the library, which is not installed
    here."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in dtypes:
                raise SystemExit(f"{path}: {name} is {entry['dtype']}; {', '.join(dtypes)} were expected")
            offset, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
            array = np.fromfile(path, dtypes[entry["dtype"]], int(np.prod(shape)), offset=offset)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            yield name, array.astype(np.float32, copy=False).reshape(shape)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
