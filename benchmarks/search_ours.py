"""The arena engine playing a script, with each of its features switched off in turn, and what it has read."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.search_peers import seconds_of
from benchmarks.search_script import Call, Level, Script, SearchShape, draw_script
from cpo_fast.config import SearchConfig
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.cuda_graph_batch import CudaGraphBatch
from cpo_fast.search.engine.decode_batch import DecodeBatch
from cpo_fast.search.engine.requests import SampleRequest
from cpo_fast.search.engine.stopping import StopChecker

OURS = "ours"
ROOFLINE_STEPS = 48
BANDWIDTH_BYTES = 2**28  # of a copy that measures memory bandwidth: larger than any cache


class FixedLength(StopChecker):
    """Lines end at their cap and nowhere else."""

    def __init__(self) -> None:
        pass

    def append(self, token: int, generated: list[int], request: SampleRequest) -> Any:
        """Append the token; the line ends when it is full, as lines do that a search goes on from."""
        generated.append(token)
        return "newline" if len(generated) >= request.max_new_tokens else None

    def text(self, ids: list[int]) -> str:
        """Nothing reads it."""
        return ""


@dataclass(frozen=True)
class Variant:
    """One way to run the engine: its decode batch, and settings that differ from the benchmark's."""

    make_batch: Callable[..., DecodeBatch]
    settings: Mapping[str, Any]
    cached: bool = True  # shared prompts computed once for all questions
    keep: bool = True  # states stay in the arena for the next level


@dataclass(frozen=True)
class Played:
    """One run of a variant.

    Attributes:
        seconds: wall or CPU seconds, shared prompts included.
        num_tokens: generated. num_prefilled: computed as prompts. num_steps: forwards that generated.
        occupancy: rows that generated over rows that were computed.
        mean_rows: rows a step. kv_bytes: keys and values read by steps of generation, a shared one once.
        weight_bytes: read in one step. compositions: how often the batch was rebuilt; 0 without graphs.
    """

    seconds: float
    num_tokens: int
    num_prefilled: int
    num_steps: int
    occupancy: float
    mean_rows: float
    kv_bytes: int
    weight_bytes: int
    compositions: int


def decode_batch(graphs: bool) -> type[DecodeBatch]:
    """With CUDA graphs or without."""
    return CudaGraphBatch if graphs else DecodeBatch


def variants(graphs: bool, num_candidates: int) -> dict[str, Variant]:
    """The engine as it is, and without each of its features."""
    full = decode_batch(graphs)
    found = {
        OURS: Variant(full, {}),
        "ours without shared reads": Variant(partial(full, share=False), {}),
        "ours without cached prompts": Variant(full, {}, cached=False),
        "ours keeping only what prompts share": Variant(full, {}, keep=False),
        "ours with one question at a time": Variant(full, {"questions_in_flight": 1}),
        "ours with one state at a time": Variant(full, {"batch_size": num_candidates}),
        "ours without refill": Variant(partial(full, refill=False), {}),
    }
    if graphs:
        found["ours without CUDA graphs"] = Variant(DecodeBatch, {})
    return found


def play(
    model: Any, script: Script, settings: SearchConfig, variant: Variant, clock: Any = time.perf_counter
) -> Played:
    """Run a script once, in a new arena, whose allocation is not timed."""
    settings = settings.model_copy(update=dict(variant.settings))
    engine = ArenaEngine(model, None, settings, variant.make_batch, FixedLength())
    device = next(model.parameters()).device
    totals: list[int] = []

    def run() -> None:
        if variant.cached:
            for prefix in script.shared:
                engine.cache_prefix(prefix)
        for _, result, _ in engine.run(script.searches(variant.keep)):
            if isinstance(result, Exception):
                raise result
            totals.append(result)

    seconds = seconds_of(run, device, clock)
    batch, counts = engine.scheduler.batch, engine.scheduler.batch.counts
    shared = sum(map(len, script.shared)) if variant.cached else 0
    return Played(
        seconds=seconds,
        num_tokens=sum(totals),
        num_prefilled=engine.scheduler.num_prefilled + shared,
        num_steps=counts.num_steps,
        occupancy=counts.num_tokens / max(1, counts.num_slots),
        mean_rows=counts.num_tokens / max(1, counts.num_steps),
        kv_bytes=counts.num_keys * engine.arena.bytes_per_token,
        weight_bytes=read_weight_bytes(model),
        compositions=getattr(batch, "num_rebuilds", 0),
    )


def bandwidth(device: torch.device) -> float:
    """Bytes a second of large copies, read and write counted, best of five runs of several."""
    num_bytes, num_copies = (4 * BANDWIDTH_BYTES, 20) if device.type == "cuda" else (BANDWIDTH_BYTES, 2)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(num_copies):
            target.copy_(source)

    seconds = [seconds_of(copy, device) for _ in range(6)][1:]
    return 2 * num_bytes * num_copies / min(seconds)


def decode_roofline(model: Any, settings: SearchConfig, shape: SearchShape, num_rows: int) -> dict[str, float]:
    """Seconds of a step of `num_rows` rows that are all active, against reading weights and keys once.

    Returns:
        num_rows; step_seconds; bytes a step; share: seconds at the device's bandwidth over step_seconds.
    """
    device = next(model.parameters()).device
    num_questions = -(-num_rows // shape.num_candidates)
    even = replace(shape, thought=(ROOFLINE_STEPS, ROOFLINE_STEPS), depth=1)
    drawn = draw_script(even, num_questions)
    last = num_rows - (num_questions - 1) * shape.num_candidates
    levels = []
    for place, (level, *_) in enumerate(drawn.questions):
        (call,) = level.thoughts
        lengths = call.lengths[:last] if place == num_questions - 1 else call.lengths
        levels.append((Level((Call(call.prompt, lengths),), ()),))
    script = Script(drawn.shared[:1], tuple(levels))
    settings = settings.model_copy(update={"batch_size": num_rows, "questions_in_flight": num_questions})
    engine = ArenaEngine(model, None, settings, decode_batch(device.type == "cuda"), FixedLength())
    engine.cache_prefix(script.shared[0])
    batch, ends = engine.scheduler.batch, []
    step = batch.step

    def timed() -> Any:
        ended = step()
        ends.append(time.perf_counter())
        return ended

    batch.step = timed  # type: ignore[method-assign]
    assert all(not isinstance(result, Exception) for _, result, _ in engine.run(script.searches()))
    # the first steps compile and record, and wait for the prefill; the last ones only read
    step_seconds = (ends[-4] - ends[4]) / (len(ends) - 8)
    del batch.step  # the engine must not keep itself alive
    weights, counts = read_weight_bytes(model), batch.counts
    num_bytes = weights + counts.num_keys / counts.num_steps * engine.arena.bytes_per_token
    share = num_bytes / bandwidth(device) / step_seconds
    return {"num_rows": num_rows, "step_seconds": step_seconds, "bytes": num_bytes, "share": share}


def read_weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all, but for a table of embeddings that is not the head too."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if table is head else total - table.numel() * table.element_size()
