"""The runtime's own commands: generate, inspect, verify, bench, doctor. None of them needs PyTorch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench.settings import BenchSettings
from .engine.execution import Execution
from .errors import SettingsError
from .generation.settings import GenerationSettings
from .interrupts import loading
from .options import read_options
from .streams import read_prompt

if TYPE_CHECKING:
    from .console import Commands

NEEDS: dict[str, Any] = {"needs": ("onnxruntime",), "extra": "cpu"}


def register(commands: Commands) -> None:
    """Add the commands."""
    _add_generate(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_bench(commands)
    _add_doctor(commands)


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder, as `export` writes it")


def _add_generate(commands: Commands) -> None:
    parser = commands.add("generate", _generate, "generate text from an artifact", **NEEDS)
    _add_artifact(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt, or - to read it from stdin")
    commands.add_options(parser, GenerationSettings)
    commands.add_options(parser, Execution)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def _generate(args: argparse.Namespace) -> int:
    settings, execution = read_options(GenerationSettings, args), read_options(Execution, args)
    prompt = read_prompt(args.prompt)
    with loading():
        from .generation.generation import generate, load, stream_generate

    model = load(args.artifact, execution)
    if args.json:
        result = generate(model, prompt, settings)
        document = {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "gate_mean": result.gate_means,
            "timings": vars(result.timings),
            "providers": model.session.providers,
        }
        print(json.dumps(document))
        return 0
    for chunk in stream_generate(model, prompt, settings):
        print(chunk.text, end="", flush=True)
    print()
    return 0


def _add_inspect(commands: Commands) -> None:
    parser = commands.add("inspect", _inspect, "describe an artifact")
    _add_artifact(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(args: argparse.Namespace) -> int:
    from .inspect import format_summary, summarize

    facts = summarize(args.artifact)
    print(json.dumps(facts) if args.json else format_summary(facts))
    return 0


def _add_verify(commands: Commands) -> None:
    def verify(args: argparse.Namespace) -> int:
        return _verify(args, commands)

    parser = commands.add("verify", verify, "check that an artifact is complete and unchanged", **NEEDS)
    _add_artifact(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="also compare with this checkpoint in PyTorch")
    parser.add_argument("--base", metavar="DIR_OR_HUB_ID", help="where the checkpoint's base model is now")
    text = "execution provider that loads the graph, and runs it for --checkpoint: cpu, cuda, openvino, ..."
    parser.add_argument("--provider", default="cpu", metavar="NAME", help=text)


def _verify(args: argparse.Namespace, commands: Commands) -> int:
    with loading():
        from .engine.signature import check_sections
        from .folder import check_files, unlisted_files
        from .generation.generation import load
        from .generation.hard_texts import check_prompts
        from .manifest import read_manifest
        from .printable import printable

    if args.base is not None and args.checkpoint is None:
        raise SettingsError("base", args.base, "it needs {checkpoint}")
    manifest = read_manifest(args.artifact)
    check_files(args.artifact, manifest, hashes=True)
    print(f"files    {len(manifest.files)} files have the sizes and sha256 of the manifest")
    for name in unlisted_files(args.artifact, manifest):
        print(f"beside   {printable(name)} is not part of the artifact and is not read")
    model = load(args.artifact, Execution(args.provider))
    check_sections(model.session.onnx, manifest, edited=False)
    print(f"graph    {len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs are those of the manifest")
    print("manifest it is the one that the graph was exported with")
    count = check_prompts(args.artifact, manifest.special_tokens, manifest.raw["prompts"])
    print(f"prompts  {count} texts and conversations get the token ids that they had at the export")
    if args.checkpoint is not None:
        parity = commands.service("check_parity")(args.artifact, args.checkpoint, args.base, args.provider)
        print(f"parity   {_parity_line(parity)} on {args.provider}")
    print("ok")
    return 0


def _parity_line(parity: dict[str, Any]) -> str:
    """What `verify --checkpoint` found. Of a rounded artifact, whose values the checkpoint does not have, the middle
    position: single ones may be far off."""
    if parity["middle_change"] is None:
        worst = max(value for row in parity["max_abs_difference"].values() for value in row.values())
        return f"largest difference from PyTorch {worst:.1e}"
    worst = max(value for row in parity["middle_change"].values() for value in row.values())
    why = "not judged: the artifact's values are rounded, the checkpoint's are not"
    return f"rounding changes the middle position by {worst:.1%} of its size ({why})"


def _add_bench(commands: Commands) -> None:
    parser = commands.add("bench", _bench, "measure an artifact; the last line of stdout is JSON", **NEEDS)
    _add_artifact(parser)
    text = "execution providers to compare, or all that start; if one cannot run, the others still do; exit code 1"
    parser.add_argument("--providers", default="cpu", metavar="A,B", help=text)
    parser.add_argument("--prompt-lengths", default="32,128", metavar="N,N", help="prompt lengths in tokens")
    commands.add_options(parser, BenchSettings)
    commands.add_options(parser, Execution, leave_out=("provider",))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON document to FILE")


def _bench(args: argparse.Namespace) -> int:
    with loading():
        from .bench.compare import bench, format_table, named_providers

    if args.json is not None:
        _check_file(args.json)
    try:
        lengths = tuple(int(length) for length in args.prompt_lengths.split(","))
    except ValueError as error:
        raise SettingsError("prompt_lengths", args.prompt_lengths, "they must be numbers like 32,128") from error
    providers = named_providers(args.providers)
    if args.cuda_graph and "cuda" not in providers:
        raise SettingsError("providers", args.providers, "{cuda_graph} needs cuda")
    execution = read_options(Execution, args, provider="cuda" if args.cuda_graph else "cpu")
    settings = read_options(BenchSettings, args, prompt_lengths=lengths, execution=execution)
    document = bench(args.artifact, providers, settings)
    print(format_table(document))
    text = json.dumps(document)
    print(text)
    if args.json is not None:
        try:
            args.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:  # one of writing has no name of a file
            raise OSError(error.errno, error.strerror, str(args.json)) from error
    failures = [facts for facts in document["providers"] if "error" in facts]
    for facts in failures:
        print(f"error: {facts['provider']} did not run: {facts['error']}", file=sys.stderr)
    return 1 if failures else 0


def _check_file(path: Path) -> None:
    """Raise SettingsError if --json cannot be written: before the measurement, not after it."""
    if not path.absolute().parent.is_dir():
        raise SettingsError("json", path, "its folder does not exist")
    if path.is_dir():
        raise SettingsError("json", path, "it is a folder")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise SettingsError("json", path, "there is no permission to write it")


def _add_doctor(commands: Commands) -> None:
    parser = commands.add("doctor", _doctor, "show what this machine can run", **NEEDS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _doctor(args: argparse.Namespace) -> int:
    with loading():
        from .doctor import examine, format_report

    facts = examine()
    print(json.dumps(facts) if args.json else format_report(facts))
    return 1 if facts["problems"] else 0
