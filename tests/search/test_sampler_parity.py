"""The sampler keeps the tokens, and gives them the probabilities, that Hugging Face's own processors do."""

import numpy as np
import pytest
import torch

from cpo_fast.search.engine.sampler import choose_token, log_probs
from tests.search.hugging_face_processors import processed

VOCAB_SIZE = 23


def _expected(logits, temperature, top_p, top_k, penalty, seen):
    return processed(torch.from_numpy(logits), seen, temperature, top_p, top_k, penalty)


def _found(logits, *settings):
    """[V] probabilities of the sampler: between which uniforms each token is chosen, by bisection."""

    def chosen(uniform):
        return choose_token(logits, uniform, *settings)

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
def test_the_distribution_is_that_of_hugging_faces_processors(ties, penalty, top_k, top_p):
    generator = np.random.default_rng(top_k * 100 + int(top_p * 10))
    for temperature in (0.4, 1.0, 1.7):
        logits = generator.normal(0, 2, VOCAB_SIZE)
        if ties:
            logits = np.round(logits)
            assert len(set(logits)) < VOCAB_SIZE / 2
        seen = generator.integers(0, VOCAB_SIZE, 9).tolist()
        before = logits.copy()
        expected = _expected(logits, temperature, top_p, top_k, penalty, seen)
        found = _found(logits, temperature, top_p, top_k, penalty, seen)
        assert np.array_equal(logits, before)
        if ties and top_p < 1:
            # which of equals at the edge of the nucleus stays is left to an unstable sort there: how many is not
            found, expected = np.sort(found), np.sort(expected)
        assert np.flatnonzero(found).tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_of_equals_at_the_edge_of_the_nucleus_the_smaller_ids_stay():
    assert np.flatnonzero(_found(np.zeros(6), 1.0, 0.5)).tolist() == [0, 1, 2]


def test_a_penalty_changes_seen_tokens_only_and_greedy_choices_too():
    logits = np.array([2.0, 1.9, -1.0])
    assert choose_token(logits, 0.0, 0.0, 1.0) == 0
    assert choose_token(logits, 0.0, 0.0, 1.0, repetition_penalty=1.5, seen=[0, 0]) == 1
    assert choose_token(logits, 0.0, 0.0, 1.0, repetition_penalty=1.5, seen=[1, 2]) == 0
    # a negative logit is multiplied: less likely, not more
    probabilities = _found(logits, 1.0, 1.0, 0, 4.0, [2])
    np.testing.assert_allclose(probabilities, np.exp([2, 1.9, -4.0]) / np.exp([2, 1.9, -4.0]).sum(), atol=1e-12)


def test_log_probs_are_of_the_unprocessed_row():
    logits = np.array([1.0, -np.inf, 3.0, 700.0])
    np.testing.assert_allclose(np.exp(log_probs(logits)).sum(), 1)
    np.testing.assert_allclose(log_probs(logits), torch.from_numpy(logits).log_softmax(-1).numpy())
