"""What is made of one model, under WORK/quality/NAME, each once and whole or not at all: texts, adapter, importance
matrix, and every format's files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.peers.environments import python_of, run
from benchmarks.quality.adapter import random_checkpoint
from benchmarks.quality.catalogue import CALIBRATION, FORMATS, Format
from benchmarks.quality.importance import write_importance
from benchmarks.quality.texts import Texts, load, read_texts, save
from export.pipeline import export_checkpoint
from export.settings import ExportSettings
from imsm_core.backbone import load_tokenizer

PEERS = Path(__file__).parents[1] / "peers"
BLOCK_SIZE = 32
SCALING_TEXTS = 3  # of each kind, to scale the random adapter on


@dataclass(frozen=True)
class TextSettings:
    """files: of each kind of judged text. calibration: of the text that GPTQ and importance matrices see. tokens: of
    each kind. longest: tokens of a text."""

    files: dict[str, Path]
    calibration: Path
    tokens: int = 1200
    longest: int = 256
    calibration_tokens: int = 8192


@dataclass(frozen=True)
class Place:
    """One model's folder. work: where the peers' environments are too. source: the Hugging Face folder. adapter: a
    CHECKPOINT, or None for a random one. context_length: of our artifacts."""

    name: str
    source: Path
    work: Path
    texts_from: TextSettings
    adapter: Path | None = None
    context_length: int = 2048

    @property
    def folder(self) -> Path:
        return self.work / "quality" / self.name

    @property
    def base(self) -> Path:
        """A link to the model, where the peers' scripts look for it; with `checkpoint` beside it."""
        link = self.folder / "base"
        if not link.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            link.symlink_to(self.source.resolve(), target_is_directory=True)
        return link

    def check_settings(self) -> None:
        """Raise SystemExit if what is there was made from something else."""
        given = self.texts_from
        settings = {
            "model": str(self.source.resolve()),
            "adapter": self.adapter and str(self.adapter.resolve()),
            "texts": {kind: str(path.resolve()) for kind, path in given.files.items()},
            "calibration": str(given.calibration.resolve()),
            "tokens": given.tokens,
            "longest": given.longest,
            "calibration_tokens": given.calibration_tokens,
            "context_length": self.context_length,
        }
        note = made(self.folder / "made_from.json", lambda draft: _write_json(settings, draft))
        for name, value in json.loads(note.read_text(encoding="utf-8")).items():
            if value != settings[name]:
                raise SystemExit(
                    f"{self.folder} was made with {name} {value}, not {settings[name]}: remove it, or choose another "
                    "model name or --work"
                )

    def texts(self) -> Texts:
        """The judged texts."""

        def make(draft: Path) -> None:
            given = self.texts_from
            save(read_texts(given.files, load_tokenizer(str(self.base)), given.tokens, given.longest), draft)

        return load(made(self.folder / "texts.json", make))

    def checkpoint(self) -> Path:
        """The CHECKPOINT that every adapter stream is from."""

        def link(draft: Path) -> None:
            assert self.adapter is not None
            draft.symlink_to(self.adapter.resolve(), target_is_directory=True)

        def make(draft: Path) -> None:
            texts = [ids for of_kind in self.texts().values() for ids in of_kind[:SCALING_TEXTS]]
            found = random_checkpoint(self.base, draft, texts)
            print(f"{self.name}: the random adapter is {found:.2f} nats from the base model", file=sys.stderr)

        return made(self.folder / "checkpoint", make if self.adapter is None else link)

    def importance(self) -> Path:
        """llama.cpp's importance matrix."""

        def make(draft: Path) -> None:
            given, file = self.texts_from, {"calibration": self.texts_from.calibration}
            tokenizer = load_tokenizer(str(self.base))
            [texts] = read_texts(file, tokenizer, given.calibration_tokens, given.longest).values()
            write_importance(self.base, texts, draft)

        return made(self.folder / "importance.npz", make)

    def model(self, name: str) -> Path:
        """The folder of a format's files. Raises Unavailable."""
        return made(self.folder / "models" / name, lambda draft: self._write(FORMATS[name], draft))

    def base_only(self, name: str) -> Path:
        """The same of one of our formats with the base stream alone, whose decode time is comparable with others'."""
        format = FORMATS[name]
        alone = Format(format.label, format.program, {**format.settings, "base_only": True})
        return made(self.folder / "models" / f"{name}-base", lambda draft: self._write(alone, draft))

    def weights(self) -> int:
        """How many weights the model has, tied ones once."""
        count = 0
        for path in sorted(self.base.glob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                count += sum(_size(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return count

    def _write(self, format: Format, draft: Path) -> None:
        self.base, self.checkpoint()
        if format.program == "ours":
            fields: dict[str, Any] = {"context_length": self.context_length, **format.settings}
            if fields.get("calibrate") == CALIBRATION:
                fields["calibrate"] = self.texts_from.calibration
            export_checkpoint(self.checkpoint(), draft, ExportSettings(**fields), str(self.base), report=_tell)
            return
        if format.program == "onnxruntime-genai":
            script, options = PEERS / "build_genai.py", ["--backbone", str(self.folder)]
            options += ["--block-size", str(BLOCK_SIZE), "--algorithm", format.settings["algorithm"]]
            run([str(python_of("genai", self.work)), str(script), str(draft), *options])
            return
        if format.settings["type"] == "F16":
            script, options = PEERS / "build_gguf.py", ["--backbone", str(self.folder), "--type", "F16"]
        else:
            script = PEERS / "quantize_gguf.py"
            options = ["--source", str(self.model("llama-f16")), "--type", format.settings["type"]]
            if format.settings["importance"]:
                options += ["--importance", str(self.importance())]
        run([str(python_of("llama", self.work)), str(script), str(draft), *options])


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, which `make` writes under another name if it is missing."""
    if not target.exists():
        print(f"making {target}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".draft-{os.getpid()}-{target.name}")
        try:
            make(draft)
            draft.rename(target)
        finally:
            if draft.is_dir() and not draft.is_symlink():
                shutil.rmtree(draft)
            else:
                draft.unlink(missing_ok=True)
    return target


def _write_json(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _size(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
