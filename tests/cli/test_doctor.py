"""`cpo-fast doctor` names what is there and what is missing, with the line that mends it."""

import json
from importlib import metadata

import pytest
from click.testing import CliRunner

from cpo_fast.cli.doctor import doctor_command
from cpo_fast.errors import EnvironmentProblem

pytestmark = pytest.mark.usefixtures("no_launcher")


def findings() -> dict[str, dict[str, str]]:
    result = CliRunner().invoke(doctor_command, ["--json"])
    return {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_what_is_installed_is_shown_and_nothing_is_to_mend() -> None:
    result = CliRunner().invoke(doctor_command, [])
    assert result.exit_code == 0
    for name in ("torch", "deepspeed", "pydantic"):
        assert findings()[name]["found"] == metadata.version(name)
        assert name in result.stdout
    assert "pytest" not in findings()  # of developers


def test_a_missing_and_an_old_library_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return "5.16.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = findings()
    assert (found["deepspeed"]["found"], found["deepspeed"]["wrong"]) == ("missing", "pip install 'deepspeed>=0.19.5'")
    assert found["transformers"]["wrong"] == "wanted >=5.17: pip install 'transformers>=5.17'"
    result = CliRunner().invoke(doctor_command, [])
    assert isinstance(result.exception, EnvironmentProblem)
    assert result.exception.exit_code == 5
    assert "2 thing(s) to mend: " in str(result.exception)


def test_what_only_something_special_needs_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("pyarrow", "gguf"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    result = CliRunner().invoke(doctor_command, [])
    assert result.exit_code == 0
    found = findings()
    assert found["pyarrow"]["optional"] == "for parquet files and the hub: pip install 'cpo-fast[data]'"
    assert [found[name]["wrong"] for name in ("pyarrow", "gguf")] == ["", ""]
    assert "cpo-fast[data]" in result.stdout.replace("\n", "")  # rich would take the bracket for markup


def test_variables_of_a_launcher_are_read_and_wrong_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert "WORLD_SIZE is not set" in findings()["launcher"]["wrong"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert findings()["launcher"]["found"] == "rank 3 of 8 (torchrun)"
