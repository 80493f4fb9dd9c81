"""Search: the arena engine against what others generate trees with, the same calls and the same lengths for all.

A CPU plays searches that were recorded with SmolLM2 on shipped word problems (k = 10, sampled verdicts), a GPU random
ones in the paper's shape on a Llama-2-7B shape. First, on a random sample of calls, ours must give the greedy tokens of
`generate`, the samples of the reference engine at the same uniforms, and the log-probs of a forward without a cache; in
bfloat16, log-probs that are as near to float32 as the stock model's. Otherwise nothing is timed or printed.

`sequential` and `batched` generate call by call; a random sample of their calls is timed, the same number in every
stratum (thoughts and verdicts, level by level), and the total is estimated: such rows say "sampled" and carry a 95 %
interval. Ours runs before, between and after the others. Time is that of everything: shared prompts, prefill, steps.

    python -m benchmarks.collect [--set cpu|gpu|tiny] [--contestants ours,batched] [--num-questions 3] ...
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.clock import reason
from benchmarks.harness import CLOCKS, InexactError, TimeUp, record, show, stratified_total
from benchmarks.search_model import SearchSet
from benchmarks.search_options import add_options, begin
from benchmarks.search_ours import OURS, Played, bandwidth, decode_roofline, play, variants
from benchmarks.search_peers import (
    continuous_batching,
    generate_call,
    seconds_of,
    single_calls,
    stock_copy,
    vllm,
)
from benchmarks.search_script import Call, Script

SEQUENTIAL, BATCHED, CONTINUOUS, VLLM, ROOFLINE = "sequential", "batched", "continuous batching", "vLLM", "roofline"
WHOLE = {CONTINUOUS: continuous_batching, VLLM: vllm}  # peers that play a whole script
BARS = {"cpu": {BATCHED: 8.0}, "cuda": {SEQUENTIAL: 100.0, BATCHED: 8.0}}  # times ours
MIN_ROOFLINE_SHARE = 0.5  # of memory bandwidth, on a GPU at 256 rows
Stratum = tuple[str, int]  # thoughts or verdicts, level


@dataclass(frozen=True)
class Row:
    """A contestant's line. Seconds are those of the whole script; low and high are a 95 % interval where sampled."""

    name: str
    seconds: float
    num_tokens: int
    low: float | None = None
    high: float | None = None
    note: str = ""
    played: Played | None = None


def strata(script: Script, single: bool) -> dict[Stratum, list[Call]]:
    """Calls by kind and level; `single`: one for each sample."""
    found: dict[Stratum, list[Call]] = {}
    for levels in script.questions:
        for depth, level in enumerate(levels):
            for kind in ("thoughts", "verdicts"):
                for call in getattr(level, kind):
                    found.setdefault((kind, depth), []).extend(single_calls(call) if single else [call])
    return found


