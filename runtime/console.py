"""The command line's runner: finds the commands, runs one, and turns what goes wrong into one line and an exit code.

A package adds its commands by a function `register(commands)`; installed packages name theirs in the entry-point group
`imsm.commands`. Nothing heavy is imported before a command runs, so that `imsm` shows all of them whatever is
installed.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from .errors import IMSMRuntimeError, IMSMWarning, MissingPackageError
from .interrupts import Received, loading, signals_raise
from .machine import usable_cores
from .options import add_options, read_options, spelt_option
from .streams import STDOUT, forget_stdout, prepare_streams

GROUP = "imsm.commands"
RUST_PANIC = "pyo3_runtime"  # the module of PanicException, which is no Exception
DISTRIBUTION = "imsm-runtime"
DESCRIPTION = "Tune, export and run siamese language models (IMSM)."
MISTAKE = IMSMRuntimeError.exit_code
BROKEN_PIPE = 141  # as a shell reports it
LONGEST_LINE = 2000
_NO_MEMORY = re.compile(  # what PyTorch, onnxruntime and C++ say, as errors of no type of their own
    r"can't allocate memory|out of memory|failed to allocate memory|std::bad_alloc|bad allocation", re.IGNORECASE
)
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
Register = Callable[["Commands"], None]
Run = Callable[[argparse.Namespace], int]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show, and breaks no word, so that what it says can be copied."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or isinstance(action.default, bool)
        return action.help if unsaid else super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other one is told."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, one_line(f"error: {message}; see {self.prog} --help") + "\n")


class IntermixedParser(OneLineParser):
    """Allows options anywhere between the positional arguments; the first of those may be left out."""

    _splitting = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse's own does not know -1e4
        self.register("type", Path, _path)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's intermixed parsing, which calls this once for the options and once for the rest."""
        if self._splitting:
            return super().parse_known_args(args, namespace)
        self._splitting = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._splitting = False


class Commands:
    """What a package's `register` receives: adds commands, and options from settings; and lets packages that do not
    know each other offer functions to each other's commands. parsers: of the commands so far, by name."""

    add_options = staticmethod(add_options)
    read_options = staticmethod(read_options)
    loading = staticmethod(loading)

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        self._subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=IntermixedParser)
        self._services: dict[str, Callable[..., Any]] = {}

    def add(
        self, name: str, run: Run, text: str, needs: Collection[str] = (), extra: str | None = None
    ) -> argparse.ArgumentParser:
        """Add a command; returns its parser. text: its help and description. needs: packages that it imports when it
        runs, which the pip extra `extra` brings."""
        advice = f" (needs {_installation(extra)})" if _missing(needs) else ""
        parser = self._subparsers.add_parser(
            name, help=text + advice, description=text[0].upper() + text[1:] + ".", formatter_class=HelpFormatter
        )

        def checked(args: argparse.Namespace) -> int:
            _require(name, needs, extra)
            return run(args)

        parser.set_defaults(run=checked)
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.parsers[name] = parser
        return parser

    def provide(self, name: str, function: Callable[..., Any], needs: Collection[str] = (), extra: str = "") -> None:
        """Offer a function to the commands of other packages. needs, extra: as `add` has them."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            _require("this", needs, extra)
            return function(*args, **kwargs)

        self._services[name] = checked

    def service(self, name: str) -> Callable[..., Any]:
        """The function that a package offers. Raises MissingPackageError if none does."""
        if name not in self._services:
            raise MissingPackageError(f"no installed package offers {name}")
        return self._services[name]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `imsm`: the commands of every installed package that has any."""
    registers = []
    with loading():
        for entry in entry_points(group=GROUP):
            try:
                registers.append(entry.load())
            except Exception as error:  # someone else's package; the other commands still work
                print(f"warning: the commands of {entry.value} are left out: {error}", file=sys.stderr)
    return run_commands("imsm", registers, argv)


