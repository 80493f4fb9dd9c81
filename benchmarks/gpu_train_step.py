"""One DPO step of a 7B-shaped model on a GPU: the pairs packed once, against TRL's DPOTrainer and against padded rows.

Llama-2-7B's shape with random bf16 weights, LoRA r 8 on q, k and v, online reference, gradient checkpointing: the same
for all. The baselines run at their fastest batch size, searched from 1 in powers of two until memory ends. Two orders:
`pairs`, 32 pairs of 32 questions, and `questions`, whole trees of 27 pairs. Speed-up stands beside the token ratio that
it could reach, and peak memory (all of it, weights too) beside that of the baseline. A further row says what a cached
reference and no checkpointing add; it is no like-for-like comparison.

TRL's trainer runs as it ships, its fused head on.

First, two layers of the same shape in float32 must give the baselines' loss and gradient; otherwise nothing is timed or
printed. The bf16 differences of the whole model are shown, not judged: both sides round. Ours is measured first, and
every contestant is written to gpu_train_step_contestants.jsonl as it comes, so that a command whose time is up leaves
what it has.

    python -m benchmarks.gpu_train_step [--order pairs|questions] [--baselines TRL] [--shape llama-2-7b|tiny] ...
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.clock import Clock, peak_bytes, reason
from benchmarks.harness import Check, InexactError, TimeUp, Timing, end_in_time, gate, record, show
from benchmarks.step_contestants import (
    LLAMA_2_7B,
    TINY_LLAMA,
    StepContestant,
    cached_reference,
    packed,
    padded,
    random_model,
    trl,
)
from benchmarks.workload import TINY, Pair, TreeShape, sequences_of, step_pairs
from cpo_kernels import build_forest
from cpo_kernels.integrations.transformers import split_pairs
from cpo_kernels.tolerances import end_to_end_bound

SHAPES = {  # model, trees, pairs in order `pairs`, tokens a micro-batch of ours, dtype
    "llama-2-7b": (LLAMA_2_7B, TreeShape(), 32, 16384, torch.bfloat16),
    "tiny": (TINY_LLAMA, TINY, 4, 256, torch.float32),
}
BASELINES: dict[str, Callable[[Any, bool], StepContestant]] = {"TRL": trl, "padded": padded}
OURS, FURTHER = "packed", "packed, cached reference, no checkpointing"
CHECKED_LAYERS, CHECKED_PAIRS = 2, 3
MIN_SHARE, MAX_MEMORY = 0.7, 0.5  # of the token ratio, of TRL's peak
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}  # dense bf16, the vendor's data sheets
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Measured:
    """A contestant's step. Bytes are None where the device does not count them."""

    name: str
    batch_size: int | None  # pairs of a micro-batch; None: by tokens
    num_tokens: int  # tokens that met the backbone once, padding included
    timing: Timing
    peak_bytes: int
    loss: float
    gradient: torch.Tensor
    passes: int  # over the backbone without recomputation: policy forward and backward, reference forward
    searched: dict[int, float | str]


def check_exact(
    model_shape: dict[str, Any], pairs: Sequence[Pair], baselines: Sequence[str], device: torch.device
) -> tuple[list[Check], dict]:
    """Loss and gradient of ours against each baseline in float32, and why a baseline cannot run."""
    results: dict[str, tuple[float, torch.Tensor]] = {}
    failures: dict[str, str] = {}
    for name, make in {OURS: packed, **{name: BASELINES[name] for name in baselines}}.items():
        try:
            base = random_model(model_shape, CHECKED_LAYERS, torch.float32, device)
            contestant = make(base, True)
            results[name] = contestant.step([list(pairs)]), contestant.gradient()
        except Exception as error:  # a peer that breaks is a result
            if name == OURS:
                raise InexactError(f"nothing was measured: ours failed: {reason(error)}") from error
            failures[name] = reason(error)
    bound = end_to_end_bound(torch.float32)
    our_loss, our_gradient = results.pop(OURS)
    if not results:
        raise InexactError(f"nothing was measured: no baseline to compare with: {failures}")
    checks = []
    for name, (loss, gradient) in results.items():
        difference = float((our_gradient - gradient).norm() / gradient.norm())
        checks += [
            Check(f"loss against {name}", abs(our_loss - loss) / abs(loss), bound),
            Check(f"gradient against {name}", difference, bound),
        ]
    return checks, failures


