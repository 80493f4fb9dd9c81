"""The batch sampler gives each row the distribution, the penalty and the random numbers that are its own."""

import numpy as np
import pytest
import torch

from cpo_fast.search.engine import Ask, Request
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.sampler import BatchSampler, uniforms
from tests.search.hugging_face_processors import processed
from tests.search.test_arena_engine import NEWLINES, TOKENIZER, random_prompts, settings, tiny

VOCAB_SIZE = 7
NUM_DRAWS = 20_000
# 0.999 quantiles of chi-square by degrees of freedom; the draws are fixed, so a test passes always or never
QUANTILES = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 36: 67.99}
PROMPT = (3, 3, 4)  # one likely token, twice, and one whose logit is negative


def build(requests, generated, vocab_size):
    return BatchSampler.build(requests, generated, len(requests), vocab_size, torch.device("cpu"))


def statistic(counts, expected):
    """Chi-square of counts against the counts that are expected; a token without mass must not occur."""
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
def test_frequencies_pass_a_chi_square_test(temperature, top_p, top_k, penalty):
    logits = torch.tensor([0.3, -0.7, 1.1, 0.9, -1.5, 0.2, 0.0])
    values = {"top_k": top_k, "repetition_penalty": penalty}
    requests = [Request(PROMPT, f"row {n}", temperature, top_p, 2, **values) for n in range(NUM_DRAWS)]
    # both steps of every row: the second one reads another number of the same stream
    tokens = []
    for step in (0, 1):
        sampler = build(requests, [()] * NUM_DRAWS, VOCAB_SIZE)
        chosen, _ = sampler.sample(logits.expand(NUM_DRAWS, -1).clone(), torch.full((NUM_DRAWS,), step))
        tokens.append(chosen.numpy())
    expected = processed(logits, PROMPT, temperature, top_p, top_k, penalty)
    for chosen in tokens:
        found, freedom = statistic(np.bincount(chosen, minlength=VOCAB_SIZE), NUM_DRAWS * expected)
        assert found < QUANTILES[freedom]
    pairs = np.bincount(tokens[0] * VOCAB_SIZE + tokens[1], minlength=VOCAB_SIZE**2)
    if expected.all():
        first, second = (np.bincount(chosen, minlength=VOCAB_SIZE) for chosen in tokens)
        found, _ = statistic(pairs, np.outer(first, second).ravel() / NUM_DRAWS)
        assert found < QUANTILES[36]  # (7 - 1)^2: the steps of a row are independent


@pytest.mark.parametrize("rebuild", [False, True], ids=["kept", "rebuilt at every step"])
def test_every_row_is_drawn_from_hugging_faces_distribution_of_its_own_prompt_and_tokens(rebuild):
    """Prompt ids count for the penalty, as do the generated ones; rows of any settings stand side by side."""
    vocab_size, num_steps = 13, 6
    generator = np.random.default_rng(5)
    requests = []
    for number in range(48):
        prompt = tuple(int(token) for token in generator.integers(0, vocab_size, 4))
        penalty, top_k = float(generator.choice([1.0, 0.6, 1.1, 2.5])), int(generator.choice([0, 1, 9]))
        temperature, top_p = float(generator.choice([0.0, 0.4, 1.5])), float(generator.choice([1.0, 0.7]))
        requests.append(Request(prompt, f"row {number}", temperature, top_p, num_steps, top_k, penalty))
    generated = [[] for _ in requests]
    sampler = build(requests, generated, vocab_size)
    changed = 0
    for step in range(num_steps):
        if rebuild:
            sampler = build(requests, generated, vocab_size)
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


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_greedy_with_a_repetition_penalty_equals_generate(name):
    model = tiny(name, initializer_range=0.2)
    few_shot, prompts = random_prompts(71)
    requests = tuple(Request(prompt, "greedy", 0.0, 1.0, 12, repetition_penalty=1.3) for prompt in prompts)
    engine = ArenaEngine(model, TOKENIZER, settings())
    engine.cache_prefix(few_shot)
    answers = engine.answer(Ask(requests, keep=True))
    plain = 0
    for prompt, sample in zip(prompts, answers, strict=True):
        expected, without = (_generated(model, prompt, penalty) for penalty in (1.3, 1.0))
        assert list(sample.token_ids) == expected
        plain += expected == without
    assert plain < len(prompts)


def _generated(model, prompt, penalty):
    ids = torch.tensor([prompt])
    new = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, repetition_penalty=penalty)
    line = []
    for token in new[0, len(prompt) :].tolist():
        if token == 2:
            break
        line.append(token)
        if token in NEWLINES:
            break
    return line
