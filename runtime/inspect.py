"""An artifact's manifest in a few lines. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import CHAT_TEMPLATE
from .folder import check_files
from .manifest import Manifest, read_manifest
from .printable import printable
from .quality import quality_line

PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")


def summarize(folder: Path) -> dict[str, Any]:
    """What an artifact is. Raises ArtifactError."""
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=False)
    raw = manifest.raw
    return {
        "folder": str(folder),
        "architecture": manifest.architecture,
        "base_model": raw["base_model"],
        "precision": manifest.precision,
        "mean_bits": (raw["quantization"] or {}).get("mean_bits"),  # format 5 has none
        "quality": manifest.quality,
        "streams": list(manifest.streams),
        "layers": len(manifest.layers),
        "shared_layers": sum("shared" in layer.groups for layer in manifest.layers),
        "hidden_size": manifest.hidden_size,
        "vocab_size": manifest.vocab_size,
        "context_length": manifest.context_length,
        "gate": raw["gate"],
        "adapter": raw["adapter"],
        "cache_bytes_per_token": cache_bytes_per_token(manifest),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "eos_token_ids": list(manifest.eos_token_ids),
        "chat_template": CHAT_TEMPLATE in manifest.files,
        "raw_prompts": manifest.raw_prompts,
        "generation": manifest.generation,
        "activation_range": raw["activation_range"],
        "parity": raw["parity"],
        "passes": raw["passes"],
        "producers": raw["producers"],
        "created": raw["created"],
    }


def cache_bytes_per_token(manifest: Manifest) -> int:
    """Bytes that one token of one text takes in the caches of all streams."""
    dtype = next(value.dtype for value in manifest.inputs if value.name.startswith("past_key_values."))
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]
    rows = {group: 2 if group == "both" else 1 for group in manifest.groups}
    return sum(
        rows[group] * 2 * layer.kv_heads * layer.head_size * size for layer in manifest.layers for group in layer.groups
    )


def _prompts(facts: dict[str, Any]) -> str:
    if not facts["chat_template"]:
        return "as they are, no chat template"
    return (
        "as they are, as the model was tuned, not through its chat template"
        if facts["raw_prompts"]
        else "chat template"
    )


def format_summary(facts: dict[str, Any]) -> str:
    """The facts as lines, each a single one whatever the artifact's texts hold."""
    gate, adapter, bits = facts["gate"], facts["adapter"], facts["mean_bits"]
    precision = facts["precision"] + ("" if bits is None else f", {bits:.3g} bits a weight")
    lines = [
        f"artifact     {facts['folder']}, {facts['bytes'] / 1e6:.1f} MB, {precision}",
        f"quality      {quality_line(facts['quality'])}",
        f"base model   {facts['architecture']}: {facts['base_model']['name']}",
        f"shape        hidden size {facts['hidden_size']}, vocabulary {facts['vocab_size']}, "
        f"context {facts['context_length']}",
        f"streams      {', '.join(facts['streams'])}; {facts['layers']} layers"
        + (f", the first {facts['shared_layers']} shared" if facts["shared_layers"] else ""),
        f"gate         {gate['kind']}, rank {gate['rank']}" if gate else "gate         none",
        f"adapter      {adapter['peft_type']} on {len(adapter['layers'])} layers" if adapter else "adapter      none",
        f"cache        {facts['cache_bytes_per_token']} bytes a token",
        f"prompts      {_prompts(facts)}; end tokens {facts['eos_token_ids']}",
        f"generation   {_generation(facts['generation'])}",
        f"parity       {_parity(facts['parity'])}",
    ]
    if found := facts["activation_range"]:
        where = f"in {found['module']}; float16 holds 65504"
        lines.append(f"range        largest activation {found['largest']:.3g} {where}")
    lines.append(f"created      {facts['created']}")
    return "\n".join(map(printable, lines))


def _generation(defaults: dict[str, Any]) -> str:
    """What of it applies: a greedy choice has no temperature and no filters."""
    sampled = defaults.get("do_sample", False)
    names = [name for name in defaults if name != "do_sample" and (sampled or name in PENALTIES)]
    return ", ".join([*([] if sampled else ["greedy"]), *(f"{name} {defaults[name]:g}" for name in names)])


def _parity(parity: dict[str, Any]) -> str:
    found = [value for differences in parity["max_abs_difference"].values() for value in differences.values()]
    measured = [value for value in found if value is not None]
    if not measured:
        return "not recorded"
    equal, steps = parity["greedy_tokens_equal"], parity["decode_steps"]
    return f"largest difference from PyTorch {max(measured):.1e}, greedy tokens equal {equal} of {steps}"
