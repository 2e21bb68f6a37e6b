"""Stage 2: what the runtime computes on the device, beside PyTorch in float32 on the same device with the weights of
the file, and beside what PyTorch itself computes in half precision."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cuda.document import Document, Plan
from benchmarks.cuda.models import PARITY_SHAPE, SIZES, Recipe, Size, export_unverified, recipes, siamese_model
from export.settings import TOLERANCES, ExportSettings
from export.verification.parity import LIMIT_OF_ROUNDING
from imsm_core.choices import GATE_KINDS
from runtime import Session
from runtime.engine.execution import Execution
from runtime.engine.state import DecodeState

if TYPE_CHECKING:
    from imsm_core.siamese import SiameseModel

Array = NDArray[Any]
TOKENS_EQUAL, NEAR_TIE = 0.9, 0.1
"""The share of positions whose likeliest token must be PyTorch's, and how close PyTorch's two likeliest logits may be
for another choice to count as the same."""
FORCED = 1e4
CACHE_BLOCK = 256
WORKERS = 4
TOP, SAME = 5, 1e-3
"""How many tokens are chosen on the device, and how far their logits and the normalizer may be from NumPy's."""


@dataclass(frozen=True)
class Case:
    """One artifact and what is done with it. checks: keys of CHECKS. rounds: whether the graph rounds to int8 as it
    computes, so that only most positions are near PyTorch's. dtype: of PyTorch's own half precision beside it."""

    recipe: Recipe
    checks: tuple[str, ...]
    rounds: bool = False
    dtype: str = "float16"


def cases(size: Size, provider: str) -> dict[str, Case]:
    """Every case by name."""
    fp16, int4 = ExportSettings(precision="fp16"), ExportSettings(precision="int4", activations="fp16")
    tiny = Recipe(PARITY_SHAPE, fp16)
    every = tuple(CHECKS)
    on_cpu = provider == "cpu"  # where products with int4 weights round their inputs to int8
    found: dict[str, Case] = {}
    for name in ("middle-fp16", "middle-int4"):  # the longest first
        rounds = on_cpu and "int4" in name
        found[name] = Case(recipes(size)[name], ("ragged", "memories", "continued"), rounds=rounds)
    found["fp16"] = Case(tiny, every)
    found["int4"] = Case(replace(tiny, settings=int4), every, rounds=on_cpu)
    for kind in GATE_KINDS[1:]:
        found[f"gate {kind}"] = Case(replace(tiny, gate=kind), ("memories", "continued"))
    found["trunk"] = Case(replace(tiny, first_layer=1), every)
    found["virtual tokens"] = Case(replace(tiny, adapter="prefix_tuning"), every)
    int8 = ExportSettings(precision="int8", activations="fp16")
    found["int8"] = Case(replace(tiny, settings=int8), ("ragged", "memories"), rounds=on_cpu)
    found["int8 caches"] = Case(replace(tiny, settings=replace(fp16, kv_cache="int8")), every, rounds=True)
    if not on_cpu:  # which has no bfloat16
        found["bf16"] = Case(replace(tiny, settings=ExportSettings(precision="bf16")), every, dtype="bfloat16")
    return found


@dataclass
class Row:
    """One text of a state: its tokens, how many of them are the query, and logits by position as they were found."""

    bias: float = 0.0
    text: list[int] = field(default_factory=list)
    query: int = 0
    found: list[tuple[int, int, Array]] = field(default_factory=list)

    def note(self, logits: Array) -> None:
        self.found.append((len(self.text) - 1, self.query, logits.copy()))

    def copy(self) -> Row:
        return Row(self.bias, list(self.text), self.query, list(self.found))


class Conversation:
    """A state and what has been read into its rows."""

    def __init__(self, session: Session, biases: list[float], seed: int = 0) -> None:
        self.session = session
        self.state = session.new_state(len(biases), biases)
        self.rows = [Row(bias) for bias in biases]
        self.random = np.random.default_rng(seed)

    def text(self, length: int) -> list[int]:
        """Random tokens."""
        return [int(token) for token in self.random.integers(0, self.session.manifest.vocab_size, length)]

    def read(self, prompts: list[list[int]]) -> None:
        """Prefill."""
        logits = self.session.prefill(self.state, prompts).logits
        for row, prompt, found in zip(self.rows, prompts, logits, strict=True):
            row.text += prompt
            row.query = len(row.text)
            row.note(found)

    def decode(self, steps: int) -> None:
        """Greedy steps of every row."""
        for _ in range(steps):
            tokens = [int(row.found[-1][2].argmax()) for row in self.rows]
            logits = self.session.decode_step(self.state, tokens).logits
            for row, token, found in zip(self.rows, tokens, logits, strict=True):
                row.text.append(token)
                row.note(found)


