"""The models that the stages run, with random weights, each exported in seconds: nothing is verified while exporting.

python -m benchmarks.cuda.models WORK SIZE NAME ...    makes artifacts ahead of the stages that need them
"""

from __future__ import annotations

import copy
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.shapes import GATE, GATE_RANK, SHAPES, small_tokenizer
from export.settings import ExportSettings

if TYPE_CHECKING:
    from imsm_core.checkpoint import CheckpointInfo
    from imsm_core.siamese import SiameseModel

RANK = 16
TRACED_LAYERS = 3
"""Of a deep model: the first, the one that is repeated, and the last."""
ADAPTER_SHARE = 0.5
"""How large the adapter's change of a product is beside its input, about: visible, and no larger than the product."""
WEIGHT, EMBEDDING, NORM = 1.5, 0.5, 0.1
"""Standard deviations of random weights (times 1 / sqrt(d)), embeddings, and of norms around 1: with them the logits
are spread like those of a trained model, so that the likeliest token is not a matter of rounding."""
PARITY_SHAPE: dict[str, Any] = {**SHAPES["tiny"], "num_hidden_layers": 3, "max_position_embeddings": 1024}


@dataclass(frozen=True)
class Recipe:
    """One artifact. shape: of the traced model. adapter: lora (rank 16, on all seven projections) or prefix_tuning.
    first_layer: the first one with an adapter. layers: how many the artifact has, where that is more than what is
    traced: the middle one is repeated in the file, and the copies share its bytes there."""

    shape: dict[str, Any]
    settings: ExportSettings
    gate: str = GATE
    adapter: str = "lora"
    first_layer: int = 0
    layers: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Size:
    """What `full` and `small` differ in. shapes: of the middle-sized and of the large model."""

    middle: dict[str, Any]
    large: dict[str, Any]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    large_contexts: tuple[int, ...]
    large_batches: tuple[int, ...]
    large_prompt: int
    steps: int
    decode_steps: int
    """Of the parity texts."""
    tuning_steps: int
    tuning_batch: int
    questions: int
    """The most that the tuned model is asked of a kind."""
    wide: tuple[int, ...] = field(default=(32, 128))
    """Block sizes of the large model's int4 weights."""


SIZES = {
    "full": Size(
        middle=SHAPES["qwen2.5-0.5b"],
        large=SHAPES["llama-3.1-8b"],
        contexts=(128, 2048),
        batches=(1, 4, 16),
        large_contexts=(128, 2048),
        large_batches=(1, 4),
        large_prompt=512,
        steps=64,
        decode_steps=24,
        tuning_steps=50,
        tuning_batch=8,
        questions=100,
    ),
    "small": Size(
        middle=SHAPES["tiny"],
        large={**PARITY_SHAPE, "model_type": "llama", "num_hidden_layers": 6, "tie_word_embeddings": False},
        contexts=(16, 64),
        batches=(1, 2),
        large_contexts=(16,),
        large_batches=(1, 2),
        large_prompt=32,
        steps=16,
        decode_steps=8,
        tuning_steps=2,
        tuning_batch=2,
        questions=3,
        wide=(32,),
    ),
}


def recipes(size: Size) -> dict[str, Recipe]:
    """Every artifact that is measured for its speed, by its folder's name."""
    found: dict[str, Recipe] = {}
    for alone in (False, True):
        ending = "-base" if alone else ""
        found[f"middle-fp16{ending}"] = Recipe(size.middle, ExportSettings(precision="fp16", base_only=alone))
        found[f"middle-int4{ending}"] = Recipe(size.middle, _int4(32, alone))
        traced = {**size.large, "num_hidden_layers": TRACED_LAYERS}
        layers = size.large["num_hidden_layers"]
        found[f"large-fp16{ending}"] = Recipe(traced, ExportSettings(precision="fp16", base_only=alone), layers=layers)
        for block in size.wide:
            found[f"large-int4-{block}{ending}"] = Recipe(traced, _int4(block, alone), layers=layers)
    return found


def _int4(block: int, alone: bool) -> ExportSettings:
    return ExportSettings("int4", activations="fp16", block_size=block, rounding="nearest", base_only=alone)


