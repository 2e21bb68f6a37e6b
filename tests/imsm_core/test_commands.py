"""The train command, from arguments to a CHECKPOINT folder, and what a signal leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cli
from imsm_core.adapters.options import PEFT_METHODS
from imsm_core.backbone import load_tokenizer
from imsm_core.checkpoint import load_checkpoint, read_info
from imsm_core.choices import GATE_KINDS
from imsm_core.errors import AdapterError, BaseModelError, DataError, IMSMError, OutputExistsError, SettingsError
from imsm_core.reference import reference_generate
from tests.builders import make_base_folder, write_jsonl

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 40
ROWS: list[dict[str, object]] = [{"prompt": f"What is {n}? ", "answer": f"It is {n * n}."} for n in range(12)]


def train_command(*arguments: object) -> int:
    """Raises the error that the command line would print."""
    return cli.main(["--debug", "train", *map(str, arguments)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def arguments(base_folder: Path, data: Path) -> list[object]:
    """A short run, of which each test gives --out."""
    options: dict[str, object] = {"--model": base_folder, "--data": data, "--batch-size": 3, "--save-every": 2}
    options |= {"--adapter-rank": 4, "--gate-rank": 3, "--learning-rate": 1e-2, "--device": "cpu", "--steps": 4}
    return [part for option in options.items() for part in option] + ["--no-progress"]


def files_of(checkpoint: Path) -> list[bytes]:
    return [(checkpoint / name).read_bytes() for name in ("gate.safetensors", "adapter/adapter_model.safetensors")]


def test_train_writes_a_checkpoint_that_loads_and_decodes(
    tmp_path: Path, arguments: list[object], base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "checkpoint"
    assert train_command(*arguments, "--out", out, "--seed", 3) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(out)
    assert result["steps"] == 4
    model, info = load_checkpoint(out)
    assert len(reference_generate(model, [0, 70, 71], 2)) == 2
    assert info.base_model == str(base_folder.resolve())
    assert (info.gate_kind, info.gate_rank, info.peft_type) == ("query_aware", 3, "LORA")
    assert info.training["seed"] == 3
    assert info.data["rows"] == len(ROWS)
    assert {k: v for k, v in result.items() if k != "checkpoint"} == info.metrics
    assert sorted(path.name for path in out.parent.iterdir()) == ["checkpoint"]


def without(arguments: list[object], *options: str) -> list[object]:
    places = {place + offset for option in options for place in [arguments.index(option)] for offset in (0, 1)}
    return [part for place, part in enumerate(arguments) if place not in places]


@pytest.mark.parametrize(
    ("options", "peft_type", "learning_rate"),
    [
        (["--peft", "ia3"], "IA3", 3e-3),
        (["--peft", "dora"], "LORA", 1e-4),
        (["--peft", "adalora", "--adapter-rank", 2], "ADALORA", 2e-3),
        (["--peft", "prefix_tuning", "--virtual-tokens", 3], "PREFIX_TUNING", 1e-2),
        (["--peft", "p_tuning", "--virtual-tokens", 3], "P_TUNING", 1e-3),
        (["--peft", "trainable_tokens", "--token-indices", 70, 80], "TRAINABLE_TOKENS", 1e-3),
        (["--peft-config", "CONFIG"], "LOHA", 3e-4),
    ],
    ids=str,
)
def test_train_takes_any_peft_method_and_its_own_learning_rate(
    tmp_path: Path, arguments: list[object], options: list[object], peft_type: str, learning_rate: float
) -> None:
    (tmp_path / "config.json").write_text('{"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]}')
    options = [tmp_path / "config.json" if option == "CONFIG" else option for option in options]
    base = without(arguments, "--adapter-rank", "--learning-rate")
    assert train_command(*base, *options, "--out", tmp_path / "out") == 0
    model, info = load_checkpoint(tmp_path / "out")
    assert (info.peft_type, info.training["learning_rate"]) == (peft_type, learning_rate)
    assert len(reference_generate(model, [0, 70, 71], 2)) == 2


def test_help_names_every_peft_method_and_gate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {*PEFT_METHODS, *GATE_KINDS} <= set(words)


def test_virtual_tokens_that_leave_no_room_for_text_are_refused(tmp_path: Path, arguments: list[object]) -> None:
    base = without(arguments, "--adapter-rank")
    with pytest.raises(SettingsError, match="127 virtual tokens leave no room for text in the model's context of 128"):
        train_command(*base, "--peft", "prompt_tuning", "--virtual-tokens", 127, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["chat_folder", "qwen2_folder", "gpt2_folder"])
def test_train_works_on_every_kind_of_model(
    tmp_path: Path, arguments: list[object], name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    assert train_command(*arguments, "--model", folder, "--out", tmp_path / "out", "--gate", "token") == 0
    assert read_info(tmp_path / "out").gate_kind == "token"
    load_checkpoint(tmp_path / "out")


def test_train_tunes_a_real_model_on_real_data(tmp_path: Path, stories_folder: Path, shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "cola" / "train.jsonl").read_text().split("\n")[:24]]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ["--model", stories_folder, "--data", data, "--out", tmp_path / "out", "--no-progress", "--device", "cpu"]
    options += ["--prompt-field", "input", "--answer-field", "output", "--batch-size", 8, "--steps", 12]
    assert train_command(*options, "--learning-rate", 3e-3) == 0
    metrics = read_info(tmp_path / "out").metrics
    assert metrics["final_loss"] < metrics["first_loss"]


def test_rows_that_are_too_long_are_counted_on_stderr(
    tmp_path: Path, arguments: list[object], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(data, [*ROWS, {"prompt": "p" * 200, "answer": "a"}])
    train_command(*arguments, "--out", tmp_path / "out")
    captured = capsys.readouterr()
    assert "rows that are skipped: 1 too long (the longest may have 128 tokens)" in captured.err
    assert json.loads(captured.out)["skipped_rows"] == 1


ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("text", "options", "form", "examples"),
    [
        (json.dumps({"messages": [ASK, SAY]}), [], "messages", 1),
        (json.dumps({"messages": [ASK, SAY] * 3}), [], "messages", 3),
        (json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}), [], None, 1),
        (json.dumps({"prompt": [ASK], "completion": [SAY]}), ["--answer-field", "completion"], "prompts", 1),
        (json.dumps([{"instruction": "Add", "input": "1", "output": "2"}], indent=1), [], "instructions", 1),
        (
            json.dumps([{"instruction": "Add", "input": "1", "output": "2"}]),
            ["--prompt-field", "instruction", "--answer-field", "output"],
            "prompts",
            1,
        ),
        (json.dumps({"text": "Once upon a time"}), [], "text", 1),
    ],
    ids=range(7),
)
def test_everyday_data_trains_as_it_is(
    tmp_path: Path,
    arguments: list[object],
    chat_folder: Path,
    data: Path,
    text: str,
    options: list[object],
    form: str | None,
    examples: int,
) -> None:
    data.write_text(text + "\n")
    out = tmp_path / "out"
    assert train_command(*arguments, "--model", chat_folder, "--out", out, "--steps", 1, *options) == 0
    found = read_info(out).data
    assert (found["form"], found["rows"], found["examples"]) == (form or "conversations", 1, examples)


def test_bad_rows_stop_the_run_or_are_skipped_and_counted(
    tmp_path: Path, arguments: list[object], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": null}\nnull\n{"prompt": "d"}\n')
    line = [str(part) for part in ("train", *arguments, "--out", tmp_path / "out")]
    assert cli.main(line) == 2
    message = f"error: {data}, line 3: it is null, not a JSON object; --skip-bad-rows skips and counts such rows\n"
    assert capsys.readouterr().err == message
    assert cli.main([*line, "--skip-bad-rows"]) == 0
    captured = capsys.readouterr().err
    assert "rows that are skipped: 1 null, 1 not a JSON object, 1 missing field" in captured
    counts = {"null": 1, "not a JSON object": 1, "missing field": 1}
    assert read_info(tmp_path / "out").data["skipped"] == counts


def test_a_tokenizer_that_is_larger_than_the_model_is_told_by_its_token(
    tmp_path: Path, arguments: list[object], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding with a token that the model lacks harms nobody; a row with one does."""
    base = make_base_folder(tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(str(base))
    write_jsonl(data, [{"prompt": "a", "answer": "b"}, {"prompt": "aaaa", "answer": "b"}])
    options = [*arguments, "--model", base, "--batch-size", 2, "--out"]
    assert train_command(*options, tmp_path / "out") == 0
    write_jsonl(data, [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b <extra>"}])
    with pytest.raises(DataError, match="line 2: its token '<extra>' has the id 260, and the model has 259 tokens"):
        train_command(*options, tmp_path / "other")


def test_resuming_without_an_interrupted_run_says_so(
    tmp_path: Path, arguments: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train_command(*arguments, "--out", out, "--resume") == 0
    assert f"nothing to resume in {out}.partial: the run starts from the beginning\n" in capsys.readouterr().err


def wrong(name: str, value: object, error: type[IMSMError], message: str) -> Any:
    return pytest.param(name, value, error, message, id=f"{name} {value}")


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        wrong("--model", "/no/where", BaseModelError, "the folder does not exist"),
        wrong("--data", "/no/rows.jsonl", DataError, "cannot read the data file"),
        wrong("--prompt-field", "question", DataError, "line 1: it has no field 'question'; it has 'prompt', 'answer'"),
        wrong("--peft", "magic", SettingsError, "--peft is magic; choose one of lora, dora"),
        wrong("--peft", "ia3", SettingsError, "--adapter-rank is 4; ia3 does not take it; it takes --target-modules"),
        wrong("--peft", "trainable_tokens", SettingsError, "--adapter-rank is 4; trainable_tokens does not take it"),
        wrong("--virtual-tokens", 3, SettingsError, "--virtual-tokens is 3; lora does not take it"),
        wrong(
            "--peft-config",
            "config.json",
            SettingsError,
            "--adapter-rank is 4; it cannot be combined with --peft-config",
        ),
        wrong("--target-modules", "nothing", AdapterError, "nothing"),
        wrong("--gate", "mode5", SettingsError, "--gate is mode5; choose one of query_aware"),
        wrong("--gate-rank", 0, SettingsError, "--gate-rank is 0"),
        wrong("--gate-dropout", 1.5, SettingsError, "--gate-dropout is 1.5"),
        wrong("--max-grad-norm", -1, SettingsError, "--max-grad-norm is -1.0"),
        wrong("--max-length", 0, SettingsError, "--max-length is 0"),
        wrong("--max-length", 5, DataError, "all 12 rows are longer than 5 tokens"),
        wrong("--steps", 0, SettingsError, "--steps is 0"),
        wrong("--device", "abacus", SettingsError, "--device is abacus; it cannot be used: "),
        wrong("--device", "cuda:77", SettingsError, "--device is cuda:77; it cannot be used: "),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path,
    arguments: list[object],
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: object,
    error: type[IMSMError],
    message: str,
) -> None:
    line = [str(part) for part in ("train", *arguments, "--out", tmp_path / "out", option, value)]
    with pytest.raises(error):
        cli.main(["--debug", *line])
    capsys.readouterr()
    assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_layers": 1}, "does not run on this model"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [-1]}, "the token id -1 is not in the model's vocabulary"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": []}, "a list of token ids, at least one"),
    ],
)
def test_peft_config_that_does_not_fit_the_model_is_refused_before_training(
    tmp_path: Path, arguments: list[object], config: dict[str, object], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = without(arguments, "--adapter-rank")
    with pytest.raises(AdapterError, match=message):
        train_command(*base, "--peft-config", tmp_path / "config.json", "--out", tmp_path / "out")


def test_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path: Path, arguments: list[object], data: Path
) -> None:
    with pytest.raises(IMSMError, match=r"rows\.jsonl is not a folder"):
        train_command(*arguments, "--model", "/no/where", "--out", data / "out")


def test_existing_checkpoint_is_kept_without_force_and_replaced_with_it(
    tmp_path: Path, arguments: list[object]
) -> None:
    out = tmp_path / "out"
    train_command(*arguments, "--out", out)
    first = files_of(out)
    with pytest.raises(OutputExistsError, match="exists and is kept"):
        train_command(*arguments, "--out", out, "--seed", 7)
    assert files_of(out) == first
    train_command(*arguments, "--out", out, "--seed", 7, "--force")
    assert files_of(out) != first


def test_force_never_replaces_a_folder_that_is_no_checkpoint(tmp_path: Path, arguments: list[object]) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"is kept: it has no imsm\.json"):
        train_command(*arguments, "--out", precious, "--force")
    assert (precious / "chapter").read_text() == "years of work"


