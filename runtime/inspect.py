"""An artifact's manifest in a few lines. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .manifest import Manifest, check_files, read_manifest


def summarize(folder: Path) -> dict[str, Any]:
    """What an artifact is. Raises ArtifactError."""
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=False)
    raw = manifest.raw
    return {
        "folder": str(folder),
        "architecture": manifest.architecture,
        "base_model": raw.get("base_model"),
        "precision": manifest.precision,
        "streams": list(manifest.streams),
        "layers": len(manifest.layers),
        "shared_layers": sum("shared" in layer.groups for layer in manifest.layers),
        "hidden_size": manifest.hidden_size,
        "vocab_size": manifest.vocab_size,
        "context_length": manifest.context_length,
        "gate": raw["gate"],
        "adapter": raw.get("adapter"),
        "cache_bytes_per_token": cache_bytes_per_token(manifest),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "eos_token_ids": list(manifest.eos_token_ids),
        "chat_template": "chat_template.jinja" in manifest.files,
        "raw_prompts": manifest.raw_prompts,
        "activation_range": raw.get("activation_range"),
        "parity": raw.get("parity"),
        "passes": raw.get("passes"),
        "producers": raw.get("producers"),
        "created": raw.get("created"),
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
    """The facts as lines."""
    gate, adapter, parity = facts["gate"], facts["adapter"], facts["parity"] or {}
    worst = [value for differences in parity.get("max_abs_difference", {}).values() for value in differences.values()]
    lines = [
        f"artifact     {facts['folder']}, {facts['bytes'] / 1e6:.1f} MB, {facts['precision']}",
        f"base model   {facts['architecture']}: {(facts['base_model'] or {}).get('name')}",
        f"shape        hidden size {facts['hidden_size']}, vocabulary {facts['vocab_size']}, "
        f"context {facts['context_length']}",
        f"streams      {', '.join(facts['streams'])}; {facts['layers']} layers"
        + (f", the first {facts['shared_layers']} shared" if facts["shared_layers"] else ""),
        f"gate         {gate['kind']}, rank {gate['rank']}" if gate else "gate         none",
        f"adapter      {adapter['peft_type']} on {len(adapter['layers'])} layers" if adapter else "adapter      none",
        f"cache        {facts['cache_bytes_per_token']} bytes a token",
        f"prompts      {_prompts(facts)}; end tokens {facts['eos_token_ids']}",
        f"parity       largest difference from PyTorch {max(worst):.1e}, greedy tokens equal "
        f"{parity['greedy_tokens_equal']} of {parity['decode_steps']}"
        if worst
        else "parity       not recorded",
        f"created      {facts['created']}",
    ]
    if found := facts["activation_range"]:
        where = f"in {found['module']}; float16 holds 65504"
        lines.insert(-1, f"range        largest activation {found['largest']:.3g} {where}")
    return "\n".join(lines)
