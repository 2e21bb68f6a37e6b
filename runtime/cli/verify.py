"""`verify`: whether an artifact is complete, unchanged and loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.execution import Execution
from ..errors import SettingsError
from ..interrupts import loading
from .common import NEEDS, add_artifact

if TYPE_CHECKING:
    from ..console import Commands


def register(commands: Commands) -> None:
    """Add `verify`."""

    def verify(args: argparse.Namespace) -> int:
        return _verify(args, commands)

    parser = commands.add("verify", verify, "check that an artifact is complete and unchanged", **NEEDS)
    add_artifact(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="also compare with this checkpoint in PyTorch")
    parser.add_argument("--base", metavar="DIR_OR_HUB_ID", help="where the checkpoint's base model is now")
    text = "execution provider that loads the graph, and runs it for --checkpoint: cpu, cuda, openvino, ..."
    parser.add_argument("--provider", default="cpu", metavar="NAME", help=text)


def _verify(args: argparse.Namespace, commands: Commands) -> int:
    with loading():
        from ..engine.signature import check_sections
        from ..folder import check_files, unlisted_files
        from ..generation.generation import load
        from ..generation.hard_texts import check_prompts
        from ..manifest import read_manifest
        from ..printable import printable

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