def siamese_model(recipe: Recipe, device: str = "cpu") -> SiameseModel:
    """The model of a recipe, without its repeated layers, on the CPU in float32. device: where its values are drawn."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from imsm_core.adapters.attach import attach_adapter
    from imsm_core.adapters.methods import linear_layers, peft_config
    from imsm_core.gates import make_gate
    from imsm_core.siamese import SiameseModel

    torch.manual_seed(recipe.seed)
    config = AutoConfig.for_model(**recipe.shape)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    width = int(recipe.shape["hidden_size"])
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=NORM)
            else:
                parameter.normal_(std=EMBEDDING if "embed" in name else WEIGHT / width**0.5)
    base = base.cpu()
    if device == "cuda":
        torch.cuda.empty_cache()  # another process measures what is in use
    base = base.requires_grad_(False).eval()
    if recipe.adapter == "lora":
        layers = [name for name in linear_layers(base) if _layer_of(name) >= recipe.first_layer]
        peft = peft_config("lora", RANK, RANK, 0.0, layers if recipe.first_layer else None)
    else:
        peft = peft_config(recipe.adapter, virtual_tokens=4, model=base)
    model = SiameseModel(attach_adapter(base, peft), make_gate(recipe.gate, width, GATE_RANK))
    torch.manual_seed(recipe.seed + 1)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.normal_(std=(ADAPTER_SHARE / (width * RANK) ** 0.5) ** 0.5)
    return model.eval()


def _layer_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def export_unverified(
    model: SiameseModel, recipe: Recipe, folder: Path, reference_on: str | None = None
) -> SiameseModel | None:
    """Write the artifact of a recipe's model, in place of one that is there. reference_on: a device for a copy of the
    model in float32, with the weights that the file has, which is returned."""
    from imsm_core.checkpoint import CheckpointInfo

    peft_type = {"lora": "LORA", "prefix_tuning": "PREFIX_TUNING"}[recipe.adapter]
    info = CheckpointInfo("random weights", None, "", recipe.gate, GATE_RANK, peft_type)
    tokenizer = small_tokenizer(recipe.shape["vocab_size"])
    return publish_unverified(model, tokenizer, info, recipe.settings, folder, recipe.layers, reference_on)


def publish_unverified(
    model: SiameseModel,
    tokenizer: Any,
    info: CheckpointInfo,
    settings: ExportSettings,
    folder: Path,
    layers: int | None = None,
    reference_on: str | None = None,
) -> SiameseModel | None:
    """The export that users call, without its comparison with PyTorch on the CPU. layers, reference_on: as in `Recipe`
    and `export_unverified`."""
    from benchmarks.cuda.deepen import deepen
    from export.artifact import MANIFEST
    from export.passes.quantization import Quantized
    from export.pipeline import Verified, describe, finish, write, write_encoder
    from export.prepare import prepare
    from export.settings import TOLERANCES
    from export.verification.parity import ParityReport
    from imsm_core.files import publish_folder

    prepared = prepare(model, tokenizer, info, settings, _say_nothing)
    reference = None
    with publish_folder(folder, MANIFEST, True) as draft:
        encoder = write_encoder(prepared, draft, _say_nothing)
        written = write(prepared, draft, _say_nothing)
        if reference_on is not None:
            with prepared.with_weights_of(written.quantized or Quantized()):
                reference = copy.deepcopy(model).to(reference_on)
        passes = dict(written.passes)
        if written.quantized is not None:
            passes |= finish(prepared, written, draft)
        verified = Verified(passes, ParityReport(TOLERANCES["float16"]), None, None)
        describe(prepared, encoder, written, verified, draft)
        if layers is not None:
            deepen(draft, layers)
    return reference


def _say_nothing(line: str) -> None:
    pass


def artifact(name: str, work: Path, size: str) -> Path:
    """WORK/NAME, made if it is missing; where another process is making it, this one waits."""
    folder = work / name
    with _alone(work / f"{name}.lock"):
        if not folder.is_dir():
            recipe = recipes(SIZES[size])[name]
            export_unverified(siamese_model(recipe, fastest_device()), recipe, folder)
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fastest_device() -> str:
    """Where PyTorch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    work, size, *names = sys.argv[1:]
    for name in names:
        artifact(name, Path(work), size)


if __name__ == "__main__":
    main()
