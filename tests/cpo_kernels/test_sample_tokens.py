"""The sampler without a sort chooses, token by token, what the one with whole sorts does, at every edge of its cuts.

`tests/search/test_sampler.py` compares that one with Hugging Face's processors. The check of the op compares the kernels
with it on rows of every kind, and runs here too.
"""

from typing import Any

import pytest
import torch

from cpo_kernels.sample_tokens import NOT_FINITE, sample_tokens
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels

BELOW_ONE = 1 - 2**-53


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, and several steps of a loop over a list, in the interpreter too."""
    if DEVICE == "cpu":
        monkeypatch.setattr("cpo_kernels.sample_tokens.triton_sampler.BLOCK", 32)


def drawn(logits: torch.Tensor, uniforms: list[float], impl: str, **settings: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens of one row under several uniform numbers, and their log-probs."""
    num_rows = len(uniforms)
    rows = logits.float().repeat(num_rows, 1).to(DEVICE)
    columns = {
        name: torch.full((num_rows,), value, dtype=torch.int64 if name == "top_k" else torch.float64, device=DEVICE)
        for name, value in {"temperature": 1.0, **settings}.items()
    }
    seen = torch.zeros_like(rows, dtype=torch.bool)
    seen[:, ::3] = True
    tokens, logps = sample_tokens(
        rows,
        torch.tensor(uniforms, dtype=torch.float64, device=DEVICE).unsqueeze(1),
        torch.zeros(num_rows, dtype=torch.int64, device=DEVICE),
        **columns,
        **({"seen": seen} if "penalty" in settings else {}),
        impl=impl,
    )
    return tokens.tolist(), logps


def assert_same(logits: torch.Tensor, uniforms: list[float], **settings: Any) -> list[int]:
    found, logps = drawn(logits, uniforms, "triton", **settings)
    expected, expected_logps = drawn(logits, uniforms, "eager", **settings)
    assert found == expected
    torch.testing.assert_close(logps, expected_logps, rtol=1e-12, atol=1e-12)
    return found


@runs_kernels
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"top_k": 30}, {"top_p": 0.5, "top_k": 70}], ids=str)
def test_of_equals_at_an_edge_the_same_stay(settings: dict[str, Any]) -> None:
    """100 equal tokens: 50 hold half of the mass; a k below 100 keeps all; half of those is 50."""
    found = assert_same(torch.zeros(100), [0.0, 0.3, 0.499, 0.5, 0.75, BELOW_ONE], **settings)
    assert found[-1] == (99 if "top_p" not in settings else 49)
    assert found[0] == 0


@runs_kernels
def test_ties_below_a_peak_that_only_some_of_are_kept() -> None:
    """One likely token, in the third block, and 70 equals, of which the first few are kept."""
    logits = torch.zeros(71)
    logits[66] = 2.0
    probabilities = (logits.double() - 2.0).exp()
    for kept in (1, 2, 3, 40, 69):
        # just above what the peak and `kept - 1` others hold
        before = float(probabilities[66] + (kept - 1) * probabilities[0])
        top_p = (before + 0.01 * float(probabilities[0])) / float(probabilities.sum())
        found = assert_same(logits, [0.0, 0.2, 0.6, BELOW_ONE], top_p=top_p)
        assert set(found) <= {*[token for token in range(71) if token != 66][:kept], 66}


@runs_kernels
@pytest.mark.parametrize("kept", [1, 2, 5, 33, 65, 69])
def test_of_distinct_tokens_exactly_those_over_the_edge_are_kept(kept: int) -> None:
    logits = torch.randn(70, generator=torch.Generator().manual_seed(kept))
    probabilities, order = logits.double().softmax(dim=0).sort(descending=True)
    between = float(probabilities[: kept - 1].sum() + 0.5 * probabilities[kept - 1])
    last = int(order[:kept].max())
    for settings in ({"top_p": between}, {"top_k": kept}, {"top_p": 1 - 1e-12, "top_k": kept}):
        assert assert_same(logits, [0.0, 0.25, 0.5, 0.9, BELOW_ONE], **settings)[-1] == last


@runs_kernels
@pytest.mark.parametrize("top_k", [1, 2, 3, 31, 32, 33, 69, 70])
def test_every_k_keeps_what_equals_its_last(top_k: int) -> None:
    logits = (torch.arange(70) * 37 % 70 // 2).double() / 7
    logits[3], logits[4] = 0.0, -0.0  # equal, and the smallest that the first token's ties have
    assert_same(logits, [0.0, 0.1, 0.7, BELOW_ONE], top_k=top_k)


@runs_kernels
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 65])
def test_vocabularies_of_any_size(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator)
    for settings in ({}, {"top_p": 0.8, "penalty": 1.5}, {"top_p": 1e-9}, {"temperature": 0.0}):
        assert_same(logits, [0.0, 0.37, BELOW_ONE], **settings)


@runs_kernels
def test_excluded_tokens_are_never_drawn_and_a_row_of_one_token_always_draws_it() -> None:
    logits = torch.full((100,), float("-inf"))
    logits[[40, 77]] = torch.tensor([-1e30, 3.0])
    for settings in ({}, {"top_p": 0.99}, {"top_k": 5}, {"top_k": 2, "top_p": 0.5}, {"temperature": 1e-3}):
        assert set(assert_same(logits, [0.0, 0.5, BELOW_ONE], **settings)) == {77}


@runs_kernels
def test_probabilities_that_underflow_have_no_mass() -> None:
    logits = -1000.0 * torch.arange(40).flip(0)
    for settings in ({"top_p": 1 - 1e-12}, {"top_k": 39}, {}):
        assert set(assert_same(logits, [0.0, BELOW_ONE], **settings)) == {39}


@runs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}], ids=str)
def test_rows_that_are_not_finite_are_marked_and_end(value: float, settings: dict[str, Any]) -> None:
    logits = torch.zeros(70)
    logits[66] = value
    assert drawn(logits, [0.5], "triton", **settings)[0] == [NOT_FINITE] == drawn(logits, [0.5], "eager", **settings)[0]
    assert drawn(torch.full((70,), float("-inf")), [0.5], "triton", **settings)[0] == [NOT_FINITE]


@runs_kernels
def test_a_uniform_beyond_the_last_is_the_last() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    uniforms = torch.tensor([[0.1, 0.9]], dtype=torch.float64, device=DEVICE)
    found = [
        int(sample_tokens(logits, uniforms, torch.tensor([step], device=DEVICE), one, impl="triton")[0])
        for step in (0, 1, 2, 9)
    ]
    assert found[0] != found[1] == found[2] == found[3]


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, rows = torch.zeros(2, 5), torch.zeros(2, dtype=torch.float64)
    step = rows.long()
    for arguments in (
        {"temperature": rows[:1]},
        {"temperature": rows, "penalty": rows + 1},
        {"temperature": rows, "penalty": rows + 1, "seen": logits[:1] > 0},
        {"temperature": rows, "top_k": step[:1]},
    ):
        with pytest.raises(ValueError, match="sample_tokens: expected logits"):
            sample_tokens(logits, None, step, **arguments)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        sample_tokens(logits, None, step, rows, impl="flash")