# Signals. The child trains as a user's command does, only slower, so that there is time to hit it.

CHILD = """
import sys, time
import cli
import torch
torch.set_num_threads(1)
from imsm_core.training import loop
step = loop._step
loop._step = lambda *arguments: (step(*arguments), time.sleep(0.05))[0]
from imsm_core.choices import GATE_KINDS
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """The arguments of a run of 40 steps, and the checkpoint that it gives when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("long")
    base = make_base_folder(folder / "base")
    options: dict[str, object] = {"--model": base, "--data": write_jsonl(folder / "rows.jsonl", ROWS)}
    options |= {"--batch-size": 3, "--save-every": 3, "--steps": STEPS, "--device": "cpu", "--adapter-rank": 4}
    arguments = [part for option in options.items() for part in option] + ["--no-progress"]
    train_command(*arguments, "--out", folder / "whole")
    return arguments, folder / "whole"


@pytest.fixture(scope="module")
def interrupted(
    long_run: tuple[list[object], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, Path]]:
    """Exit code, stderr and output path of a child stopped by SIGINT and of one stopped by SIGKILL."""
    found: dict[str, tuple[int, str, Path]] = {}
    for sent in (signal.SIGINT, signal.SIGKILL):
        out = tmp_path_factory.mktemp("child") / "out"
        command = [sys.executable, "-c", CHILD, *map(str, long_run[0]), "--out", str(out)]
        child = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while child.poll() is None and not list(out.parent.glob("out.partial/snapshot-*")):
            assert time.monotonic() < deadline, "the child wrote no snapshot"
            time.sleep(0.01)
        child.send_signal(sent)
        _, stderr = child.communicate(timeout=60)
        found[sent.name] = (child.returncode, stderr, out)
    return found


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_interrupted_command_leaves_no_checkpoint_and_resumes_to_the_same_one(
    interrupted: dict[str, tuple[int, str, Path]], long_run: tuple[list[object], Path], name: str
) -> None:
    code, stderr, out = interrupted[name]
    arguments, whole = long_run
    if name == "SIGINT":
        assert code == 130
        assert "--resume continues from there" in stderr
        assert stderr.startswith("error: interrupted after step ")
        assert "Traceback" not in stderr
    else:
        assert code == -signal.SIGKILL
    assert not out.exists()
    partial = out.with_name("out.partial")
    assert len(list(partial.glob("snapshot-*"))) in (1, 2)
    step = int(max(partial.glob("snapshot-*")).name.removeprefix("snapshot-"))
    assert 0 < step < STEPS
    with pytest.raises(OutputExistsError, match="holds an interrupted run; resume continues it, force discards it"):
        train_command(*arguments, "--out", out)
    for option, value in (("--adapter-alpha", 4), ("--adapter-dropout", 0.2), ("--prompt-field", "answer")):
        name = option.removeprefix("--").replace("-", "_")
        with pytest.raises(SettingsError, match=f"^{name} is {value}; the interrupted run had"):
            train_command(*arguments, "--out", out, "--resume", option, value)
    train_command(*arguments, "--out", out, "--resume")
    assert files_of(out) == files_of(whole)
    ours, theirs = read_info(out).metrics, read_info(whole).metrics
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_resuming_on_another_base_model_is_refused(long_run: tuple[list[object], Path], tmp_path: Path) -> None:
    """A backbone of the same shape takes the same parameters; only its fingerprint tells them apart."""
    arguments, _ = long_run
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imsm_core.training.tuning.save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_command(*arguments, "--out", out)
    other = make_base_folder(tmp_path / "other", seed=1)
    with pytest.raises(SettingsError, match=r"^model is .*; the interrupted run had"):
        train_command(*arguments, "--model", other, "--out", out, "--resume")
    assert not out.exists()


def test_force_discards_an_interrupted_run(
    long_run: tuple[list[object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = long_run
    out = tmp_path / "out"
    stale = tmp_path / "out.partial" / "snapshot-00000003"
    stale.mkdir(parents=True)
    assert train_command(*arguments, "--steps", 2, "--out", out, "--force") == 0
    assert not stale.exists()
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_seed_decides_the_initial_weights_too(tmp_path: Path, arguments: list[object]) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name) * 17)
        train_command(*arguments, "--out", tmp_path / name, "--seed", seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    a, c = (load_file(tmp_path / name / "gate.safetensors")["gate_down.weight"] for name in "ac")
    assert (a - c).abs().mean() > 0.01
