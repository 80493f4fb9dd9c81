"""Which way rows without a gradient go: the table is total, the environment overrides it, each choice is logged once."""

import logging

import pytest
import torch

from cpo_kernels.linear_logprob import triton as dispatch
from cpo_kernels.linear_logprob.triton_sums import MAX_SPLITS, splits

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CAPABILITY = {"sm80": (8, 0), "sm90": (9, 0), "other": (7, 5)}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch._log_choice.cache_clear()


@pytest.mark.parametrize(
    ("arch", "width", "num_rows", "path"),
    [
        ("sm90", 576, 100_000, "fused"),
        ("sm90", 577, 100_000, "chunk"),
        ("sm90", 1024, 160, "fused"),
        ("sm90", 4096, 160, "fused"),
        ("sm90", 4096, 161, "chunk"),
        ("sm80", 576, 100_000, "fused"),
        ("sm80", 1024, 512, "chunk"),
        ("sm80", 8192, 16, "fused"),
        ("other", 16384, 100_000, "fused"),
    ],
)
def test_table_decides_by_architecture_width_and_rows(
    arch: str, width: int, num_rows: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY[arch])
    assert dispatch.choose_path(GPU, width, num_rows) == path


def test_every_architecture_has_an_entry_for_any_width() -> None:
    for arch in ("sm80", "sm90", "other"):
        assert [entry[1] for entry in dispatch.TABLE if entry[0] == arch][-1] == dispatch.ANY


@pytest.mark.parametrize("path", dispatch.PATHS)
def test_environment_overrides_the_table(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", path)
    assert dispatch.choose_path(CPU, 576, 10) == path
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", "both")
    with pytest.raises(ValueError, match="'both': expected one of 'chunk', 'fused'"):
        dispatch.choose_path(CPU, 576, 10)


def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY["sm80"])
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        for num_rows in (10, 11, 5000, 12, 6000):
            dispatch.choose_path(GPU, 4096, num_rows)
    assert [record.getMessage().split(" by ")[0] for record in caplog.records] == [
        "linear_logprob: path fused",
        "linear_logprob: path chunk",
    ]


@pytest.mark.parametrize("programs_per_split", [1, 2, 7, 600])
def test_splits_hold_every_tile_once_and_are_no_more_than_a_merge_takes(programs_per_split: int) -> None:
    for num_tiles in (1, 2, 255, 256, 257, 300, 513, 1003):
        num_splits, tiles_per_split = splits(num_tiles, programs_per_split, 2112)
        assert num_splits <= MAX_SPLITS
        assert (num_splits - 1) * tiles_per_split < num_tiles <= num_splits * tiles_per_split
