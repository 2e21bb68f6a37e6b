"""The runtime's own commands: generate, inspect, verify, bench, doctor. None of them needs PyTorch.

Answers go to stdout, everything else to stderr; a user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import IMSMRuntimeError, SettingsError

ParityCheck = Callable[[Path, Path, str | None], dict[str, Any]]
"""(artifact, checkpoint, base model) -> parity report; given by a command line that has PyTorch."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """The torch-free command line, `imsm`."""
    parser = argparse.ArgumentParser(prog="imsm", description="Generate text from exported IMSM models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    register(parser.add_subparsers(required=True, metavar="COMMAND"))
    return run(parser, argv, (IMSMRuntimeError,))


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, user_errors: tuple[type[Exception], ...]) -> int:
    """Parse and run a command; exit codes: 0, 1 (not what was asked for), 2 (a user's mistake), 130 (Ctrl-C)."""
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except user_errors as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def register(subparsers: Any, check_parity: ParityCheck | None = None) -> None:
    """Add the commands. check_parity: makes `verify --checkpoint` possible."""
    _add_generate(subparsers)
    _add_inspect(subparsers)
    _add_verify(subparsers, check_parity)
    _add_bench(subparsers)
    _add_doctor(subparsers)


def _command(subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
    parser = subparsers.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
    parser.set_defaults(run=run)
    return parser


def _add_execution(parser: Any) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="threads; without it the usable physical cores")
    parser.add_argument("--no-spin", action="store_true", help="let idle threads sleep: slower, kinder to others")
    parser.add_argument("--allow-fallback", action="store_true", help="go on if the provider does not start")
    parser.add_argument("--no-kernels", action="store_true", help="run onnxruntime's own kernels only: slower")
    parser.add_argument("--cuda-graph", action="store_true", help="capture decode steps and replay them (cuda only)")


def _execution(args: argparse.Namespace) -> tuple[int | None, bool, bool, bool, bool]:
    """threads, spin, allow_fallback, kernels and cuda_graph."""
    return args.threads, not args.no_spin, args.allow_fallback, not args.no_kernels, args.cuda_graph


def _add_generate(subparsers: Any) -> None:
    parser = _command(subparsers, "generate", _generate, "generate text from an artifact")
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder, as `export` writes it")
    add("--prompt", required=True, metavar="TEXT", help="the prompt, or - to read it from stdin")
    add("--raw", action="store_true", help="send the text as it is, without the chat template")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="stop after so many tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 is all")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that add up to P")
    add("--min-p", type=float, default=0.0, metavar="P", help="sample from tokens P times as likely as the likeliest")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add("--memory-bias", type=float, default=0.0, metavar="X", help="above 0 towards the base memory, below 0 away")
    add("--provider", default="cpu", metavar="NAME", help="execution provider: cpu, cuda, openvino, ...")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    _add_execution(parser)


def _generate(args: argparse.Namespace) -> int:
    from .generation import generation
    from .generation.sampling import make_sampler

    sampler = make_sampler(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model = generation.load(args.artifact, args.provider, *_execution(args))
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "sampler": sampler,
        "raw": args.raw,
        "memory_bias": args.memory_bias,
    }
    if args.json:
        result = generation.generate(model, prompt, **settings)
        means = result.gate_means
        document = {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "gate_mean": means,
            "timings": vars(result.timings),
            "providers": model.session.providers,
        }
        print(json.dumps(document))
        return 0
    for chunk in generation.stream_generate(model, prompt, **settings):
        print(chunk.text, end="", flush=True)
    print()
    return 0


def _add_inspect(subparsers: Any) -> None:
    parser = _command(subparsers, "inspect", _inspect, "say what an artifact is")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(args: argparse.Namespace) -> int:
    from .inspect import format_summary, summarize

    facts = summarize(args.artifact)
    print(json.dumps(facts) if args.json else format_summary(facts))
    return 0


def _add_verify(subparsers: Any, check_parity: ParityCheck | None) -> None:
    parser = _command(subparsers, "verify", _verify, "check that an artifact is whole and unchanged")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    parser.set_defaults(check_parity=check_parity, checkpoint=None, base=None)
    if check_parity is not None:
        parser.add_argument(
            "--checkpoint", type=Path, metavar="CKPT", help="also compare with this checkpoint in PyTorch"
        )
        parser.add_argument("--base", metavar="DIR_OR_HUB_ID", help="where the checkpoint's base model is now")


def _verify(args: argparse.Namespace) -> int:
    from .generation.generation import load
    from .manifest import check_files, read_manifest

    manifest = read_manifest(args.artifact)
    check_files(args.artifact, manifest, hashes=True)
    print(f"files    {len(manifest.files)} files have the sizes and sha256 of the manifest")
    load(args.artifact)
    print(f"graph    {len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs are those of the manifest")
    if args.checkpoint is not None:
        parity = args.check_parity(args.artifact, args.checkpoint, args.base)
        worst = max(value for row in parity["max_abs_difference"].values() for value in row.values())
        print(f"parity   largest difference from PyTorch {worst:.1e}")
    print("ok")
    return 0


def _add_bench(subparsers: Any) -> None:
    parser = _command(subparsers, "bench", _bench, "measure an artifact; the last line of stdout is JSON")
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    text = "execution providers to compare, or all that start; if one cannot run the others do, and the exit code is 1"
    add("--providers", default="cpu", metavar="A,B", help=text)
    add("--prompt-lengths", default="32,128", metavar="N,N", help="prompt lengths in tokens")
    add("--new-tokens", type=int, default=64, metavar="N", help="tokens to generate")
    add("--batch", type=int, default=1, metavar="N", help="texts at once")
    add("--repeats", type=int, default=3, metavar="N", help="measured runs per prompt length")
    add("--json", type=Path, metavar="FILE", help="also write the JSON document to FILE")
    _add_execution(parser)


def _bench(args: argparse.Namespace) -> int:
    from .bench.compare import BenchSettings, bench, format_table, named_providers

    try:
        lengths = tuple(int(length) for length in args.prompt_lengths.split(","))
    except ValueError as error:
        raise SettingsError(f"prompt lengths {args.prompt_lengths!r} are not numbers like 32,128") from error
    settings = BenchSettings(lengths, args.new_tokens, args.batch, args.repeats, *_execution(args))
    document = bench(args.artifact, named_providers(args.providers), settings)
    print(format_table(document))
    text = json.dumps(document)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    failures = [facts for facts in document["providers"] if "error" in facts]
    for facts in failures:
        print(f"error: {facts['provider']} did not run: {facts['error']}", file=sys.stderr)
    return 1 if failures else 0


def _add_doctor(subparsers: Any) -> None:
    parser = _command(subparsers, "doctor", _doctor, "say what this machine can run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine, format_report

    facts = examine()
    print(json.dumps(facts) if args.json else format_report(facts))
    return 1 if facts["problems"] else 0
