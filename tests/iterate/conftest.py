"""The inputs of all rounds, and two runs that nobody disturbs."""

from pathlib import Path

import pytest

from cpo_fast.config import Config, validate_config
from cpo_fast.iterate import iterate
from tests.iterate.rounds import values, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `asked.jsonl` and `dev.jsonl`."""
    return write_inputs(tmp_path_factory.mktemp("iterate"))


@pytest.fixture(scope="session", params=["cpo", "sft_cpo"])
def whole(request: pytest.FixtureRequest, inputs: Path) -> Config:
    """Two rounds of a method."""
    config = validate_config(values(inputs, inputs / request.param, iterate={"method": request.param}))
    iterate(config)
    return config


@pytest.fixture(scope="session")
def rounds_of_cpo(inputs: Path) -> Config:
    """Two rounds of CPO, for what holds of either method."""
    config = validate_config(values(inputs, inputs / "rounds"))
    iterate(config)
    return config
