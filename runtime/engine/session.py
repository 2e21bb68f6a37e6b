"""The graph as a session: loading it, checking it against the manifest, and running prefill and decode steps.

Knows nothing about text or sampling: token ids go in, logits come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..errors import ArtifactError, PromptError, SettingsError
from ..manifest import GRAPH, VIRTUAL_TOKENS, Manifest, check_files, read_manifest
from .cache import BFLOAT16, KVCache
from .providers import ON_DEVICE, PROVIDERS, open_session
from .signature import check_signature
from .state import DecodeState, StepOutput
from .step import NO_GRAPH, DecodeBinding, GraphDecodeBinding

Array = NDArray[Any]
CPU_PREFILL_ROWS = 256
"""Tokens of all streams and texts that one prefill step reads on the CPU: with more, a product's activations leave the
core's cache (1,024 rows took 7 % longer a token at the Qwen2.5-0.5B shape)."""
PREFILL_ROWS = 1024
"""... on other providers."""


class Session:
    """One loaded artifact. Safe to share between states; a state belongs to one caller at a time."""

    def __init__(
        self,
        folder: Path | str,
        provider: str = "cpu",
        threads: int | None = None,
        spin: bool = True,
        allow_fallback: bool = False,
        kernels: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        """Load the artifact in `folder`; the other arguments are those of `open_session`. Raises ArtifactError or
        ProviderError."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_files(self.folder, self.manifest, hashes=False)
        self.onnx = open_session(self.folder / GRAPH, provider, threads, spin, allow_fallback, kernels, cuda_graph)
        check_signature(self.onnx, self.manifest)
        in_use = PROVIDERS[provider] in self.onnx.get_providers()
        self.device = ON_DEVICE.get(provider, "cpu") if in_use else "cpu"
        self.cuda_graph = cuda_graph and in_use
        self.prefill_rows = CPU_PREFILL_ROWS if provider == "cpu" else PREFILL_ROWS
        self.virtual = _read_virtual_tokens(self.folder, self.manifest)
        self.input_names = {signature.name for signature in self.manifest.inputs}

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, as onnxruntime names them."""
        return list(self.onnx.get_providers())

    @property
    def siamese(self) -> bool:
        """Whether the artifact has two streams and a gate."""
        return self.manifest.gate_kind is not None

    def new_state(self, batch: int = 1, memory_bias: float | Sequence[float] = 0.0) -> DecodeState:
        """An empty state of `batch` rows. memory_bias: one value, or one per row."""
        bias = np.array(np.broadcast_to(np.asarray(memory_bias, np.float32), (batch,)))
        if np.isnan(bias).any():
            raise SettingsError("memory_bias is not a number")
        width = self.manifest.hidden_size
        dtypes = {signature.name: signature.dtype for signature in self.manifest.inputs}
        return DecodeState(
            caches={
                group: KVCache(
                    layers,
                    2 * batch if group == "both" else batch,
                    dtypes[f"past_key_values.{group}.{next(iter(layers))}.key"],
                    self.device,
                    self.virtual if group in ("both", "adapter") else None,
                    virtual_rows=batch,
                )
                for group, layers in self.manifest.groups.items()
            },
            lengths=np.zeros(batch, np.int64),
            query_sum=np.zeros((batch, 2, width), np.float32),
            query_count=np.zeros(batch, np.float32),
            reply_sum=np.zeros((batch, 2, width), np.float32),
            reply_count=np.zeros(batch, np.float32),
            memory_bias=bias,
            pending=[None] * batch,
        )

    def prefill(self, state: DecodeState, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> StepOutput:
        """Read one prompt per row, on top of what the state already holds, and return the logits that follow.

        prompts: B sequences of token ids, of any lengths. Generated tokens since the last prefill, and a pending one,
        join the query: a continued conversation equals a fresh run over the whole of it. chunk: the most tokens of a
        text that are read at once; None is what suits the provider (on the CPU 256 rows: 128 tokens of one text in two
        streams). Raises PromptError for an empty or too long prompt, or a token outside the vocabulary; the state is
        then unchanged.
        """
        texts = [
            [*([] if pending is None else [pending]), *prompt]
            for pending, prompt in zip(state.pending, self._checked(state, prompts), strict=True)
        ]
        self._check_lengths(state, texts)
        if chunk is None:
            chunk = self._chunk(state.batch)
        if chunk < 1:
            raise SettingsError(f"prefill chunk is {chunk}; it must be at least 1")
        state.pending = [None] * state.batch
        state.query_sum += state.reply_sum
        state.query_count += state.reply_count
        state.reply_sum[:] = 0
        state.reply_count[:] = 0
        # Once for all chunks: growing copies the caches.
        self._reserve(state, int(max(length + len(text) for length, text in zip(state.lengths, texts, strict=True))))
        if self.manifest.batched_chunks:
            most = chunk if len(texts) == 1 else min(chunk, self.manifest.padding)
            return self._read_in_chunks(state, texts, None, most)
        if not state.lengths.any() and not self.virtual and max(map(len, texts)) <= chunk:
            return self._read(state, texts, None)
        # The portable form continues a cache, or virtual tokens, by more than one token for a single row only.
        rows = [self._read_in_chunks(state, [text], row, chunk) for row, text in enumerate(texts)]
        gates = [row.gate_mean for row in rows if row.gate_mean is not None]
        return StepOutput(np.concatenate([row.logits for row in rows]), np.concatenate(gates) if gates else None)

    def decode_step(self, state: DecodeState, tokens: Sequence[int] | Array) -> StepOutput:
        """Feed one chosen token per row; returns the logits that follow. Raises PromptError at the context's end."""
        chosen = np.asarray(tokens, np.int64).reshape(-1)
        if len(chosen) != state.batch:
            raise PromptError(f"{len(chosen)} tokens for {state.batch} rows")
        self._check_vocabulary(chosen)
        longest = int(state.lengths.max()) + 1
        if longest > self.manifest.context_length:
            raise PromptError(f"the text has reached the model's context of {self.manifest.context_length} tokens")
        self._reserve(state, longest)
        if state.decode_binding is None:
            state.decode_binding = (GraphDecodeBinding if self.cuda_graph else DecodeBinding)(self, state)
        state.pending = [None] * state.batch
        return state.decode_binding.step(chosen)

    def score(self, prompt: Sequence[int], continuation: Sequence[int], memory_bias: float = 0.0) -> Array:
        """Log-probabilities (nats) of each token of `continuation` after `prompt`: (len(continuation),) float64."""
        state = self.new_state(1, memory_bias)
        self._check_lengths(state, [[*prompt, *continuation]])
        chosen = np.asarray(continuation, np.int64)
        self._check_vocabulary(chosen)
        self._reserve(state, len(prompt) + len(continuation))
        logits = [self.prefill(state, [prompt]).logits]
        chunk = self._chunk(1)
        for start in range(0, len(continuation) - 1, chunk):
            part = list(continuation[start : min(start + chunk, len(continuation) - 1)])
            outputs = self._run(state, np.array([part]), np.zeros((1, len(part)), np.float32), row=None, every=True)
            logits.append(outputs["logits"][0])
            state.lengths[0] += len(part)
        table = np.concatenate(logits).astype(np.float64)
        table -= table.max(-1, keepdims=True)
        table -= np.log(np.exp(table).sum(-1, keepdims=True))
        found: Array = table[np.arange(len(chosen)), chosen]
        return found

    def _chunk(self, batch: int) -> int:
        """Tokens of each of `batch` texts to read in one step."""
        return max(1, self.prefill_rows // (len(self.manifest.streams) * batch))

    def _read_in_chunks(self, state: DecodeState, texts: list[list[int]], row: int | None, chunk: int) -> StepOutput:
        """`_read`, at most `chunk` tokens of every text at a time; a text's output is that of its last token."""
        outputs = [
            self._read(state, [text[start : start + chunk] for text in texts], row)
            for start in range(0, max(map(len, texts)), chunk)
        ]
        last = [(len(text) - 1) // chunk for text in texts]
        logits = np.stack([outputs[step].logits[index] for index, step in enumerate(last)])
        if not self.siamese:
            return StepOutput(logits, None)
        gates = [outputs[step].gate_mean for step in last]
        return StepOutput(logits, np.array([gate[index] for index, gate in enumerate(gates) if gate is not None]))

    def _read(self, state: DecodeState, texts: list[list[int]], row: int | None) -> StepOutput:
        """Read texts that are all part of the query, into every row or into one. An empty text leaves its row as it
        is; its output means nothing."""
        rows = slice(None) if row is None else slice(row, row + 1)
        longest = max(map(len, texts))
        input_ids = np.zeros((len(texts), longest), np.int64)  # right-padded: the lengths mask what follows a text
        query_mask = np.zeros((len(texts), longest), np.float32)
        for index, text in enumerate(texts):
            input_ids[index, : len(text)] = text
            query_mask[index, : len(text)] = 1
        outputs = self._run(state, input_ids, query_mask, row)
        state.lengths[rows] += query_mask.sum(-1).astype(np.int64)
        if not self.siamese:
            return StepOutput(outputs["logits"][:, 0], None)
        state.query_sum[rows] = outputs["present_query_sum"]
        state.query_count[rows] = outputs["present_query_count"]
        return StepOutput(outputs["logits"][:, 0], outputs["gate_mean"][:, 0])

    def _run(
        self, state: DecodeState, input_ids: Array, query_mask: Array, row: int | None, every: bool = False
    ) -> dict[str, Array]:
        """One run over new tokens (B, S); logits at each row's last new token, or at `every` one."""
        rows = slice(None) if row is None else slice(row, row + 1)
        batch, sequence = input_ids.shape
        lengths = state.lengths[rows]
        new = np.full(batch, sequence) if every else query_mask.sum(-1).astype(np.int64)
        wanted = np.tile(np.arange(sequence), (batch, 1)) if every else np.maximum(new[:, None] - 1, 0)
        self._reserve(state, int(lengths.max()) + sequence)  # padding needs room too
        positions = lengths[:, None] + np.arange(sequence)[None]
        feed = {
            "input_ids": input_ids,
            "position_ids": np.minimum(positions, self.manifest.context_length - 1),  # padding may lie past the end
            "seqlens_k": (lengths + new - 1).astype(np.int32),
            "total_sequence_length": np.array((lengths + new).max(), np.int32),
            "query_seqlens": new.astype(np.int32),
            "logit_positions": wanted,
            "query_mask": query_mask,
            "past_query_sum": state.query_sum[rows],
            "past_query_count": state.query_count[rows],
            "memory_bias": state.memory_bias[rows],
        }
        binding = self.onnx.io_binding()
        for name in self.input_names & feed.keys():
            binding.bind_cpu_input(name, np.ascontiguousarray(feed[name]))
        self.bind_caches(binding, state, row)
        names = ["logits", *(["gate_mean", "present_query_sum", "present_query_count"] if self.siamese else [])]
        for name in names:
            binding.bind_output(name, "cpu")
        options = onnxruntime.RunOptions()
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(NO_GRAPH))
        self.onnx.run_with_iobinding(binding, options)
        return dict(zip(names, _last_outputs(binding, len(names)), strict=True))

    def bind_caches(self, binding: onnxruntime.IOBinding, state: DecodeState, row: int | None) -> None:
        """past and present are the same buffer: attention writes new keys behind the old ones."""
        for group, cache in state.caches.items():
            for name, shape, address in cache.bindings(row):
                place = (self.device, 0, cache.element_type, shape, address)
                binding.bind_input(f"past_key_values.{group}.{name}", *place)
                binding.bind_output(f"present.{group}.{name}", *place)

    def _reserve(self, state: DecodeState, length: int) -> None:
        if any(cache.element_type == BFLOAT16 for cache in state.caches.values()):  # they do not grow
            length = self.manifest.context_length + self.manifest.padding
        moved = [cache.reserve(length) for cache in state.caches.values()]
        if any(moved):
            state.decode_binding = None

    def _checked(self, state: DecodeState, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        if len(prompts) != state.batch:
            raise PromptError(f"{len(prompts)} prompts for {state.batch} rows")
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise PromptError(f"prompt {index + 1} of {state.batch} is empty")
            self._check_vocabulary(np.asarray(prompt))
        return prompts

    def _check_vocabulary(self, tokens: Array) -> None:
        outside = tokens[(tokens < 0) | (tokens >= self.manifest.vocab_size)]
        if len(outside):
            raise PromptError(f"token id {outside[0]} is outside the vocabulary of {self.manifest.vocab_size}")

    def _check_lengths(self, state: DecodeState, texts: list[list[int]]) -> None:
        for length, text in zip(state.lengths, texts, strict=True):
            if length + len(text) > self.manifest.context_length:
                raise PromptError(
                    f"the prompt has {length + len(text)} tokens; the model's context is {self.manifest.context_length}"
                )


def _read_virtual_tokens(folder: Path, manifest: Manifest) -> dict[str, Array]:
    """layer.part -> (kv_heads, V, head_size): what the adapter stream's cache begins with. Raises ArtifactError."""
    count = manifest.virtual_tokens.get("adapter", 0)
    if not count:
        return {}
    expected = {
        f"{index}.{part}": (layer.kv_heads, count, layer.head_size)
        for index, layer in enumerate(manifest.layers)
        for part in ("key", "value")
    }
    try:
        with np.load(folder / VIRTUAL_TOKENS) as arrays:
            found = dict(arrays)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ArtifactError(f"{folder / VIRTUAL_TOKENS} cannot be read: {error}") from error
    if {name: array.shape for name, array in found.items()} != expected:
        raise ArtifactError(f"{folder / VIRTUAL_TOKENS} does not hold the virtual tokens that the manifest describes")
    return found


def _last_outputs(binding: onnxruntime.IOBinding, count: int) -> list[Array]:
    """The last `count` bound outputs as NumPy arrays: onnxruntime returns outputs in the order of binding."""
    bound = binding.get_outputs()
    return [np.asarray(value.numpy()) for value in bound[len(bound) - count :]]
