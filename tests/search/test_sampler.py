"""Both samplers, for one row and for a batch: named random numbers, and Hugging Face's distribution for each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cpo_fast.search.engine import SampleRequest
from cpo_fast.search.engine.sampler import BatchSampler, choose_token, log_probs, uniforms
from tests.search.hugging_face_processors import processed

SINGLE_VOCAB_SIZE, BATCH_VOCAB_SIZE = 23, 7
NUM_DRAWS = 20_000
# 0.999 quantiles of chi-square by degrees of freedom; the draws are fixed, so a test passes always or never
QUANTILES = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 36: 67.99}
PROMPT = (3, 3, 4)  # one likely token, twice, and one whose logit is negative


def test_uniforms_depend_on_the_name_alone_and_a_longer_table_starts_the_same() -> None:
    assert np.array_equal(uniforms("a", 5), uniforms("a", 50)[:5])
    assert not np.array_equal(uniforms("a", 5), uniforms("b", 5))
    assert len(set(uniforms("a", 1000))) == 1000


def test_frequencies_follow_the_tempered_softmax() -> None:
    logits = np.array([1.0, 0.0, 2.0, -np.inf])
    temperature = 0.7
    draws = [choose_token(logits, u, temperature, 1.0) for u in uniforms("frequencies", 20000)]
    weights = np.exp(logits / temperature)
    expected = weights / weights.sum()
    found = np.bincount(draws, minlength=4) / len(draws)
    assert found[3] == 0
    # four standard deviations of a share near 1/2 over 20000 draws are 0.0142
    assert np.abs(found - expected).max() < 0.0142


def test_every_uniform_maps_to_a_token_with_mass_at_both_ends() -> None:
    logits = np.array([-np.inf, 0.0, 0.0, -np.inf])
    assert choose_token(logits, 0.0, 1.0, 1.0) == 1
    assert choose_token(logits, np.nextafter(1.0, 0.0), 1.0, 1.0) == 2


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.05, 0.35]))
    draws = {choose_token(logits, u, 1.0, 0.8) for u in np.linspace(0, 0.999, 500)}
    assert draws == {1, 3}
    assert {choose_token(logits, u, 1.0, 1e-9) for u in np.linspace(0, 0.999, 50)} == {1}


def test_greedy_takes_the_largest_and_the_smallest_id_on_a_tie() -> None:
    assert choose_token(np.array([0.0, 3.0, 3.0]), 0.99, 0.0, 1.0) == 1


@pytest.mark.parametrize("logits", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_refused(logits: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose_token(np.array(logits), 0.5, 1.0, 1.0)


def probabilities_of(logits: np.ndarray, *sampling: Any) -> np.ndarray:
    """[V] probabilities of the sampler: between which uniforms each token is chosen, by bisection."""

    def chosen(uniform: float) -> int:
        return choose_token(logits, uniform, *sampling)

    probabilities = np.zeros(len(logits))
    start = 0.0
    while start < 1:
        token = chosen(start)
        low, high = start, 1.0
        if chosen(np.nextafter(1.0, 0.0)) == token:
            probabilities[token] = 1 - start
            break
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if chosen(middle) == token else (low, middle)
        probabilities[token] = high - start
        start = high
    return probabilities


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("penalty", [1.0, 1.1, 0.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (6, 0.8), (1, 0.5), (50, 0.01)])
def test_the_distribution_is_that_of_hugging_faces_processors(
    ties: bool, penalty: float, top_k: int, top_p: float
) -> None:
    generator = np.random.default_rng(top_k * 100 + int(top_p * 10))
    for temperature in (0.4, 1.0, 1.7):
        logits = generator.normal(0, 2, SINGLE_VOCAB_SIZE)
        if ties:
            logits = np.round(logits)
            assert len(set(logits)) < SINGLE_VOCAB_SIZE / 2
        seen = generator.integers(0, SINGLE_VOCAB_SIZE, 9).tolist()
        before = logits.copy()
        expected = processed(torch.from_numpy(logits), seen, temperature, top_p, top_k, penalty)
        found = probabilities_of(logits, temperature, top_p, top_k, penalty, seen)
        assert np.array_equal(logits, before)
        if ties and top_p < 1:
            # which of equals at the edge of the nucleus stays is left to an unstable sort there: how many is not
            found, expected = np.sort(found), np.sort(expected)
        assert np.flatnonzero(found).tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_of_equals_at_the_edge_of_the_nucleus_the_smaller_ids_stay() -> None:
    assert np.flatnonzero(probabilities_of(np.zeros(6), 1.0, 0.5)).tolist() == [0, 1, 2]


def test_a_penalty_changes_seen_tokens_only_and_greedy_choices_too() -> None:
    logits = np.array([2.0, 1.9, -1.0])
    assert choose_token(logits, 0.0, 0.0, 1.0) == 0
    assert choose_token(logits, 0.0, 0.0, 1.0, repetition_penalty=1.5, seen=[0, 0]) == 1
    assert choose_token(logits, 0.0, 0.0, 1.0, repetition_penalty=1.5, seen=[1, 2]) == 0
    # a negative logit is multiplied: less likely, not more
    probabilities = probabilities_of(logits, 1.0, 1.0, 0, 4.0, [2])
    np.testing.assert_allclose(probabilities, np.exp([2, 1.9, -4.0]) / np.exp([2, 1.9, -4.0]).sum(), atol=1e-12)


def test_log_probs_are_of_the_unprocessed_row() -> None:
    logits = np.array([1.0, -np.inf, 3.0, 700.0])
    np.testing.assert_allclose(np.exp(log_probs(logits)).sum(), 1)
    np.testing.assert_allclose(log_probs(logits), torch.from_numpy(logits).log_softmax(-1).numpy())


def batch_sampler(requests: list[SampleRequest], generated: Sequence[Sequence[int]], vocab_size: int) -> BatchSampler:
    return BatchSampler.build(requests, generated, len(requests), vocab_size, torch.device("cpu"))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom of counts; a token that is expected 0 times must not occur."""
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    return float(((counts - expected)[some] ** 2 / expected[some]).sum()), int(some.sum()) - 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "penalty"),
    [
        (1.0, 1.0, 0, 1.0),
        (0.6, 1.0, 0, 1.0),
        (1.3, 1.0, 4, 1.0),
        (0.9, 0.8, 0, 1.0),
        (1.0, 1.0, 0, 1.7),
        (0.9, 0.9, 5, 1.3),
    ],
)
def test_frequencies_pass_a_chi_square_test(temperature: float, top_p: float, top_k: int, penalty: float) -> None:
    logits = torch.tensor([0.3, -0.7, 1.1, 0.9, -1.5, 0.2, 0.0])
    values = {"top_k": top_k, "repetition_penalty": penalty}
    requests = [SampleRequest(PROMPT, f"row {n}", temperature, top_p, 2, **values) for n in range(NUM_DRAWS)]
    # both steps of every row: the second one reads another number of the same stream
    tokens = []
    for step in (0, 1):
        sampler = batch_sampler(requests, [()] * NUM_DRAWS, BATCH_VOCAB_SIZE)
        chosen, _ = sampler.sample(logits.expand(NUM_DRAWS, -1).clone(), torch.full((NUM_DRAWS,), step))
        tokens.append(chosen.numpy())
    expected = processed(logits, PROMPT, temperature, top_p, top_k, penalty)
    for chosen in tokens:
        found, freedom = chi_square(np.bincount(chosen, minlength=BATCH_VOCAB_SIZE), NUM_DRAWS * expected)
        assert found < QUANTILES[freedom]
    pairs = np.bincount(tokens[0] * BATCH_VOCAB_SIZE + tokens[1], minlength=BATCH_VOCAB_SIZE**2)
    if expected.all():
        first, second = (np.bincount(chosen, minlength=BATCH_VOCAB_SIZE) for chosen in tokens)
        found, _ = chi_square(pairs, np.outer(first, second).ravel() / NUM_DRAWS)
        assert found < QUANTILES[36]  # (7 - 1)^2: the steps of a row are independent