def run_commands(name: str, registers: Iterable[Register], argv: Sequence[str] | None = None) -> int:
    """Parse and run a command of a program called `name`; returns its exit code: 0, 1 (a check failed), 2 (a
    user's mistake, or the system refused something), 130 (Ctrl-C), 143 (SIGTERM), 141 (the reader of stdout went away).

    An exception with an `exit_code` is a user's mistake and becomes one line, and so do errors of the system and of
    memory; any other is a bug.
    """
    prepare_streams()
    if sys.stdout is None:
        return _failed("stdout is closed, and answers go there; redirect it to a file or to /dev/null")
    try:
        Path.cwd()
    except OSError:  # libraries that look for their files would end in anything
        return _failed("the current folder does not exist any more; change into one that does")
    words = sys.argv[1:] if argv is None else list(argv)
    with signals_raise() as received, _warnings_in_one_line():
        try:
            return _parse_and_run(name, registers, words)
        except SystemExit:
            raise
        except BaseException as error:  # a panic of Rust code is no Exception
            if "--debug" in words:
                raise
            return _explain(error, received)


def _parse_and_run(name: str, registers: Iterable[Register], words: Sequence[str]) -> int:
    parser = OneLineParser(prog=name, description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}", help="print the version")
    commands = Commands(parser)
    for register in registers:
        register(commands)
    if not words:
        parser.print_help(sys.stderr)
        return MISTAKE
    try:
        if any("\0" in word for word in words):
            parser.error("an argument holds a NUL character")
        args = parser.parse_args(words)
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    _settle_openmp()
    code: int = args.run(args)
    sys.stdout.flush()
    return code


def _explain(error: BaseException, received: Received) -> int:
    """Tell what went wrong in one line; returns the exit code. Raises what is a bug."""
    if received.number is not None or isinstance(error, KeyboardInterrupt):
        return _failed("", received.exit_code)
    if isinstance(error, BrokenPipeError):  # as `| head` does
        forget_stdout()
        return BROKEN_PIPE
    exit_code = getattr(error, "exit_code", None)
    if isinstance(error, Exception) and isinstance(exit_code, int):
        return _failed(message(error), exit_code)
    if _is_out_of_memory(error):
        why = " ".join(str(error).split()) or "nothing more is known"
        return _failed(f"memory ran out ({why}); use shorter texts, a smaller batch, or a smaller model or precision")
    if isinstance(error, OSError):
        return _failed(_of_the_system(error))
    if type(error).__module__ == RUST_PANIC:
        return _failed(f"a tokenizer or a weights file makes its library fail: {error}")
    raise error


def _failed(line: str, code: int = MISTAKE) -> int:
    print(one_line(f"error: {line}") if line else "interrupted", file=sys.stderr)
    return code


def _of_the_system(error: OSError) -> str:
    """What an error of the system is about, and what it is."""
    where = [str(path) for path in (error.filename, error.filename2) if path is not None]
    if error.filename == STDOUT:
        forget_stdout()
    return ": ".join([*where, error.strerror or str(error) or type(error).__name__])


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """The project's own warnings are lines of a command's report, without the place in the code."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(text: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
            if issubclass(category, IMSMWarning):
                print(one_line(f"warning: {text}"), file=sys.stderr)
            else:
                others(text, category, *where, **how)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def one_line(text: str) -> str:
    """A text in one line that a terminal shows as it is: other characters are escaped, and the middle of a very long
    one is left out."""
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} [...] {text[-LONGEST_LINE // 4 :]}"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path cannot be empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # as onnxruntime would, but obscurely and in the end
        raise argparse.ArgumentTypeError("the path is not text in this locale's encoding; rename it") from error
    return Path(text)


def _settle_openmp() -> None:
    """For commands that import PyTorch, whose OpenMP reads these when it is loaded: as many threads as this process may
    use, which sleep while they wait. By default they spin, and starve each other where anything else runs."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def message(error: Exception) -> str:
    """An error's line, with settings named as their options."""
    told = getattr(error, "told", None)
    return str(error) if told is None else str(told(spelt_option))


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "(not installed)"


def _require(what: str, needs: Collection[str], extra: str | None) -> None:
    """Raise MissingPackageError if a package of `needs` is missing."""
    if missing := _missing(needs):
        raise MissingPackageError(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"run {_installation(extra)}"
        )


def _missing(needs: Iterable[str]) -> list[str]:
    return [name for name in needs if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _installation(extra: str | None) -> str:
    return f"pip install '{DISTRIBUTION}[{extra}]'"
