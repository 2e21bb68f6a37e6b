"""The texts that an export calibrates and measures on, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .settings import ExportSettings
from .verification.quality import read_eval_texts

CALIBRATION_TEXTS = 64
RANDOM_TEXTS, RANDOM_TOKENS = 8, 64


@dataclass(frozen=True)
class Texts:
    """Token ids: to calibrate weights on, to find the scales of int8 caches on, and to measure the quality on."""

    calibration: list[list[int]]
    scales: list[list[int]]
    evaluation: list[list[int]]


def read_texts(settings: ExportSettings, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Texts:
    """The texts that the settings ask for, each cut to the context. Raises DataError or ExportError."""

    def read(path: Path | None, limit: int) -> list[list[int]]:
        return [] if path is None else read_eval_texts(path, tokenizer, context_length, limit)

    given = read(settings.calibrate, CALIBRATION_TEXTS)
    # The scales of int8 caches fit random tokens too: what exceeds a scale is clipped, and a prompt may be anything.
    generator = np.random.default_rng(0)
    length = min(context_length, RANDOM_TOKENS)
    wild = [generator.integers(0, len(tokenizer), length).tolist() for _ in range(RANDOM_TEXTS)]
    calibration = given if settings.bits is not None else []
    return Texts(calibration, given + wild, read(settings.eval_data, settings.eval_texts))
