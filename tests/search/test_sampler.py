"""The sampler: named random numbers and inverse CDF over the processed distribution."""

import numpy as np
import pytest

from cpo_fast.search.engine.sampler import choose_token, uniforms


def test_uniforms_depend_on_the_name_alone_and_a_longer_table_starts_the_same():
    assert np.array_equal(uniforms("a", 5), uniforms("a", 50)[:5])
    assert not np.array_equal(uniforms("a", 5), uniforms("b", 5))
    assert len(set(uniforms("a", 1000))) == 1000


def test_frequencies_follow_the_tempered_softmax():
    logits = np.array([1.0, 0.0, 2.0, -np.inf])
    temperature = 0.7
    draws = [choose_token(logits, u, temperature, 1.0) for u in uniforms("frequencies", 20000)]
    weights = np.exp(logits / temperature)
    expected = weights / weights.sum()
    found = np.bincount(draws, minlength=4) / len(draws)
    assert found[3] == 0
    # four standard deviations of a share near 1/2 over 20000 draws are 0.0142
    assert np.abs(found - expected).max() < 0.0142


def test_every_uniform_maps_to_a_token_with_mass_at_both_ends():
    logits = np.array([-np.inf, 0.0, 0.0, -np.inf])
    assert choose_token(logits, 0.0, 1.0, 1.0) == 1
    assert choose_token(logits, np.nextafter(1.0, 0.0), 1.0, 1.0) == 2


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = np.log(np.array([0.1, 0.5, 0.05, 0.35]))
    draws = {choose_token(logits, u, 1.0, 0.8) for u in np.linspace(0, 0.999, 500)}
    assert draws == {1, 3}
    assert {choose_token(logits, u, 1.0, 1e-9) for u in np.linspace(0, 0.999, 50)} == {1}


def test_greedy_takes_the_largest_and_the_smallest_id_on_a_tie():
    assert choose_token(np.array([0.0, 3.0, 3.0]), 0.99, 0.0, 1.0) == 1


@pytest.mark.parametrize("logits", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_refused(logits):
    with pytest.raises(ValueError, match="not finite"):
        choose_token(np.array(logits), 0.5, 1.0, 1.0)