def estimate(
    name: str, model: Any, script: Script, num_calls: int, generator: random.Random, clock: Callable[[], float]
) -> Row:
    """Time a random sample of calls of `sequential` or `batched`."""
    groups = strata(script, single=name == SEQUENTIAL)
    share = max(2, -(-num_calls // len(groups)))
    device = model.device
    seconds: dict[Stratum, list[float]] = {}
    for key, calls in groups.items():
        chosen = generator.sample(calls, min(share, len(calls)))
        generate_call(model, chosen[0])  # the first use of a shape is not timed
        seconds[key] = [seconds_of(lambda call=call: generate_call(model, call), device, clock) for call in chosen]
    known = sum(sum(values) for key, values in seconds.items() if len(values) == len(groups[key]))
    sampled = {key: values for key, values in seconds.items() if len(values) < len(groups[key])}
    if not sampled:
        return Row(name, known, script.num_tokens, note="every call")
    total = stratified_total(sampled, {key: len(groups[key]) for key in sampled})
    num_timed, num_all = sum(map(len, seconds.values())), sum(map(len, groups.values()))
    return Row(
        name, known + total.total, script.num_tokens, known + total.low, known + total.high,
        f"sampled, {num_timed} of {num_all} calls",
    )  # fmt: skip


def whole(name: str, model: Any, script: Script, max_tokens: int, clock: Callable[[], float]) -> Row:
    """Time an engine that takes requests; of a script beyond `max_tokens` only the first level of its questions."""
    part, note = script, ""
    if script.num_tokens > max_tokens:
        part = Script(script.shared, tuple(levels[:1] for levels in script.questions))
        note = f"{part.num_tokens} of {script.num_tokens} tokens, scaled"
    run, end = WHOLE[name](stock_copy(model), part)
    try:
        seconds = seconds_of(run, next(model.parameters()).device, clock)
    finally:
        end()
    return Row(name, seconds * script.num_tokens / part.num_tokens, script.num_tokens, note=note)


def measure(
    chosen: SearchSet, script: Script, arguments: argparse.Namespace, deadline: float
) -> tuple[list[Row], dict[str, str]]:
    """Every contestant that is asked for, ours between them; and why others could not run."""
    clock, generator = CLOCKS[arguments.clock], random.Random(arguments.seed)
    model, device = chosen.model, next(chosen.model.parameters()).device
    ours = variants(device.type == "cuda", chosen.num_candidates)
    runs: list[Played] = []
    rows: list[Row] = []
    failures: dict[str, str] = {}

    def run_ours() -> None:
        runs.append(play(model, script, chosen.settings, ours[OURS], clock))

    play(model, chosen.warm_up, chosen.settings, ours[OURS], clock)
    run_ours()
    for name in arguments.contestants:
        if name in (OURS, ROOFLINE):
            continue
        if time.monotonic() > deadline:
            failures[name] = "left out: the time was up"
            continue
        _release(device)  # an engine beside torch needs the memory that torch holds unused
        try:
            if name in ours:
                if device.type == "cuda":
                    play(model, chosen.warm_up, chosen.settings, ours[name], clock)
                played = play(model, script, chosen.settings, ours[name], clock)
                rows.append(Row(name, played.seconds, played.num_tokens, played=played))
            elif name in WHOLE:
                rows.append(whole(name, model, script, arguments.max_peer_tokens or chosen.max_peer_tokens, clock))
            else:
                num_calls = arguments.sample_calls or chosen.sample_calls[name == BATCHED]
                rows.append(estimate(name, stock_copy(model), script, num_calls, generator, clock))
        except TimeUp as error:
            failures[name] = str(error)
            deadline = 0.0
        except Exception as error:  # a peer that breaks is a result
            failures[name] = reason(error)
        _release(device)
        if time.monotonic() < deadline and len(runs) < arguments.repeats:
            run_ours()
    while time.monotonic() < deadline and len(runs) < arguments.repeats:
        run_ours()
    seconds = [played.seconds for played in runs]
    middle = sorted(runs, key=lambda played: played.seconds)[len(runs) // 2]
    spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
    note = f"median of {len(runs)}, spread {spread:.0%}"
    return [Row(OURS, statistics.median(seconds), middle.num_tokens, note=note, played=middle), *rows], failures


def _release(device: torch.device) -> None:
    gc.collect()  # an engine and its searches point at each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def judge(rows: Sequence[Row], roofline: dict[str, float] | None, device: str) -> dict[str, str]:
    """Each bar of this device that was measured: met or missed, with the figure."""
    ours = next(row for row in rows if row.name == OURS)
    verdicts = {}
    for name, factor in BARS[device].items():
        row = next((row for row in rows if row.name == name), None)
        if row is not None:
            ratio = row.seconds / ours.seconds
            verdicts[f"at least {factor:.0f}x over {name}"] = f"{'met' if ratio >= factor else 'missed'} ({ratio:.1f})"
    if roofline is not None and device == "cuda":
        share = roofline["share"]
        met = "met" if share >= MIN_ROOFLINE_SHARE else "missed"
        verdicts[f"half of the memory roofline at {roofline['num_rows']:.0f} rows"] = f"{met} ({share:.2f})"
    return verdicts


def show_rows(
    title: str, rows: Sequence[Row], num_questions: int, bytes_a_second: float, caption: Sequence[str]
) -> None:
    """The table."""
    ours = next(row for row in rows if row.name == OURS)
    lines = []
    for row in rows:
        interval = f"{row.low:.1f} - {row.high:.1f}" if row.low is not None else ""
        line = [
            row.name, f"{row.seconds:.1f}", interval, f"{row.seconds / ours.seconds:.1f}",
            f"{row.num_tokens / row.seconds:.0f}", f"{row.seconds / num_questions:.2f}",
        ]  # fmt: skip
        if row.played is None:
            line += [""] * 6
        else:
            played = row.played
            floor = (played.num_steps * played.weight_bytes + played.kv_bytes) / bytes_a_second
            line += [
                f"{played.num_prefilled:,}", f"{played.num_steps:,}", f"{played.mean_rows:.0f}",
                f"{played.occupancy:.0%}", f"{played.kv_bytes / 2**30:.1f}", f"{floor / played.seconds:.0%}",
            ]  # fmt: skip
        lines.append([*line, row.note])
    columns = ["contestant", "s", "95 %", "x ours", "tokens/s", "s/question", "prefilled", "steps", "rows a step"]
    columns += ["occupancy", "KV GiB", "of roofline", ""]
    show(title, columns, lines, "\n".join(caption))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, repeats=3)
    parser.add_argument("--contestants", help="names with commas; peers, features or all; default: all")
    parser.add_argument("--sample-calls", type=int, help="timed calls of sequential and of batched; default by set")
    parser.add_argument("--max-peer-tokens", type=int, help="scripts beyond are played in part by whole-script peers")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device.type == "cuda"
    arguments.set = arguments.set or ("gpu" if on_gpu else "cpu")
    peers, features = [SEQUENTIAL, BATCHED, CONTINUOUS, VLLM], list(variants(on_gpu, 1))
    groups = {"peers": peers, "features": features, "all": [*peers, *features, ROOFLINE]}
    wanted = (arguments.contestants or "all").split(",")
    arguments.contestants = list(dict.fromkeys(name for word in wanted for name in groups.get(word, [word])))
    unknown = [name for name in arguments.contestants if name not in groups["all"]]
    if unknown:
        parser.error(f"no contestant is called {unknown[0]!r}; choose from {', '.join([*groups, *groups['all']])}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, record and show; 1 when ours is inexact."""
    arguments = parse(argv)
    try:
        chosen, script, checks, deadline = begin(
            arguments, lambda chosen: chosen.script(arguments.num_questions or chosen.num_questions)
        )
    except InexactError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    rows, failures = measure(chosen, script, arguments, deadline)
    roofline = None
    if ROOFLINE in arguments.contestants:
        roofline = decode_roofline(chosen.model, chosen.settings, chosen.shape, chosen.roofline_rows)
    bytes_a_second = bandwidth(arguments.device)
    bars = judge(rows, roofline, arguments.device.type) if arguments.set != "tiny" else {}
    calls = script.calls()
    facts = {
        "set": arguments.set, "model": chosen.name, "num_questions": len(script.questions),
        "num_tokens": script.num_tokens, "num_prompt_tokens": script.num_prompt_tokens, "num_calls": len(calls),
        "num_samples": sum(len(call.lengths) for call in calls), "clock": arguments.clock,
        "bandwidth": bytes_a_second, "roofline": roofline,
    }  # fmt: skip
    if not arguments.no_record:
        command = " ".join(["python -m benchmarks.collect", *(sys.argv[1:] if argv is None else argv)])
        body = {**facts, "rows": [asdict(row) for row in rows], "bars": bars, "failures": failures}
        record("collect", command, checks, body)
    title = (
        f"{chosen.name}: {facts['num_questions']} questions, {len(calls)} calls, {facts['num_samples']} samples, "
        f"{script.num_tokens:,} tokens; {script.num_prompt_tokens:,} prompt tokens without sharing"
    )
    caption = [f"Before timing: {', '.join(f'{check.name} {check.error:.1e}' for check in checks)}."]
    if roofline is not None:
        caption.append(
            f"{roofline['num_rows']:.0f} rows: {roofline['step_seconds'] * 1e3:.1f} ms a step, "
            f"{roofline['share']:.0%} of what reading weights and keys once at {bytes_a_second / 1e9:.0f} GB/s takes."
        )
    caption += [f"{bar}: {verdict}" for bar, verdict in bars.items()]
    caption += [f"{name}: {why}" for name, why in failures.items()]
    show_rows(title, rows, len(script.questions), bytes_a_second, caption)
    return 0


if __name__ == "__main__":
    sys.exit(main())
