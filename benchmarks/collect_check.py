"""Is the arena engine exact on the very searches that are timed? On a random sample of their calls.

float32:   greedy tokens are those of `generate`, samples those of the reference engine at the same uniforms, log-probs
           those of a forward without a cache.
bfloat16:  tokens may differ where two are nearly equal; the log-probs of what was sampled must be as near to a float32
           forward as those of the stock model's own bfloat16 forward.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import Check
from benchmarks.search_model import SearchSet
from benchmarks.search_ours import FixedLength, decode_batch
from benchmarks.search_peers import generate_call, stock_copy
from benchmarks.search_script import Call, Script, requests
from cpo_fast.search.engine import Requests, Sample
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.huggingface import HuggingFaceEngine

NUM_CHECKED, NUM_SAMPLES = 4, 3  # calls, and samples of each
MAX_LOGP_ERROR = 2e-5  # relative to the largest |logp|: float32 through thirty layers, by two orders of summation
# the research note's bar for bfloat16: mean error against float32, over that of the stock forward
MAX_ERROR_RATIO = 1.5


def check_exact(chosen: SearchSet, script: Script, generator: random.Random) -> list[Check]:
    """Checks of a sample of the script's generating calls; at least one of a verdict."""
    device = next(chosen.model.parameters()).device
    stock = stock_copy(chosen.model)  # before `prepare` touches the model's configuration
    kinds = [[call for call in script.calls(kind) if call.lengths] for kind in ("thoughts", "verdicts")]
    calls = [
        Call(call.prompt, call.lengths[:NUM_SAMPLES])
        for found in kinds
        if found
        for call in generator.sample(found, min(len(found), NUM_CHECKED // 2))
    ]
    items = tuple(item for place, call in enumerate(calls) for item in requests(call, f"check/{place}"))
    prompts = [item.token_ids for item in items]
    singles = [Call(call.prompt, (max(call.lengths),)) for call in calls]
    greedy = tuple(item for place, call in enumerate(singles) for item in requests(call, f"greedy/{place}", 0.0))
    # the arena is given back before a float32 copy of the model is made
    samples, chosen_tokens = _answers(chosen, script, device, items, greedy)
    if chosen.model.dtype == torch.bfloat16:
        return [_nearness(stock, prompts, samples)]
    return [
        Check("greedy tokens unlike generate's", _greedy_differences(stock, singles, chosen_tokens), 0.0),
        Check("samples unlike the reference engine's", _sample_differences(stock, items, samples), 0.0),
        Check("log-probs against no cache", _logp_error(stock, prompts, samples), MAX_LOGP_ERROR),
    ]


def _answers(
    chosen: SearchSet, script: Script, device: torch.device, *asks: tuple[Any, ...]
) -> tuple[list[Sample], ...]:
    """What the engine gives, an ask after another."""
    engine = ArenaEngine(chosen.model, None, chosen.settings, decode_batch(device.type == "cuda"), FixedLength())
    for prefix in script.shared:
        engine.cache_prefix(prefix)
    return tuple(
        [answer for answer in engine.answer(Requests(items, keep=True)) if isinstance(answer, Sample)] for items in asks
    )


def _greedy_differences(stock: Any, calls: Sequence[Call], samples: Sequence[Sample]) -> float:
    expected = [generate_call(stock, call, greedy=True)[0, len(call.prompt) :].tolist() for call in calls]
    return sum(ids != list(sample.token_ids) for ids, sample in zip(expected, samples, strict=True)) / len(calls)


def _sample_differences(stock: Any, items: Sequence[Any], samples: Sequence[Sample]) -> float:
    reference = HuggingFaceEngine(stock, None, 64, FixedLength())
    answers = reference.answer(Requests(tuple(items), keep=False))
    expected = [answer for answer in answers if isinstance(answer, Sample)]
    pairs = zip(samples, expected, strict=True)
    return sum(sample.token_ids != other.token_ids for sample, other in pairs) / len(samples)


@torch.inference_mode()
def _logps(model: Any, prompt: Sequence[int], sample: Sample) -> torch.Tensor:
    """Log-probs of a sample's tokens by one forward over prompt and tokens, [n] float64."""
    ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
    count = len(sample.token_ids)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=-1).gather(1, ids[0, -count:].unsqueeze(1)).squeeze(1).cpu()


def _logp_error(stock: Any, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> float:
    worst = 0.0
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = _logps(stock, prompt, sample)
        error = float((torch.tensor(sample.logps) - expected).abs().max())
        worst = max(worst, error / max(1.0, float(expected.abs().max())))
    return worst


def _nearness(stock: Any, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> Check:
    own = [_logps(stock, prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
    exact_model = copy.deepcopy(stock).float()
    exact = [_logps(exact_model, prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
    del exact_model
    ours = torch.cat([torch.tensor(sample.logps) for sample in samples])
    truth, theirs = torch.cat(exact), torch.cat(own)
    ratio = float((ours - truth).abs().mean() / (theirs - truth).abs().mean())
    return Check("log-prob error over the stock model's", ratio, MAX_ERROR_RATIO)
