"""What the parts of a manifest say about one another, and which inputs and outputs its graph has by the rest of it.

Takes a document whose keys, types and ranges are those of the schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .files import DATA, GRAPH, MANIFEST, TOKENIZER, VIRTUAL_TOKENS
from .json_checks import MOST, DamagedError
from .printable import shortened
from .schema import check_file_name

Document = dict[str, Any]
Shape = tuple[int | None, ...]
"""None: a symbolic dimension."""

_FLOAT_ACTIVATIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BITS = {"int8": 8, "int4": 4}
_WIDTHS = (4, 5, 6, 8)


def check_relations(document: Document) -> None:
    """Raises DamagedError naming the first part that contradicts another one."""
    _check_precision(document)
    _check_streams(document)
    _check_groups(document)
    _check_lengths(document)
    _check_quality(document)
    _check_tokens(document)
    _check_files(document)
    for side, wanted in (("inputs", _inputs(document)), ("outputs", _outputs(document))):
        _check_tensors(document["graph"][side], f"graph.{side}", wanted)


def _check_precision(document: Document) -> None:
    precision, quantization = document["precision"], document["quantization"]
    activations = _FLOAT_ACTIVATIONS.get(precision)
    if activations is not None and document["activations"] != activations:
        raise DamagedError("activations", document["activations"], f"{activations}, as precision is {precision}")
    bits = _BITS.get(precision)
    if (quantization is None) != (bits is None):
        rule = "null" if bits is None else "an object"
        raise DamagedError("quantization", quantization, f"{rule}, as precision is {precision}")
    if quantization is not None and quantization["bits"] != bits:
        raise DamagedError("quantization.bits", quantization["bits"], f"{bits}, as precision is {precision}")
    if quantization is not None and document["format_version"] > 5:
        _check_widths(quantization)


def _check_widths(quantization: Document) -> None:
    bits, widths = quantization["bits"], quantization["widths"]
    allowed = [str(width) for width in _WIDTHS if width >= bits]
    for width in widths:
        if width not in allowed:
            raise DamagedError("a width in quantization.widths", width, f"one of {', '.join(allowed)}")
    total = sum(widths.values())
    mean = sum(int(width) * count for width, count in widths.items()) / total if total else None
    found = quantization["mean_bits"]
    if (found is None) != (mean is None) or (found is not None and mean is not None and abs(found - mean) > 1e-6):
        rule = "null, as there are none" if mean is None else f"{mean:g}, as widths say"
        raise DamagedError("quantization.mean_bits", found, rule)


def _check_streams(document: Document) -> None:
    streams, gate, virtual = document["streams"], document["gate"], document["virtual_tokens"]
    if streams not in (["base"], ["base", "adapter"]):
        raise DamagedError("streams", ", ".join(streams), "base, or base and adapter")
    for name in ("gate", "adapter"):
        if (document[name] is None) != (len(streams) == 1):
            rule = "null with one stream" if len(streams) == 1 else "an object with two streams"
            raise DamagedError(name, document[name], rule)
    if gate is not None and gate["rank"] == 0 and gate["kind"] != "mean_logits":
        raise DamagedError("gate.rank", 0, f"at least 1 in a {gate['kind']} gate")
    if list(virtual) != streams:
        raise DamagedError("virtual_tokens", ", ".join(virtual), f"of the streams {', '.join(streams)}")
    if virtual["base"] != 0:
        raise DamagedError("virtual_tokens.base", virtual["base"], "0: only an adapter has virtual tokens")


def _check_groups(document: Document) -> None:
    layers, shared, two = document["cache"], document["shared_layers"], len(document["streams"]) == 2
    if shared > len(layers) or (shared and not two) or (shared and document["virtual_tokens"]["adapter"]):
        most = len(layers) if two and not document["virtual_tokens"]["adapter"] else 0
        raise DamagedError("shared_layers", shared, f"0 to {most} here")
    own = (["base", "adapter"] if _is_portable(document) else ["both"]) if two else ["base"]
    for index, layer in enumerate(layers):
        wanted = ["shared"] if index < shared else own
        if layer["groups"] != wanted:
            raise DamagedError(f"cache[{index}].groups", ", ".join(layer["groups"]), " and ".join(wanted))


def _check_lengths(document: Document) -> None:
    model, padding = document["model"], document["graph"]["padding"]
    if model["context_length"] + padding + max(document["virtual_tokens"].values()) > MOST:
        raise DamagedError("model.context_length", model["context_length"], f"at most {MOST} with what is beside it")


def _check_quality(document: Document) -> None:
    quality, two = document["quality"], len(document["streams"]) == 2
    for name in ("blend", "adapter") if quality is not None and document["format_version"] > 5 else ():
        if (quality[name] is None) == two:
            rule = "an object with two streams" if two else "null with one stream"
            raise DamagedError(f"quality.{name}", quality[name], rule)


def _check_tokens(document: Document) -> None:
    most = document["model"]["vocab_size"] - 1
    for index, token in enumerate(document["tokens"]["eos_token_ids"]):
        if token > most:
            raise DamagedError(f"tokens.eos_token_ids[{index}]", token, f"at most {most}, the last of the vocabulary")


def _check_files(document: Document) -> None:
    files = document["files"]
    lowered = {MANIFEST: MANIFEST}
    for name in files:
        check_file_name(name, "a name in files")
        other = lowered.setdefault(name.casefold(), name)
        if other != name:
            raise DamagedError("a name in files", name, f"unlike {other} on a disk that ignores case")
    virtual = document["virtual_tokens"].get("adapter", 0)
    for name in (GRAPH, DATA, TOKENIZER, *([VIRTUAL_TOKENS] if virtual else [])):
        if name not in files:
            raise ValueError(f"files has no {name}")
    if not virtual and VIRTUAL_TOKENS in files:
        raise ValueError(f"files has {VIRTUAL_TOKENS}, and virtual_tokens says that there are none")


def _is_portable(document: Document) -> bool:
    return all(tensor["name"] != "query_seqlens" for tensor in document["graph"]["inputs"])


def _by_position(document: Document) -> bool:
    """Whether which memory speaks is said for each position: formats 5 and 6 have a bias for each row."""
    version: int = document["format_version"]
    return version > 6


def _inputs(document: Document) -> Iterator[tuple[str, str, Shape, bool]]:
    """Name, dtype, shape, and whether every such graph has it."""
    yield "input_ids", "int64", (None, None), True
    yield "position_ids", "int64", (None, None), False
    yield "seqlens_k", "int32", (None,), True
    yield "total_sequence_length", "int32", (), True
    yield "query_seqlens", "int32", (None,), False
    yield "logit_positions", "int64", (None, None), True
    if len(document["streams"]) == 2:
        yield "query_mask", "float32", (None, None), True
        yield "past_query_sum", "float32", (None, 2, document["model"]["hidden_size"]), True
        yield "past_query_count", "float32", (None,), True
        if _by_position(document):
            yield "memory_bias", "float32", (None, None), True
            yield "memory", "int64", (None, None), True
        else:
            yield "memory_bias", "float32", (None,), True
    yield from _caches("past_key_values", document)


def _outputs(document: Document) -> Iterator[tuple[str, str, Shape, bool]]:
    width = document["model"]["hidden_size"]
    yield "logits", "float32", (None, None, document["model"]["vocab_size"]), True
    yield "hidden_base", "float32", (None, None, width), True
    if len(document["streams"]) == 2:
        yield "hidden_adapter", "float32", (None, None, width), True
        if _by_position(document):
            yield "hidden_fused", "float32", (None, None, width), True
        yield "gate", "float32", (None, None, width), True
        yield "gate_mean", "float32", (None, None), True
        yield "present_query_sum", "float32", (None, 2, width), True
        yield "present_query_count", "float32", (None,), True
    yield from _caches("present", document)


def _caches(prefix: str, document: Document) -> Iterator[tuple[str, str, Shape, bool]]:
    dtype = "int8" if document["kv_cache"] == "int8" else document["activations"]
    for index, layer in enumerate(document["cache"]):
        for group in layer["groups"]:
            for part in ("key", "value"):
                shape = (None, layer["kv_heads"], None, layer["head_size"])
                yield f"{prefix}.{group}.{index}.{part}", dtype, shape, True


def _check_tensors(found: list[Document], place: str, wanted: Iterator[tuple[str, str, Shape, bool]]) -> None:
    """The tensors are those that follow from the rest of the manifest, each once."""
    rest = {tensor["name"]: index for index, tensor in enumerate(found)}
    if len(rest) < len(found):
        names = [tensor["name"] for tensor in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{place} has {shortened(twice)} twice")
    for name, dtype, shape, always in wanted:
        if name not in rest:
            if always:
                raise ValueError(f"{place} has no {name}, which follows from the rest of the manifest")
            continue
        index = rest.pop(name)
        tensor = found[index]
        if tensor["dtype"] != dtype or not _fits(tensor["shape"], shape):
            is_there = f"{tensor['dtype']} {tensor['shape']}"
            expected = f"{dtype} [{', '.join('a name' if size is None else str(size) for size in shape)}]"
            raise DamagedError(f"{place}[{index}] ({name})", is_there, f"{expected}, by the rest of the manifest")
    if rest:
        name, index = next(iter(rest.items()))
        raise ValueError(f"{place}[{index}] is {shortened(name)}, which does not follow from the rest of the manifest")


def _fits(found: list[int | str], shape: Shape) -> bool:
    return len(found) == len(shape) and all(
        isinstance(size, str) if wanted is None else size == wanted for size, wanted in zip(found, shape, strict=True)
    )