def split(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Micro-batches of `size` pairs in the order given."""
    return [list(pairs[first : first + size]) for first in range(0, len(pairs), size)]


def padded_tokens(batches: Sequence[Sequence[Pair]]) -> int:
    """Tokens of right-padded rows, two a pair, padded to the longest of their micro-batch."""
    return sum(2 * len(b) * max(len(p) + max(len(c), len(r)) for p, c, r in b) for b in batches)


def fastest(
    contestant: StepContestant, pairs: Sequence[Pair], device: torch.device, deadline: float
) -> tuple[int, dict[int, float | str]]:
    """The batch size with the shortest step, and seconds or the failure of each that was tried until the deadline."""
    clock, searched, size = Clock(device), {}, 1
    while True:
        batches = split(pairs, size)
        try:
            contestant.step(batches[:1])  # first use of a size is not timed
            searched[size] = clock.seconds(lambda batches=batches: contestant.step(batches))
        except torch.OutOfMemoryError as error:
            searched[size] = reason(error)
            break
        if size >= len(pairs) or time.monotonic() > deadline:
            break
        size *= 2
    seconds = {size: value for size, value in searched.items() if isinstance(value, float)}
    if not seconds:
        raise MemoryError("one pair does not fit")
    return min(seconds, key=seconds.__getitem__), searched


def measure_step(
    name: str, contestant: StepContestant, batches: list[list[Pair]], arguments: argparse.Namespace, **facts: Any
) -> Measured:
    """Time a contestant's step after one that is not timed."""
    device, clock = arguments.device, Clock(arguments.device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    loss = contestant.step(batches)
    gradient = contestant.gradient()
    seconds = tuple(clock.seconds(lambda: contestant.step(batches)) for _ in range(arguments.repeats))
    contestant.model.zero_grad(set_to_none=True)
    peak = before + peak_bytes(lambda: contestant.step(batches), device)
    return Measured(name=name, timing=Timing(seconds), peak_bytes=peak, loss=loss, gradient=gradient, **facts)


def run_all(
    pairs: list[Pair], arguments: argparse.Namespace, failures: dict[str, str], deadline: float
) -> Iterator[Measured]:
    """Measure one contestant after another, alone in memory, so that a peak is its own. Failures join `failures`.

    A contestant that has not begun at `deadline`, a `time.monotonic()`, is left out, and so are all that follow a request
    to end. One that fails stops no other, ours included.
    """
    model_shape, _, _, max_tokens, dtype = SHAPES[arguments.shape]
    device, num_layers = arguments.device, model_shape["num_hidden_layers"]
    batches = [[pairs[index] for index in part] for part in split_pairs(pairs, max_tokens)]
    num_tokens = sum(build_forest(sequences_of(batch)[0]).num_tokens for batch in batches)
    by_tokens = {"batch_size": None, "num_tokens": num_tokens, "searched": {}}
    known: dict[tuple[int, ...], float] = {}

    def base() -> nn.Module:
        return random_model(model_shape, num_layers, dtype, device)

    def ours() -> Measured:
        contestant = packed(base(), True)
        measured = measure_step(OURS, contestant, batches, arguments, passes=3, **by_tokens)
        known.update(cached_reference(contestant, batches))
        return measured

    def further() -> Measured:
        return measure_step(FURTHER, packed(base(), False, known), batches, arguments, passes=2, **by_tokens)

    def baseline(name: str) -> Measured:
        # half of what is left: the other half is for the step itself
        until = time.monotonic() + (deadline - time.monotonic()) / 2
        size, searched = fastest(BASELINES[name](base(), True), pairs, device, until)
        _release(device)  # running out of memory may leave a trainer without its checkpointing: a new one is measured
        padded_batches = split(pairs, size)
        facts = {"batch_size": size, "num_tokens": padded_tokens(padded_batches), "passes": 3, "searched": searched}
        return measure_step(name, BASELINES[name](base(), True), padded_batches, arguments, **facts)

    makers = {OURS: ours, **{name: partial(baseline, name) for name in arguments.baselines}, FURTHER: further}
    for name, make in makers.items():
        if name in failures:
            continue
        if time.monotonic() > deadline:
            failures[name] = "left out: the time was up"
            continue
        try:
            yield make()
        except TimeUp as error:
            failures[name] = str(error)
            deadline = 0.0
        except Exception as error:  # a peer that breaks is a result
            failures[name] = reason(error)
        _release(device)


def _release(device: torch.device) -> None:
    gc.collect()  # the trainer and its model point at each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def backbone_flop(model_shape: dict[str, Any]) -> float:
    """Operations of one token through the linear layers of the backbone; attention, head and adapter not counted."""
    hidden, head_dim = model_shape["hidden_size"], model_shape["hidden_size"] // model_shape["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head_dim * model_shape["num_key_value_heads"]
    return 2.0 * model_shape["num_hidden_layers"] * (attention + 3 * hidden * model_shape["intermediate_size"])


def matmul_tflops(dtype: torch.dtype, device: torch.device) -> float | None:
    """What this card reaches on one large square product, the fastest of ten; None on a CPU."""
    if device.type == "cpu":
        return None
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device)
    seconds = [clock.seconds(lambda: torch.mm(a, b)) for _ in range(12)][2:]
    return 2 * MATMUL_SIZE**3 / min(seconds) / 1e12


def facts_of(measured: Measured) -> dict[str, Any]:
    """What is written down of a contestant by itself."""
    timing = measured.timing
    row = {name: value for name, value in asdict(measured).items() if name not in ("timing", "gradient")}
    return row | {"seconds": timing.median, "p10": timing.quantile(0.1), "p90": timing.quantile(0.9)}


def summarize(measured: list[Measured], pairs: list[Pair], arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows, ratios to every baseline, and the verdicts against TRL; no ratios where ours could not be measured."""
    device = arguments.device
    flop = backbone_flop(SHAPES[arguments.shape][0])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)
    reached = matmul_tflops(SHAPES[arguments.shape][4], device)
    ours = next((m for m in measured if m.name == OURS), None)
    num_sequence_tokens = sum(map(len, sequences_of(pairs)[0]))
    rows = []
    for m in measured:
        tflops = flop * m.num_tokens * m.passes / m.timing.median / 1e12
        row = facts_of(m) | {"tflops": tflops, "mfu": tflops / sheet if sheet else None}
        row["share_of_matmul"] = tflops / reached if reached else None
        if ours is not None:
            row["gradient_difference"] = float((m.gradient - ours.gradient).norm() / ours.gradient.norm())
        if m.name in BASELINES and ours is not None:
            speedup, ratio = m.timing.median / ours.timing.median, m.num_tokens / ours.num_tokens
            row |= {"speedup": speedup, "token_ratio": ratio, "share_of_token_ratio": speedup / ratio}
            row |= {"sequence_token_ratio": num_sequence_tokens / ours.num_tokens}
            row["memory_ratio"] = ours.peak_bytes / m.peak_bytes
        rows.append(row)
    theirs = next((row for row in rows if row["name"] == "TRL"), None)
    bars = {}
    if device.type == "cuda" and theirs is not None and ours is not None:
        met = theirs["share_of_token_ratio"] >= MIN_SHARE
        bars[f"at least {MIN_SHARE} of the token ratio against TRL"] = "met" if met else "missed"
        bars[f"at most {MAX_MEMORY} of TRL's peak memory"] = "met" if theirs["memory_ratio"] <= MAX_MEMORY else "missed"
    return {
        "order": arguments.order, "num_pairs": len(pairs), "shape": arguments.shape, "rows": rows, "bars": bars,
        "num_sequence_tokens": num_sequence_tokens, "matmul_tflops": reached, "sheet_tflops": sheet,
    }  # fmt: skip


def show_results(results: dict[str, Any], checks: Sequence[Check], failures: dict[str, str]) -> None:
    """The table: tokens, seconds, ratios, memory, use of the card."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        [row["name"], text(row["batch_size"], "d"), f"{row['num_tokens']:,}", f"{row['seconds']:.3f}",
         f"{row['p10']:.3f} - {row['p90']:.3f}", text(row.get("token_ratio"), ".1f"), text(row.get("speedup"), ".1f"),
         text(row.get("share_of_token_ratio"), ".2f"), f"{row['peak_bytes'] / 2**30:.2f}",
         text(row.get("memory_ratio"), ".2f"), text(row["mfu"], ".1%"), text(row["share_of_matmul"], ".1%"),
         f"{row['loss']:.5f}", text(row.get("gradient_difference"), ".1e")]
        for row in results["rows"]
    ]  # fmt: skip
    columns = [
        "step",
        "batch",
        "tokens",
        "s",
        "p10 - p90",
        "token ratio",
        "speed-up",
        "share",
        "peak GiB",
        "ours / its",
    ]
    columns += ["MFU", "of matmul", "loss", "grad diff"]
    agreed = ", ".join(f"{check.name} {check.error:.1e}" for check in checks)
    judged = [f"{bar}: {verdict}" for bar, verdict in results["bars"].items()]
    judged = judged or ["Bars not judged: they are for a GPU, against TRL."]
    facts = (
        f"Before timing, {CHECKED_LAYERS} layers in float32: {agreed}. The sequences have "
        f"{results['num_sequence_tokens']:,} tokens without padding. MFU counts the backbone's linear layers, no "
        "recomputation; of matmul: against one large product on this card."
    )
    caption = [facts, *judged, *(f"{name}: {why}" for name, why in failures.items())]
    title = (
        f"{results['shape']}, order {results['order']}, {results['num_pairs']} pairs, online reference, checkpointing"
    )
    show(title, columns, lines, "\n".join(caption))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--order", choices=("pairs", "questions"), default="pairs")
    parser.add_argument("--num-pairs", type=int, help="default: 32 in order pairs, one tree in order questions")
    parser.add_argument("--baselines", default=",".join(BASELINES), help="whom to compare with, separated by commas")
    parser.add_argument("--max-seconds", type=float, default=400, help="no contestant is begun after this")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of a contestant")
    parser.add_argument("--no-record", action="store_true", help="show only")
    arguments = parser.parse_args(argv)
    arguments.baselines = arguments.baselines.split(",")
    if not set(arguments.baselines) <= BASELINES.keys():
        parser.error(f"--baselines: expected names out of {', '.join(BASELINES)}, got {','.join(arguments.baselines)}")
    if arguments.device.type == "cpu" and arguments.shape != "tiny":
        parser.error("a model of this shape needs a GPU; --shape tiny runs anywhere")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, record and show; 1 when ours is inexact or could not be measured."""
    arguments = parse(argv)
    deadline = time.monotonic() + arguments.max_seconds
    end_in_time()
    model_shape, trees, in_order_pairs, *_ = SHAPES[arguments.shape]
    per_tree = trees.num_levels * trees.num_rejected
    default = in_order_pairs if arguments.order == "pairs" else per_tree
    pairs = step_pairs(arguments.order, arguments.num_pairs or default, trees)
    command = " ".join(["python -m benchmarks.gpu_train_step", *(sys.argv[1:] if argv is None else argv)])
    try:
        checks, failures = check_exact(model_shape, pairs[:CHECKED_PAIRS], arguments.baselines, arguments.device)
        gate(checks)
    except InexactError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    _release(arguments.device)
    measured = []
    for contestant in run_all(pairs, arguments, failures, deadline):
        measured.append(contestant)
        if not arguments.no_record:
            record("gpu_train_step_contestants", command, checks, facts_of(contestant))
    results = summarize(measured, pairs, arguments)
    if not arguments.no_record:
        record("gpu_train_step", command, checks, results | {"failures": failures})
    show_results(results, checks, failures)
    return int(OURS in failures)


if __name__ == "__main__":
    sys.exit(main())
