"""Files that travel in parts: wheels of hundreds of megabytes, to a machine that takes tens at a time.

python -m benchmarks.cuda.parts fetch WHEELS              downloads what wheels.txt pins
python -m benchmarks.cuda.parts split WHEELS PARTS        every file, in parts, and a list with their hashes
python -m benchmarks.cuda.parts join PARTS WHEELS         checks every hash
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LARGEST = 60_000_000
"""Bytes of a part."""
PYTHON_VERSION, PLATFORM = "3.12", "manylinux_2_28_x86_64"
LIST = "parts.json"
REQUIREMENTS = Path(__file__).with_name("wheels.txt")


class PartsError(Exception):
    """A part or a file is missing or damaged; the message is one line and says which."""


def split(source: Path, parts: Path, largest: int = LARGEST) -> list[Path]:
    """Write the files in `source` into `parts`, each in pieces of at most `largest` bytes, and parts.json; returns the
    pieces. Raises PartsError if there is nothing to split."""
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else []
    if not files:
        raise PartsError(f"{source} has no files to split")
    parts.mkdir(parents=True, exist_ok=True)
    listed, made = [], []
    for path in files:
        entry: dict[str, Any] = {"name": path.name, "sha256": _sha256(path), "bytes": path.stat().st_size, "parts": []}
        with path.open("rb") as file:
            while piece := file.read(largest):
                target = parts / f"{path.name}.{len(entry['parts']):03}"
                target.write_bytes(piece)
                sha256 = hashlib.sha256(piece).hexdigest()
                entry["parts"].append({"name": target.name, "bytes": len(piece), "sha256": sha256})
                made.append(target)
        listed.append(entry)
    (parts / LIST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return made


def join(parts: Path, target: Path) -> list[Path]:
    """Put the files together again in `target`; one that is there and right is left alone. Returns the files. Raises
    PartsError for a part that is missing or damaged; nothing is then left of its file."""
    if not (parts / LIST).is_file():
        raise PartsError(f"{parts / LIST} is missing: it lists the parts and travels with them")
    try:
        listed = json.loads((parts / LIST).read_text(encoding="utf-8"))
        names = [(entry["name"], entry["sha256"], [part["name"] for part in entry["parts"]]) for entry in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise PartsError(f"{parts / LIST} is damaged; bring it again") from error
    if not names:
        raise PartsError(f"{parts / LIST} lists nothing; split the files again")
    target.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in listed:
        path = target / entry["name"]
        if not (path.is_file() and _sha256(path) == entry["sha256"]):
            _join_one(entry, parts, path)
        found.append(path)
    return found


def _join_one(entry: dict[str, Any], parts: Path, path: Path) -> None:
    draft = path.with_name(f".{path.name}")
    whole = hashlib.sha256()
    try:
        with draft.open("wb") as file:
            for part in entry["parts"]:
                piece = parts / part["name"]
                if not piece.is_file():
                    raise PartsError(f"{piece} is missing; bring this part again ({part['bytes']} bytes)")
                content = piece.read_bytes()
                if hashlib.sha256(content).hexdigest() != part["sha256"]:
                    raise PartsError(f"{piece} is damaged: its hash is not that of {LIST}; bring this part again")
                whole.update(content)
                file.write(content)
        if whole.hexdigest() != entry["sha256"]:
            raise PartsError(
                f"{path.name} is not the file that was split, although every part is right; split it again"
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def fetch(target: Path) -> None:
    """Download what wheels.txt pins, for the other machine's Python. Raises PartsError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
    command += ["--python-version", PYTHON_VERSION, "--platform", PLATFORM, "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command).returncode:
        raise PartsError("pip could not download the wheels; what it said stands above")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> int:
    """1 if a part is missing or damaged."""
    parser = argparse.ArgumentParser(prog="benchmarks.cuda.parts", description="split and join what travels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("wheels", type=Path)
    for name, (first, second) in {"split": ("wheels", "parts"), "join": ("parts", "wheels")}.items():
        command = commands.add_parser(name)
        command.add_argument(first, type=Path)
        command.add_argument(second, type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            fetch(args.wheels)
        elif args.command == "split":
            for path in split(args.wheels, args.parts):
                print(f"{path}  {path.stat().st_size}")
        else:
            for path in join(args.parts, args.wheels):
                print(path)
    except (PartsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
