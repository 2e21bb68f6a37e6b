"""Errors carry what is wrong; how a setting is spelled is up to whoever prints them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from imsm_core import errors
from imsm_core.errors import AdapterError, IMSMError, Interrupted, OutputExistsError, SettingsError, setting


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_settings_error_spells_its_setting_and_those_in_its_rule() -> None:
    error = SettingsError("block_size", 32, "it needs {quantized_backbone}")
    assert (error.name, error.value, error.rule) == ("block_size", 32, "it needs {quantized_backbone}")
    assert str(error) == "block_size is 32; it needs quantized_backbone"
    assert error.told(dashed) == "--block-size is 32; it needs --quantized-backbone"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"),
        ("mode5", "mode5"),
        (Path("a/b"), "a/b"),
        ("", "''"),
        (" ", "' '"),
        ("two\nlines", r"'two\nlines'"),
        (None, "not given"),
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ([], "empty"),
    ],
)
def test_value_is_shown_plainly_and_in_one_line(value: object, shown: str) -> None:
    assert str(SettingsError("gate", value, "rule")) == f"gate is {shown}; rule"


def test_value_with_braces_is_not_a_placeholder() -> None:
    assert str(SettingsError("gate", "{gate}", "rule")) == "gate is {gate}; rule"


def test_every_error_can_name_a_setting() -> None:
    error = OutputExistsError(f"runs/{{force}} exists; {setting('force')} replaces it")
    assert str(error) == "runs/{force} exists; force replaces it"
    assert error.told(dashed) == "runs/{force} exists; --force replaces it"


def test_errors_pickle_with_all_they_carry() -> None:
    for error in (
        SettingsError("gate", "mode5", "choose {gate_rank}"),
        AdapterError(setting("gate")),
        Interrupted("step 3"),
    ):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), found.args, vars(found), str(found)) == (
            type(error),
            error.args,
            vars(error),
            str(error),
        )


def test_a_users_mistake_exits_with_2_and_an_interruption_with_130() -> None:
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, IMSMError)]
    assert {kind.__name__: kind.exit_code for kind in tree if kind.exit_code != 2} == {"Interrupted": 130}
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in tree)
