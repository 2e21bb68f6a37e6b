"""What a manifest must hold, key by key, with types and ranges. docs/ARTIFACT.md explains the keys.

What one key says about another is in `relations`.
"""

from __future__ import annotations

from .json_checks import (
    LARGEST,
    MOST,
    MOST_BYTES,
    Record,
    anything,
    either,
    flag,
    items,
    number,
    one_of,
    optional,
    table,
    text,
    whole,
    within,
)

FORMAT_VERSION = 7
"""What `export` writes."""
DTYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64")
GATE_KINDS = ("query_aware", "token", "residual", "query_mixed", "mean_logits")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
LARGEST_PENALTY = 1e30
"""Of penalties and biases: with more, float32 may not hold what they make of logits."""
FLOATS = ("float32", "float16", "bfloat16")

_name = text("(?s).+", "text that is not empty")
_sha256 = text("[0-9a-f]{64}", "a sha256 of 64 hexadecimal digits")
check_file_name = text(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+", "the name of a file in the folder, without a path")
_digits = text("[0-9a-f]*", "hexadecimal digits")
_bytes = whole(0, MOST_BYTES)
_measured = optional(number())
_size = either(whole(0), _name, f"a size from 0 to {MOST} or a name")
_tensors = items(Record({"name": _name, "dtype": one_of(*DTYPES), "shape": items(_size)}), least=1)

_DIFFERENCE = {
    "argmax_agreement": _measured,
    "mean_kl": _measured,
    "perplexity_reference": _measured,
    "perplexity": _measured,
    "perplexity_change": _measured,
}
_difference = Record(_DIFFERENCE)

_share = within("a number above 0, at most 1", lambda value: 0 < value <= 1)
_GENERATION = {
    "temperature": within("a number of at least 0.0001", lambda value: 1e-4 <= value <= LARGEST),
    "top_k": whole(),
    "top_p": _share,
    "min_p": within("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "typical_p": _share,
    "repetition_penalty": within(
        "a number from 1e-30 to 1e30", lambda value: 1 / LARGEST_PENALTY <= value <= LARGEST_PENALTY
    ),
    "no_repeat_ngram_size": whole(),
}

_QUANTIZATION = {
    "bits": whole(4, 8),
    "block_size": whole(1),
    "symmetric": flag,
    "matrices": whole(),
    "embeddings": whole(),
    "experts": whole(),
    "calibrated": whole(),
    "bytes": _bytes,
    "kept_bytes": _bytes,
}
_WIDTHS = {"rounding": one_of("best", "nearest"), "mean_bits": optional(number(4, 8)), "widths": table(_bytes)}

_CURRENT = Record(
    {
        "format_version": whole(FORMAT_VERSION, FORMAT_VERSION),
        "created": text(),
        "producers": table(text()),
        "model": Record(
            {"architecture": _name, "hidden_size": whole(1), "vocab_size": whole(1), "context_length": whole(1)}
        ),
        "streams": items(one_of("base", "adapter"), least=1),
        "shared_layers": whole(0),
        "cache": items(
            Record(
                {
                    "groups": items(one_of("base", "adapter", "both", "shared"), least=1),
                    "kv_heads": whole(1, 65_536),
                    "head_size": whole(8, 65_536, multiple=8),
                }
            ),
            least=1,
        ),
        "opset": table(whole(1)),
        "graph": Record(
            {
                "inputs": _tensors,
                "outputs": _tensors,
                "rotary": one_of("fused", "node", "traced", "none"),
                "padding": whole(1),
            }
        ),
        "reads": Record(
            {
                "bytes": _bytes,
                "rows": items(Record({"bytes": _bytes, "rows": whole(1)})),
                "experts": items(Record({"bytes": _bytes, "experts": whole(1), "top_k": whole(1)})),
            }
        ),
        "precision": one_of(*PRECISIONS),
        "activations": one_of(*FLOATS),
        "quantization": optional(Record(_QUANTIZATION | _WIDTHS)),
        "kv_cache": one_of("float", "int8"),
        "gate": optional(Record({"kind": one_of(*GATE_KINDS), "rank": whole()})),
        "adapter": optional(
            Record(
                {
                    "peft_type": _name,
                    "layers": items(text()),
                    "forms": table(whole()),
                    "bytes": _bytes,
                    "dense_delta_bytes": _bytes,
                }
            )
        ),
        "virtual_tokens": table(whole()),
        "base_model": Record({"name": text(), "revision": optional(text()), "fingerprint": _digits}),
        "training": table(anything),
        "passes": table(Record({"fired": whole()}, {"declined": table(whole())})),
        "activation_range": optional(
            Record(
                {
                    "largest": number(0),
                    "tokens": whole(),
                    "stream": one_of("base", "adapter", "blend"),
                    "module": text(),
                    "what": text(),
                    "by_layer": table(number(0)),
                }
            )
        ),
        "parity": Record(
            {
                "provider": optional(text()),
                "tolerance": optional(number(0)),
                "max_abs_difference": table(table(_measured)),
                "decode_steps": whole(),
                "greedy_tokens_equal": whole(),
                "pytorch_rounding": optional(table(_measured)),
            }
        ),
        "quality": optional(
            Record(
                {
                    "file": optional(text()),
                    "texts": whole(),
                    "tokens": whole(),
                    "blend": optional(_difference),
                    "base": _difference,
                    "adapter": optional(_difference),
                }
            )
        ),
        "cuda_kernels": optional(
            Record({"onnxruntime": text(), "nodes": whole(), "shape_nodes": whole(), "missing": table(whole())})
        ),
        "prompts": Record({"raw": flag}, {"compared": whole(), "fingerprint": _sha256}),
        "generation": Record({"do_sample": flag}, _GENERATION),
        "tokens": Record(
            {
                "special_tokens": table(text()),
                "bos_token_id": optional(whole()),
                "eos_token_ids": items(whole()),
                "pad_token_id": optional(whole()),
            }
        ),
        "files": table(Record({"bytes": _bytes, "sha256": _sha256})),
    }
)
_FORMAT_6 = Record(
    {name: check for name, check in _CURRENT.fields.items() if name != "generation"} | {"format_version": whole(6, 6)}
)
_FORMAT_5 = Record(
    _FORMAT_6.fields
    | {
        "format_version": whole(5, 5),
        "quantization": optional(Record(_QUANTIZATION)),
        "quality": optional(Record({"texts": whole(), "tokens": whole(), **_DIFFERENCE})),
    }
)

SCHEMAS = {5: _FORMAT_5, 6: _FORMAT_6, FORMAT_VERSION: _CURRENT}
"""By format version, of those that are read. Format 6 has no `generation`, and a graph without
`memory`. Format 5 has also the quality of
the blend alone, or of the only stream, and one width for all weights."""
