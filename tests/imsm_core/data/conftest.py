"""Tokenizers with and without a chat template."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from tests.builders import CHAT_TEMPLATE, make_tokenizer


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="package")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)
