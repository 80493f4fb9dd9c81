"""Engines that others ship, playing a script of searches: each generates the same number of tokens for every sample.

    sequential           one `generate` call a sample, whole prompt each time, stopped where the sample ends: what the
                         method's official code does, with stops that lose nothing (it has none)
    batched              one `generate` call a state, `num_return_sequences` samples of it together
    continuous batching  transformers' own, all questions level by level, prefixes shared block by block
    vLLM                 all questions level by level, automatic prefix caching

A call of the first two is independent of all others, so a random sample of calls is timed and the whole is estimated.
Scored labels (`Call.labels`) are one forward over the prompt for each call, for all peers of transformers.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.search_script import TEMPERATURE, Call, Script
from cpo_kernels.integrations.transformers.fused import unfuse_layers
from cpo_kernels.integrations.transformers.projections import separate_projections

CPU_BATCH_TOKENS = 256
NO_EOS = -1  # an id that no token has, for the engine that wants one


def stock_copy(model: Any) -> Any:
    """A second model of the same weights (not copies of them) under `sdpa`, which nothing of ours has touched."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    unfuse_layers(twin)
    separate_projections(twin)
    twin.set_attn_implementation("sdpa")
    twin.generation_config = GenerationConfig()
    return twin.eval()


class LengthReached(StoppingCriteria):
    """Ends each row of a batch where its sample ends."""

    def __init__(self, prompt_length: int, lengths: torch.Tensor) -> None:
        self._prompt_length, self._lengths = prompt_length, lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[B] bool, which rows are done."""
        return self._lengths <= input_ids.shape[1] - self._prompt_length


@torch.inference_mode()
def generate_call(model: Any, call: Call, greedy: bool = False) -> torch.Tensor:
    """All samples of a call in one `generate`: token ids [B, prompt + longest], rows filled up behind their end."""
    if call.labels:
        prompt = torch.tensor([call.prompt], device=model.device)
        return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits
    num_samples, longest = len(call.lengths), max(call.lengths)
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
    prompt = torch.tensor([call.prompt], device=model.device)
    result: torch.Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            **sampling,
            num_return_sequences=num_samples if not greedy else 1,
            max_new_tokens=longest,
            pad_token_id=0,
        ),
        stopping_criteria=StoppingCriteriaList(
            [LengthReached(len(call.prompt), torch.tensor(call.lengths, device=model.device))] if not greedy else []
        ),
    )
    return result


def single_calls(call: Call) -> list[Call]:
    """The calls of an engine that generates one sample at a time."""
    return [call] if call.labels else [Call(call.prompt, (length,)) for length in call.lengths]


def continuous_batching(model: Any, script: Script) -> tuple[Callable[[], int], Callable[[], None]]:
    """A run of the script that returns the tokens generated, and what ends the engine.

    Raises:
        ValueError: the script scores labels, which this engine cannot.
    """
    if any(call.labels for call in script.calls()):
        raise ValueError("continuous batching has no scoring")
    from transformers.generation import ContinuousBatchingConfig

    longest = max(length for call in script.calls() for length in call.lengths)
    config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=longest, eos_token_id=NO_EOS, pad_token_id=0
    )
    # every step computes as many places as it may hold; the default is for a GPU, and on a CPU 256 was the fastest
    max_batch_tokens = None if model.device.type == "cuda" else CPU_BATCH_TOKENS
    manager = model.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=max_batch_tokens),
    )
    manager.warmup()
    manager.start()

    def run() -> int:
        total = 0
        for calls in _batches(script):
            names = set()
            for call in calls:
                for length in call.lengths:
                    names.add(manager.add_request(list(call.prompt), max_new_tokens=length, eos_token_id=NO_EOS))
            while names:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("continuous batching ended before its requests")
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(f"continuous batching: {result.error}")
                    names.discard(result.request_id)
                    total += len(result.generated_tokens)
        return total

    def end() -> None:
        manager.stop(block=True, timeout=10)
        manager.destroy()

    return run, end


def vllm(model: Any, script: Script) -> tuple[Callable[[], int], Callable[[], None]]:
    """As `continuous_batching`, by vLLM with dummy weights of the model's shape; its speed does not depend on them."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    folder = tempfile.TemporaryDirectory()
    model.config.save_pretrained(folder.name)
    engine = LLM(
        model=folder.name,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=str(model.dtype).removeprefix("torch."),
        gpu_memory_utilization=0.5,  # the contestants share the card
        max_model_len=max(len(call.prompt) + max(call.lengths, default=1) for call in script.calls()) + 1,
    )

    def run() -> int:
        total = 0
        for calls in _batches(script):
            prompts, parameters = [], []
            for call in calls:
                for length in call.lengths or (1,) * len(call.labels):
                    prompts.append({"prompt_token_ids": list(call.prompt)})
                    parameters.append(
                        SamplingParams(
                            temperature=TEMPERATURE, max_tokens=length, ignore_eos=True, detokenize=False, top_k=-1
                        )
                    )
            outputs = engine.generate(prompts, parameters, use_tqdm=False)
            total += sum(len(output.outputs[0].token_ids) for output in outputs)
        return total

    return run, folder.cleanup


def _batches(script: Script) -> Iterator[list[Call]]:
    """Calls that may run together: of all questions, one level's thoughts, then its verdicts."""
    for depth in range(max(map(len, script.questions))):
        levels = [levels[depth] for levels in script.questions if depth < len(levels)]
        for kind in ("thoughts", "verdicts"):
            calls = [call for level in levels for call in getattr(level, kind)]
            if calls:
                yield calls


def seconds_of(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