def _ragged(session: Session, steps: int) -> list[Row]:
    """Three rows of different lengths."""
    talk = Conversation(session, [0.0, 0.0, 0.0])
    talk.read([talk.text(length) for length in (23, 1, 12)])
    talk.decode(steps)
    return talk.rows


def _memories(session: Session, steps: int) -> list[Row]:
    """The same prompt through the base memory, the adapter's and the blend."""
    talk = Conversation(session, [FORCED, -FORCED, 0.0])
    talk.read([talk.text(17)] * 3)
    talk.decode(steps)
    return talk.rows


def _continued(session: Session, steps: int) -> list[Row]:
    """A second prompt on top of the reply to the first."""
    talk = Conversation(session, [0.0, 0.5])
    for lengths in ((9, 14), (11, 5)):
        talk.read([talk.text(length) for length in lengths])
        talk.decode(max(2, steps // 2))
    return talk.rows


def _rows(session: Session, steps: int) -> list[Row]:
    """Rows that are copied, joined, dropped and cut back on the device."""
    talk, other = Conversation(session, [0.0, 0.0]), Conversation(session, [-0.5], seed=1)
    talk.read([talk.text(13), talk.text(6)])
    other.read([other.text(8)])
    talk.decode(3)
    other.decode(2)
    taken: DecodeState = talk.state.take([1, 0, 1])
    taken.join(other.state)
    taken.drop([2])
    talk.state, talk.rows = taken, [talk.rows[1].copy(), talk.rows[0].copy(), other.rows[0].copy()]
    talk.decode(3)
    lengths = [len(row.text) - 2 for row in talk.rows]
    talk.state.trim(lengths)
    for row, length in zip(talk.rows, lengths, strict=True):
        del row.text[length:]
        row.found = [entry for entry in row.found if entry[0] < length]
    talk.decode(max(2, steps // 2))
    return talk.rows


def _growth(session: Session, steps: int) -> list[Row]:
    """Caches that grow past a block while decoding."""
    talk = Conversation(session, [0.0, 0.0])
    talk.read([talk.text(CACHE_BLOCK - 3), talk.text(40)])
    talk.decode(max(6, steps // 2))
    return talk.rows


CHECKS: dict[str, Callable[[Session, int], list[Row]]] = {
    "ragged": _ragged,
    "memories": _memories,
    "continued": _continued,
    "rows": _rows,
    "growth": _growth,
}


def _likeliest(session: Session, steps: int, plan: Plan) -> dict[str, Any]:
    """Tokens that are chosen on the device, beside the whole logits of a second state with the same texts."""
    whole, chosen = (Conversation(session, [0.0, 0.5]) for _ in range(2))
    prompts = [whole.text(11), whole.text(4)]
    whole.read(prompts)
    found = session.prefill_likeliest(chosen.state, prompts, TOP, probabilities=True)
    logits = np.stack([row.found[-1][2] for row in whole.rows])
    ids, differences = [], [0.0]
    for step in range(steps + 1):
        if step:
            tokens = found.ids[:, 0]
            found = session.decode_likeliest(chosen.state, tokens, TOP, probabilities=True)
            logits = session.decode_step(whole.state, tokens).logits
        assert found.log_normalizer is not None
        picked = np.take_along_axis(logits, found.ids, -1)
        ids.append(picked[:, 0] == logits.max(-1))
        differences.append(float(np.abs(np.sort(picked)[:, ::-1] - np.sort(logits)[:, : -TOP - 1 : -1]).max()))
        differences.append(float(np.abs(found.logits - picked).max()))
        normalizer = np.log(np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        differences.append(float(np.abs(found.log_normalizer - normalizer).max()))
    share, largest = float(np.mean(ids)), max(differences)
    result: dict[str, Any] = {"positions": len(ids) * 2, "largest": share, "max_abs": round(largest, 6)}
    return result | {"limit": SAME, "ok": None if plan.rehearse else share == 1 and largest <= SAME}


def run(plan: Plan, document: Document) -> None:
    """A result for every case and check, with and without a CUDA graph where there are any."""
    import torch

    size = SIZES[plan.size]
    device = "cuda" if plan.provider == "cuda" and torch.cuda.is_available() else "cpu"
    document.note("pytorch_on", device)
    document.note("limits", {"tokens_equal": TOKENS_EQUAL, "near_tie": NEAR_TIE, "tolerance": TOLERANCES["float16"]})
    chosen = [name for name in cases(size, plan.provider) if plan.wants(name)]
    for seconds, results in _run_all(chosen, device, plan):
        document.add("exports", seconds)
        for result in results:
            document.add("results", result)
    judged = [result["ok"] for result in document.data.get("results", []) if result["ok"] is not None]
    document.note(
        "summary", {"checks": len(document.data.get("results", [])), "judged": len(judged), "ok": sum(judged)}
    )


def _run_all(names: list[str], device: str, plan: Plan) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """What `_run_case` returns for each name, as they end: an export keeps one core busy, and there are many."""
    workers = min(WORKERS, len(names)) if plan.provider == "cuda" else 1
    if workers < 2:
        for name in names:
            yield _run_case(name, device, plan)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_run_case, name, device, plan) for name in names]):
            yield future.result()


def _run_case(name: str, device: str, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How long the export took, and a result for every check, with and without a CUDA graph where there are any."""
    import torch

    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    size = SIZES[plan.size]
    case, start = cases(size, plan.provider)[name], time.perf_counter()
    folder = plan.work / name.replace(" ", "-")
    results: list[dict[str, Any]] = []
    try:
        reference = export_unverified(siamese_model(case.recipe, device), case.recipe, folder, device)
        assert reference is not None
        halved = copy.deepcopy(reference)
        halved.causal_lm.to(getattr(torch, case.dtype))
        exported = {"case": name, "seconds": round(time.perf_counter() - start, 1)}
        for graph in (False, True) if plan.provider == "cuda" else (False,):
            session: Session | None = None
            for check in (*case.checks, "likeliest"):
                start = time.perf_counter()
                result: dict[str, Any] = {"case": name, "check": check, "cuda_graph": graph}
                try:
                    if session is None:
                        session = Session(folder, Execution(provider=plan.provider, cuda_graph=graph))
                    if check == "likeliest":
                        result |= _likeliest(session, size.decode_steps, plan)
                    else:
                        result |= _judged(CHECKS[check](session, size.decode_steps), reference, halved, case, plan)
                except Exception as error:  # one that fails must not hide the others
                    result |= {"ok": None if plan.rehearse else False, "error": _told(error)}
                result["seconds"] = round(time.perf_counter() - start, 2)
                results.append(result)
    except Exception as error:
        exported = {"case": name, "error": _told(error)}
        results.append({"case": name, "check": "export", "ok": False, "error": _told(error)})
    gc.collect()
    return exported, results


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _judged(rows: list[Row], reference: SiameseModel, halved: SiameseModel, case: Case, plan: Plan) -> dict[str, Any]:
    """How far the rows are from PyTorch, and whether that is within what half precision explains."""
    found = np.stack([logits for row in rows for _, _, logits in row.found])
    wanted, half = (np.concatenate([expected(model, row) for row in rows]) for model in (reference, halved))
    own, torchs = _distance(found, wanted), _distance(half, wanted)
    result: dict[str, Any] = {"positions": len(found), **own, "pytorch_half": torchs, "ok": None}
    if plan.rehearse:
        return result
    if case.rounds:
        near = own["middle_rms"] <= LIMIT_OF_ROUNDING
        return result | {"ok": bool(np.isfinite(found).all() and near)}
    limit = max(TOLERANCES["float16"] * (1 + float(np.abs(wanted).max())), 2 * torchs["max_abs"])
    equal = own["tokens_equal"] >= min(TOKENS_EQUAL, torchs["tokens_equal"])
    return result | {"limit": round(limit, 5), "ok": bool(own["max_abs"] <= limit and equal)}


def _distance(found: Array, wanted: Array) -> dict[str, float]:
    """max_abs: the largest difference of logits; relative: to the largest logit; middle_rms: of a position's
    difference, relative to its size, the median; tokens_equal: with near ties counted as equal."""
    differences = found.astype(np.float64) - wanted
    sizes = np.sqrt((wanted.astype(np.float64) ** 2).mean(-1))
    chosen = np.take_along_axis(wanted, found.argmax(-1)[:, None], -1)[:, 0]
    equal = wanted.max(-1) - chosen <= NEAR_TIE
    largest = float(np.abs(differences).max())
    return {
        "max_abs": round(largest, 6),
        "relative": round(largest / float(np.abs(wanted).max()), 6),
        "middle_rms": round(float(np.median(np.sqrt((differences**2).mean(-1)) / sizes)), 6),
        "tokens_equal": round(float(equal.mean()), 4),
        "tokens_same": round(float((found.argmax(-1) == wanted.argmax(-1)).mean()), 4),
    }


def expected(model: SiameseModel, row: Row) -> Array:
    """(positions, vocab) float32: PyTorch's logits where the row has some; uncached, one pass over the whole text."""
    import torch

    with torch.no_grad():
        device = next(model.parameters()).device
        states = model.stream_states(torch.tensor([row.text], device=device))
        found: list[Any] = []
        for query in dict.fromkeys(query for _, query, _ in row.found):
            places = [position for position, own, _ in row.found if own == query]
            mask = torch.zeros((1, len(row.text)), device=device)
            mask[:, :query] = 1
            index = torch.tensor(places, device=device)
            logits, _ = model.fused_logits(states, mask, torch.zeros_like(index), index, row.bias)
            found.append(logits.float().cpu().numpy())
    return np.concatenate(found)