@pytest.mark.parametrize("rebuild", [False, True], ids=["kept", "rebuilt at every step"])
def test_every_row_is_drawn_from_hugging_faces_distribution_of_its_own_prompt_and_tokens(rebuild: bool) -> None:
    """Prompt ids count for the penalty, as do the generated ones; rows of any settings stand side by side."""
    vocab_size, num_steps = 13, 6
    generator = np.random.default_rng(5)
    requests = []
    for number in range(48):
        prompt = tuple(int(token) for token in generator.integers(0, vocab_size, 4))
        penalty, top_k = float(generator.choice([1.0, 0.6, 1.1, 2.5])), int(generator.choice([0, 1, 9]))
        temperature, top_p = float(generator.choice([0.0, 0.4, 1.5])), float(generator.choice([1.0, 0.7]))
        requests.append(SampleRequest(prompt, f"row {number}", temperature, top_p, num_steps, top_k, penalty))
    generated: list[list[int]] = [[] for _ in requests]
    sampler = batch_sampler(requests, generated, vocab_size)
    changed = 0
    for step in range(num_steps):
        if rebuild:
            sampler = batch_sampler(requests, generated, vocab_size)
        logits = torch.from_numpy(generator.normal(0, 2, (len(requests), vocab_size))).float()
        chosen, logps = sampler.sample(logits, torch.full((len(requests),), step))
        raw = logits.double().log_softmax(-1)
        for row, request in enumerate(requests):
            ids = [*request.token_ids, *generated[row]]
            rest = (request.temperature or 1.0, request.top_p if request.temperature else 1.0)
            p = processed(logits[row], ids, *rest, request.top_k, request.repetition_penalty)
            mass = p.cumsum()
            uniform = uniforms(request.uid, num_steps)[step] * mass[-1]
            expected = int(np.searchsorted(mass, uniform, side="right")) if request.temperature else int(p.argmax())
            assert chosen[row] == expected
            assert logps[row] == pytest.approx(float(raw[row, expected]), abs=1e-12)
            without = processed(logits[row], ids, *rest, request.top_k, 1.0)
            changed += bool(np.abs(p - without).max() > 0.01)
            generated[row].append(expected)
    assert changed > 50  # the penalty mattered
