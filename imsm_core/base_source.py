"""Where a base model's files are: a folder, a GGUF file, or a hub id, and what its config.json says.

Nothing of what is found there runs, and nothing is fetched to run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub import constants, get_session
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import CONFIG_MAPPING, PreTrainedConfig, modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .errors import BaseModelError, first_line

_PROBE_SECONDS = 10.0
_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model")


@dataclass(frozen=True)
class BaseSource:
    """name: as the user gave it. place: a folder or a hub id. gguf_file: the name of a GGUF file in the folder."""

    name: str
    place: str
    revision: str | None = None
    gguf_file: str | None = None
    offline: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder, if it is a local one."""
        return Path(self.place) if Path(self.place).is_dir() else None

    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` gets. trust_remote_code: without it, transformers asks on the terminal."""
        where = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"revision": self.revision, "trust_remote_code": False, "local_files_only": self.offline, **where}


def find_source(name: str, revision: str | None = None) -> BaseSource:
    """The source that a user's `name` stands for. Raises BaseModelError if there is no such folder or file."""
    path = Path(name)
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise BaseModelError(f"no base model at {name!r}: the file does not exist")
        if find_spec("gguf") is None:
            raise BaseModelError(
                f"{name} is a GGUF file, and reading it needs gguf, which is not installed; "
                "run pip install 'imsm-runtime[gguf]'"
            )
        return BaseSource(name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if odd := next((file for file in sorted(path.iterdir()) if file.exists() and not _is_usual(file)), None):
            raise BaseModelError(f"the base model {name!r} has {odd.name}, which is no file but a pipe or a device")
        return BaseSource(name, name, revision)
    if path.is_file():
        raise BaseModelError(f"the base model {name!r} is a file; give its folder, or a GGUF file (*.gguf)")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise BaseModelError(f"no base model at {name!r}: the folder does not exist")
    return BaseSource(name, name, revision, offline=not _hub_answers())


def _is_usual(path: Path) -> bool:
    """Reading anything else may wait without end."""
    return path.is_file() or path.is_dir()


def remembered(name: str) -> str:
    """A base model's name as a checkpoint keeps it: a path whole, so that it is found from any folder."""
    return str(Path(name).resolve()) if Path(name).exists() else name


@cache
def _hub_answers() -> bool:
    """Whether the hub can be reached, by one request: transformers would try for a minute, file by file."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # of whatever client the hub's library uses
        return False
    return True


def read_config(source: BaseSource) -> dict[str, Any]:
    """The fields of config.json; empty for a GGUF file. Raises BaseModelError if there is none or it is damaged."""
    if source.gguf_file:
        return {}
    try:
        if source.folder is None:
            with quiet_libraries():
                fields: Any = PreTrainedConfig.get_config_dict(
                    source.place, revision=source.revision, local_files_only=source.offline
                )[0]
        else:
            fields = json.loads((source.folder / "config.json").read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BaseModelError(f"the base model {source.name!r} has no config.json{_instead(source)}") from error
    except RecursionError as error:
        raise BaseModelError(f"the config.json of {source.name!r} is nested too deeply") from error
    except ValueError as error:
        raise BaseModelError(f"the config.json of {source.name!r} is damaged: {first_line(error)}") from error
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise BaseModelError(f"cannot load the base model {source.name!r}: {reason(source, error)}") from error
    if not isinstance(fields, dict):
        raise BaseModelError(f"the config.json of {source.name!r} is damaged: it is not a JSON object")
    return fields


def _instead(source: BaseSource) -> str:
    """What the folder is, where it is no model's."""
    assert source.folder is not None
    if (source.folder / "adapter_config.json").is_file():
        return ": it is a PEFT adapter; give the model that it was trained on"
    if (source.folder / "imsm.json").is_file():
        return ": it is a checkpoint of this program; give the model that it was trained on"
    if files := sorted(source.folder.glob("*.gguf")):
        return f"; give the GGUF file itself, such as {files[0]}"
    return "; give a folder in Hugging Face's form: config.json, *.safetensors and a tokenizer"


def check_own_code(source: BaseSource, fields: dict[str, Any]) -> None:
    """Raise BaseModelError if transformers does not know the architecture, or if an adapter lies in the folder, which
    transformers would put on."""
    if source.gguf_file:
        return
    if source.folder is not None and (source.folder / "adapter_config.json").is_file():
        raise BaseModelError(
            f"the base model {source.name!r} has an adapter in its folder, which would change it; move its "
            "adapter_config.json and its weights elsewhere"
        )
    kind = fields.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if "auto_map" in fields:
        raise BaseModelError(
            f"the base model {source.name!r} needs its own Python code, which this program does not run; give a "
            "version of it whose architecture is in transformers"
        )
    if not isinstance(kind, str):
        raise BaseModelError(f"the config.json of {source.name!r} is damaged: it has no model_type")
    raise BaseModelError(
        f"the base model {source.name!r} has the architecture {kind!r}, which transformers {transformers.__version__} "
        "does not know; a newer version may"
    )


def check_causal(source: BaseSource, config: PreTrainedConfig) -> None:
    """Raise BaseModelError if transformers has no causal language model of that architecture."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BaseModelError(
            f"the base model {source.name!r} is a {config.model_type!r} model, and transformers has no causal language "
            "model of that architecture"
        )


def without_kernels(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without implementations that it asks for: a name such as ORG/REPO would be fetched from the hub and
    run. transformers then takes its own."""
    config._attn_implementation = None
    config._experts_implementation = None
    if hasattr(config, "fusion_config"):
        del config.fusion_config
    return config


def check_tokenizer(source: BaseSource) -> None:
    """Raise BaseModelError if a local folder has no tokenizer, or one that needs a package which is not installed."""
    folder = source.folder
    if folder is None or source.gguf_file or (folder / "tokenizer.json").is_file():
        return
    if not any((folder / name).is_file() for name in _VOCABULARIES) and not list(folder.glob("*.tiktoken")):
        raise BaseModelError(
            f"the base model {source.name!r} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it "
            "from the model that it was made from"
        )
    vocabulary = folder / "tokenizer.model"
    if not vocabulary.is_file():
        return
    package = (
        "sentencepiece" if vocabulary.read_bytes()[:1] == b"\n" else "tiktoken"
    )  # a protobuf's first field, or text
    if find_spec(package) is None:
        raise BaseModelError(
            f"the base model {source.name!r} has its tokenizer as tokenizer.model alone, and reading that needs "
            f"{package}, which is not installed; run pip install {package}, or put a tokenizer.json into the folder"
        )


def reason(source: BaseSource, error: BaseException) -> str:
    """Why a library could not load what `source` names, in one line with the way on."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if source.folder is None:
        for kind, text in (
            (GatedRepoError, "it is gated: ask for access at {url}, then log in with `hf auth login`"),
            (RevisionNotFoundError, "{url} has no revision {revision!r}"),
            (
                RepositoryNotFoundError,
                "there is no folder of that name here, and no such model at {url} (or it is "
                "private: log in with `hf auth login`)",
            ),
        ):
            if any(isinstance(link, kind) for link in chain):
                return text.format(url=f"{constants.ENDPOINT}/{source.place}", revision=source.revision)
        if source.offline:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
            return f"there is no folder of that name here, {why}, and the cache in {constants.HF_HUB_CACHE} lacks it"
    if any(isinstance(link, MemoryError) for link in chain) or "can't allocate memory" in str(error):
        return "it does not fit into memory"
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return (
            "it needs its own Python code, which this program does not run; if tokenizer.json is all of it, take "
            "auto_map out of tokenizer_config.json and set tokenizer_class to PreTrainedTokenizerFast there"
        )
    if isinstance(error, RecursionError):
        return "a JSON file in it is nested too deeply"
    return first_line(error)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers and the hub's client report at length, on stderr, what an error's line says, and draw bars."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    levels = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    gguf: Any = modeling_gguf_pytorch_utils
    gguf_bar, gguf.tqdm = gguf.tqdm, transformers.utils.logging.tqdm  # it draws one that cannot be switched off
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        if bars:
            transformers.utils.logging.enable_progress_bar()
        transformers.logging.set_verbosity(levels[0])
        huggingface_hub.logging.set_verbosity(levels[1])
