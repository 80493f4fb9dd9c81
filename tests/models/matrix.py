"""One forest and one search through a tiny model of an architecture, against the stock model, a sequence at a time.

    training   packed log-probs and every gradient = one unpadded forward a sequence, of a copy that was never prepared
    lora       the same under LoRA on every linear layer but the head, B not zero
    search     tokens of the arena engine, greedy = `generate`; their log-probs = one forward without a cache

Each is equal, or refused by a `ValueError` that this library raises and that names a cause. Anything else is a defect: a
difference above the bound is wrong, a sentence that names no part of the model nameless, any other exception a crash.

Paths are deeper than the windows that a configuration is given. What is refused for that alone is run once more within the
window, and a training that is refused for what the model does in training mode once more in evaluation mode.
"""

import copy
import functools
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.requests import Requests, SampleRequest
from cpo_kernels.integrations.transformers import packed_logps, prepare
from tests.models.tiny_configs import VOCAB_SIZE, WINDOW, tiny_model
from tests.tiny import randomize_lora

BOUND = 1e-5  # of values and of each gradient, relative
NUM_NEW = 6  # tokens of a search
NUM_SHARED = 9  # tokens that all prompts begin with
NO_WINDOW = 200  # tokens: longer than any path
PARTS = ("training", "lora", "search")
OWN_CODE = {"cpo_kernels", "cpo_fast"}
# model types compared in float64 in training: their stock gradients in float32 are 1e-5 (Gemma 4, which does not divide its
# scores by the root of the head size) to 3e-4 (Gemma 3n) from those of a float64 copy, and packed ones no further
IN_FLOAT64 = ("gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
# model type -> linear layers that PEFT itself cannot run once it has wrapped them
NO_LORA = dict.fromkeys(("phimoe", "llama4", "llama4_text"), r".*router")  # it gives two tensors


@dataclass(frozen=True)
class Result:
    """What came of one part: "equal", "refused", or a defect, "wrong", "nameless" or "crashed"."""

    outcome: str
    error: float = 0.0  # the worst, relative
    text: str = ""  # sentence of a refusal, or what is wrong
    only: str = ""  # where it is equal, if not everywhere

    @property
    def is_right(self) -> bool:
        """Equal or refused."""
        return self.outcome in ("equal", "refused")


@dataclass
class Row:
    """What came of an architecture, by part."""

    model_type: str
    model_class: str
    features: tuple[str, ...] = ()
    results: dict[str, Result] = field(default_factory=dict)


def forest(seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Sequences that are prefixes of each other, equal, start at token 1 or at their end, and run 41 tokens deep."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()

    prompt = draw(NUM_SHARED)
    deep, low = prompt + draw(12), prompt + draw(4)
    deepest = low + draw(28)
    sequences = [deep, prompt + draw(5), deep[:14], deep, low, deepest, deepest[:33] + draw(3), draw(5)]
    starts = [NUM_SHARED, NUM_SHARED, NUM_SHARED, 15, 12, 13, 30, 1]
    return sequences, starts


def stock_logps(model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
    """[S] summed log-probs of each sequence from its start on, one unpadded forward a sequence."""
    sums = []
    for sequence, start in zip(sequences, starts, strict=True):
        ids = torch.tensor([sequence])
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
        sums.append(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum())
    return torch.stack(sums)


def gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that takes part, under weights that differ from sequence to sequence."""
    model.zero_grad(set_to_none=True)
    (logps * torch.linspace(-1.0, 2.0, len(logps))).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def worst_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error over all tensors in the 2-norm, and its name.

    A gradient that is zero but for rounding (of a key's bias, say) is compared with a tenth of the median one.
    """
    zero = torch.zeros(())
    norms = sorted(float(value.double().norm()) for value in expected.values())
    least = 0.1 * norms[len(norms) // 2]
    worst, where = 0.0, ""
    for name in sorted(expected.keys() | actual.keys()):
        want, got = expected.get(name, zero).double(), actual.get(name, zero).double()
        error = float((got - want).norm() / max(float(want.norm()), least))
        if not error <= worst:  # NaN counts
            worst, where = error, name
    return worst, where


def compared(packed: nn.Module, stock: nn.Module, seed: int = 0, impl: str | None = None) -> Result:
    """`packed`, prepared here, against `stock`: values and gradients, in the mode that they are in."""
    sequences, starts = forest(seed)
    got = packed_logps(prepare(packed, impl), sequences, starts, impl=impl).segment_logps
    want = stock_logps(stock, sequences, starts)
    value = float((got - want).detach().double().norm() / want.detach().double().norm())
    gradient, where = worst_error(gradients(packed, got), gradients(stock, want))
    error = max(value, gradient)
    if not error <= BOUND:
        return Result("wrong", error, f"values {value:.1e}, gradient {gradient:.1e} of {where}")
    return Result("equal", error)


def with_lora(model: nn.Module, model_type: str, seed: int = 1) -> nn.Module:
    """The model under LoRA on every linear layer but the head, A and B random."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=NO_LORA.get(model_type), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    randomize_lora(adapted, seed)
    return adapted


class CapOnly:
    """Ends a line at the cap alone."""

    def append(self, token: int, generated: list[int], request: SampleRequest) -> str | None:
        """As `StopChecker.append`."""
        generated.append(token)
        return "length" if len(generated) >= request.max_new_tokens else None

    def text(self, ids: list[int]) -> str:
        """The ids as words."""
        return " ".join(map(str, ids))


def generated(stock: Any, prompt: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `generate` writes greedily, and the log-probs of these tokens in one forward without a cache.

    Where what it writes with a cache is not what that forward finds likeliest (a cache that forgets keys which a forward
    reads), it writes without one.
    """
    ids = torch.tensor([list(prompt)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
    for use_cache in (True, False):
        out = stock.generate(input_ids=ids, eos_token_id=-1, use_cache=use_cache, **options)
        with torch.no_grad():
            rows = torch.log_softmax(stock(input_ids=out, use_cache=False).logits[0].double(), dim=-1)
        new = out[0, len(prompt) :]
        rows = rows[len(prompt) - 1 : -1]
        if torch.equal(rows.argmax(dim=-1), new):
            break
    return new, rows.gather(1, new[:, None])[:, 0]


def searched(model: nn.Module, stock: nn.Module, seed: int = 3) -> Result:
    """The arena engine on `model` against `generate` of `stock`, prompts that fork from one another."""
    stock.eval()
    config = SearchConfig(batch_size=8, arena_tokens=512, prefill_tokens=64)
    engine = ArenaEngine(model, None, config, stop_checker=CapOnly())  # type: ignore[arg-type]
    sequences, _ = forest(seed)
    prompts = [sequences[0], sequences[1], sequences[5]]
    engine.cache_prefix(prompts[0][:NUM_SHARED])
    requests = [SampleRequest(tuple(prompt), str(i), 0.0, 1.0, NUM_NEW) for i, prompt in enumerate(prompts)]
    worst = 0.0
    for prompt, answer in zip(prompts, engine.answer(Requests(tuple(requests), keep=True)), strict=True):
        new, want = generated(stock, prompt)
        if list(answer.token_ids) != new.tolist():
            return Result("wrong", float("inf"), f"tokens {list(answer.token_ids)}, generate {new.tolist()}")
        # of a model that is all but certain, log-probs are themselves rounding
        size = max(float(want.norm()), 1e-2)
        worst = max(worst, float((torch.tensor(answer.logps, dtype=torch.float64) - want).norm()) / size)
    return Result("equal", worst) if worst <= BOUND else Result("wrong", worst, "log-probs of the tokens")


def rounded(model_type: str, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Errors of packed and of stock in bfloat16 against stock in float32, of the values and of all gradients together."""
    exact = tiny_model(model_type, seed)
    packed, stock = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    sequences, starts = forest(seed)
    found = []
    for model in (exact, stock, packed):
        if model is packed:
            logps = packed_logps(prepare(packed), sequences, starts).segment_logps
        else:
            logps = stock_logps(model, sequences, starts)
        found.append((logps.detach().double(), gradients(model, logps)))
    (want, expected), *others = found

    def flat(grads: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([grads[name].double().flatten() for name in sorted(expected)])

    errors = {"values": [], "gradients": []}
    for logps, grads in others[::-1]:
        errors["values"].append(float((logps - want).norm() / want.norm()))
        errors["gradients"].append(float((flat(grads) - flat(expected)).norm() / flat(expected).norm()))
    return {name: (pair[0], pair[1]) for name, pair in errors.items()}


def attempted(part: Callable[[], Result], model: nn.Module) -> Result:
    """The result of a part on a model, its exceptions included."""
    try:
        return part()
    except Exception as error:
        text = " ".join(str(error).split())
        last = traceback.extract_tb(error.__traceback__)[-1]
        unforeseen = (
            "was not proved exact on a forest" in text and "ended in" in text
        )  # what `prepare` made of any exception
        if unforeseen or not (isinstance(error, ValueError) and OWN_CODE & set(Path(last.filename).parts)):
            return Result(
                "crashed", text=f"{type(error).__name__}: {text[:300]} ({Path(last.filename).name}:{last.lineno})"
            )
        return Result("refused" if _names_a_part(text, model) else "nameless", text=text)


def _names_a_part(sentence: str, model: Any) -> bool:
    """Whether a sentence names the model's class, a module, a class of one, a layer by its number, the head or a key."""
    words = set(re.findall(r"[A-Za-z_][\w.]*\w", sentence))
    modules = {*(name for name, _ in model.named_modules() if name), *(type(each).__name__ for each in model.modules())}
    keys = {name for name in vars(model.config.get_text_config(decoder=True)) if "_" in name}
    return bool(words & (modules | keys)) or re.search(r"layer \d|output head", sentence) is not None


def features(model: Any) -> tuple[str, ...]:
    """What an architecture's attention and logits have beyond Llama's, as its tiny configuration says."""
    config = model.config.get_text_config(decoder=True)
    types = {str(each) for each in getattr(config, "layer_types", None) or ()}
    names = " ".join(name for name, _ in model.named_parameters())

    def has(*keys: str) -> bool:
        return any(getattr(config, key, None) not in (None, 0, 1, 1.0) for key in keys)

    found = {
        "latent attention": has("kv_lora_rank"),
        "attention sinks": "sink" in names,
        "soft-cap on scores": has("attn_logit_softcapping"),
        "soft-cap on logits": has("final_logit_softcapping"),
        "scaled logits": has("logits_scaling", "logit_scale", "lm_head_multiplier"),
        "sliding windows": any("sliding" in each for each in types) or (not types and has("sliding_window")),
        "keys chosen by an index": has("index_topk", "index_topk_blocks"),
        "experts": "experts" in names or "router" in names,
    }
    return tuple(name for name, is_so in found.items() if is_so)


@functools.cache
def run(model_type: str, seed: int = 0, window: int = WINDOW, impl: str | None = None) -> Row:
    """Every part of one architecture. `Exception` of any kind where Transformers cannot build it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = _run(model_type, seed, window, impl)
        if window == NO_WINDOW:
            return row
        for part, result in row.results.items():
            if result.outcome == "refused" and re.search(r"longer than|window", result.text):
                within = run(model_type, seed, NO_WINDOW, impl).results[part]
                if within.outcome != "refused":
                    row.results[part] = Result(
                        within.outcome, within.error, result.text, within.only or "within the window"
                    )
    return row


def _run(model_type: str, seed: int, window: int, impl: str | None) -> Row:
    model = tiny_model(model_type, seed, window)
    row = Row(model_type, type(model).__name__, features(model))
    stock = copy.deepcopy(model)
    proved = attempted(lambda: Result("equal" if prepare(model, impl) is model else "wrong"), model)
    if proved.outcome != "equal":
        row.results = dict.fromkeys(PARTS, proved)  # every part begins with this call
        return row
    row.results["search"] = attempted(lambda: searched(model, stock), model)
    if model_type in IN_FLOAT64:
        model, stock = model.double(), stock.double()
    for part in ("training", "lora"):
        if part == "lora":
            stock = with_lora(stock, model_type)
            model = copy.deepcopy(stock)
        for mode in (True, False):
            both = [each.train(mode) for each in (model, stock)]
            result = attempted(functools.partial(compared, *both, seed=seed, impl=impl), model)
            if mode:
                row.results[part] = result
            elif result.outcome != "refused":
                row.results[part] = Result(result.outcome, result.error, row.results[part].text, "in evaluation mode")
            if "dropout or noise" not in result.text:
                break
    return row
