"""How many rows a chunk holds: by memory, in the fewest chunks, and the card asked once."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from cpo_kernels.linear_logprob import chunk_size
from cpo_kernels.linear_logprob.chunk_size import (
    BYTES_A_LOGIT,
    MOST_LOGITS,
    SHARE_OF_CARD,
    SHARE_OF_FREE,
    chunk_rows,
    logits_that_fit,
    max_chunk_logits,
)
from cpo_kernels.linear_logprob.results import Head

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int, int], list[str]]]:
    """A GPU of given free and cached bytes and size; the list that comes back grows by one with every driver call."""

    def make(free: int, cached: int, total: int) -> list[str]:
        calls: list[str] = []

        def mem_get_info(device: torch.device) -> tuple[int, int]:
            calls.append(str(device))
            return free, total

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached + 5)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
        chunk_size._logits_of_card.cache_clear()
        return calls

    yield make
    chunk_size._logits_of_card.cache_clear()


@pytest.mark.parametrize(
    ("total", "free", "bits"),
    [
        (139, 120, 27), (139, 13, 27), (139, 11, 26),  # an H200, and one that is nearly full
        (79, 60, 27), (79, 7, 26), (79, 4, 25),
        (39, 30, 26), (22, 20, 25), (15, 14, 25), (11, 10, 24),
    ],
)  # fmt: skip
def test_a_smaller_or_fuller_card_gets_a_smaller_power_of_two(total: int, free: int, bits: int) -> None:
    assert logits_that_fit(free * GIB, total * GIB) == 1 << bits


@pytest.mark.parametrize("bits", [0, 1, 20, 26])
def test_the_next_power_of_two_begins_at_the_byte_at_which_it_fits(bits: int) -> None:
    needed = BYTES_A_LOGIT << bits
    for share, arguments in (
        (SHARE_OF_FREE, lambda x: (x, 1 << 60)),
        (SHARE_OF_CARD, lambda x: (1 << 60, x)),
    ):
        assert logits_that_fit(*arguments(share * needed)) == 1 << bits
        assert logits_that_fit(*arguments(share * needed - 1)) == max(1, (1 << bits) // 2)
    assert logits_that_fit(1 << 60, 1 << 60) == MOST_LOGITS


@pytest.mark.parametrize("free", [-5, 0, 1, 95])
def test_without_memory_a_chunk_is_one_row(free: int, card: Callable[[int, int, int], list[str]]) -> None:
    """Which may fail to be allocated; the allocator says so better."""
    assert logits_that_fit(free, 80 * GIB) == 1
    card(free, 0, 80 * GIB)
    assert chunk_rows(2048, 128256, GPU) == chunk_rows(1, 128256, GPU) == 1


def test_a_chunk_has_at_least_one_row_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in (1, 999, 1000, 127_999, 128_000, 255_999, 256_000, 300_000, 10_000_000):
        monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(bound))
        for num_rows in (1, 2, 127, 128, 129, 200, 257, 300, 1000, 5000):
            for device in (CPU, GPU):
                rows = chunk_rows(num_rows, 1000, device)
                assert 1 <= rows <= num_rows
                assert rows * 1000 <= bound or rows == 1
                most = max(1, bound // 1000)
                most = most // 128 * 128 if most >= 128 else most
                assert -(-num_rows // rows) == -(-num_rows // most)  # the weight is read as seldom as it can be
                if 128 <= rows < num_rows:
                    assert rows % 128 == 0
    assert chunk_rows(0, 1000, GPU) == 1  # a step of a loop over nothing


def test_chunks_on_a_gpu_are_of_about_equal_sizes_and_on_a_cpu_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short last one would wait for the weight."""
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(1 << 27))
    assert [chunk_rows(rows, 128256, GPU) for rows in (512, 1024, 1025, 1100, 2048, 2049, 8192)] == [
        512, 1024, 640, 640, 1024, 768, 1024,
    ]  # fmt: skip
    assert [chunk_rows(rows, 128256, CPU) for rows in (1024, 1025, 2049)] == [1024, 1024, 1024]
    monkeypatch.delenv("CPO_KERNELS_MAX_CHUNK_LOGITS")
    assert max_chunk_logits(CPU) == 1 << 25
    assert chunk_rows(8192, 1000, CPU) == 8192


def test_a_gpu_holds_no_more_rows_than_hide_the_reading_of_the_weight(
    monkeypatch: pytest.MonkeyPatch, card: Callable[[int, int, int], list[str]]
) -> None:
    """Unless more are asked for by name."""
    card(60 * GIB, 0, 80 * GIB)
    assert [chunk_rows(4096, vocab, GPU) for vocab in (32000, 49152, 128256, 152064, 256000)] == [
        1024, 1024, 1024, 768, 512,
    ]  # fmt: skip
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(1 << 27))
    assert chunk_rows(4096, 32000, GPU) == 4096


def test_the_card_is_asked_once_and_cached_memory_counts_as_free(
    card: Callable[[int, int, int], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    calls = card(4 * GIB, 60 * GIB, 80 * GIB)
    head = Head(torch.empty(128256, 4, device="meta"))
    with caplog.at_level(logging.INFO):
        assert max_chunk_logits(GPU) == 1 << 27  # 4 GiB alone would give 2^25
        card_is_full = [chunk_rows(2048, 128256, GPU) for _ in range(3)]
    assert card_is_full == [1024] * 3
    assert max_chunk_logits(torch.device("cuda:0")) == 1 << 27
    assert calls == ["cuda:0"]
    assert [record.message for record in caplog.records] == [
        "linear_logprob: chunks of at most 134217728 logits, 68.7 of 85.9 GB are free"
    ]
    assert head.chunk_rows(2048) == 256  # a tensor that is on no card takes the bound of a CPU
    calls = card(4 * GIB, 0, 80 * GIB)
    assert max_chunk_logits(torch.device("cuda", 3)) == 1 << 25
    assert calls == ["cuda:3"]


def test_a_prediction_for_a_card_that_is_elsewhere_takes_the_largest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_size._logits_of_card.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert max_chunk_logits(GPU) == MOST_LOGITS
    chunk_size._logits_of_card.cache_clear()
