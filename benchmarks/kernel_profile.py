"""Which kernels our share of a benchmark spends its time in: for a bar that was missed, or for one named op.

torch.profiler over a few runs, self time a kernel, one JSON line with the twenty longest.

    python -m benchmarks.kernel_profile                      # what the latest records of results/ say was missed
    python -m benchmarks.kernel_profile --op linear_logprob --head 4096x128256 --rows 2048
    python -m benchmarks.kernel_profile --op tree_attention --forest trees --head 32x8x128
    python -m benchmarks.kernel_profile --op train_step --order pairs
    python -m benchmarks.kernel_profile --op search --set gpu
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_train_step, linear_logprob, search_model, tree_attention
from benchmarks.attention_peers import build
from benchmarks.clock import quiet_profiler
from benchmarks.harness import record, results_folder, show
from benchmarks.logprob_case import make_case
from benchmarks.logprob_peers import contestant
from benchmarks.search_ours import OURS, play, variants
from benchmarks.step_contestants import packed, random_model
from benchmarks.workload import step_pairs
from cpo_kernels.integrations.transformers import split_pairs

NUM_RUNS = 3
NUM_SHOWN = 20


def profile_kernels(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Self seconds and calls a run of every kernel (on a CPU: every operator), longest first, after one warm run."""
    quiet_profiler()
    run()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(NUM_RUNS):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        launches = on_gpu and event.device_type == torch.autograd.DeviceType.CPU
        if launches or event.is_user_annotation:
            continue  # an operator that launches kernels and a named range carry their kernels' time again
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key, "seconds": microseconds / 1e6 / NUM_RUNS, "calls": event.count / NUM_RUNS})
    total = sum(row["seconds"] for row in rows)
    rows = sorted(rows, key=lambda row: -row["seconds"])[:NUM_SHOWN]
    return [row | {"share": row["seconds"] / total if total else 0.0} for row in rows]


def our_name(device: torch.device) -> str:
    """Ours as it runs on a device."""
    return "ours triton" if device.type == "cuda" else "ours eager"


def target(arguments: argparse.Namespace) -> Callable[[], Any]:
    """What is profiled, inputs made."""
    device, size = arguments.device, "gpu" if arguments.device.type == "cuda" else "cpu"
    if arguments.op == "linear_logprob":
        hidden_size, vocab = (int(x) for x in arguments.head.split("x"))
        case = make_case("flat", arguments.rows, hidden_size, vocab, linear_logprob.SETS[size][2], device)
        return contestant(our_name(device), case, "gathered")["step"]
    if arguments.op == "tree_attention":
        num_heads, num_kv_heads, head_dim = (int(x) for x in arguments.head.split("x"))
        dtype = tree_attention.SETS[size][-1]
        case = tree_attention.make_case(arguments.forest, size, (num_heads, num_kv_heads, head_dim), dtype, device)
        return build(our_name(device), case).both
    if arguments.op == "search":
        chosen = search_model.SETS[arguments.set](device)
        ours = variants(device.type == "cuda", chosen.num_candidates)[OURS]
        return lambda: play(chosen.model, chosen.warm_up, chosen.settings, ours)
    model_shape, trees, in_order_pairs, max_tokens, dtype = gpu_train_step.SHAPES[arguments.shape]
    num_pairs = in_order_pairs if arguments.order == "pairs" else trees.num_levels * trees.num_rejected
    pairs = step_pairs(arguments.order, num_pairs, trees)
    model = packed(random_model(model_shape, model_shape["num_hidden_layers"], dtype, device), True)
    batches = [[pairs[index] for index in part] for part in split_pairs(pairs, max_tokens)]
    return lambda: model.step(batches)


def missed() -> list[list[str]]:
    """Command lines for the shapes whose latest record has a missed bar."""
    wanted: dict[str, list[str]] = {}
    for line in _lines("linear_logprob"):
        shape = f"{line['hidden_size']}x{line['vocab_size']}"
        call = ["--op", "linear_logprob", "--head", shape, "--rows", str(line["num_rows"])]
        _note(wanted, call, any(bar["status"] == "missed" for bar in line["bars"]))
    for line in _lines("gpu_train_step"):
        call = ["--op", "train_step", "--order", line["order"], "--shape", line["shape"]]
        _note(wanted, call, "missed" in line["bars"].values())
    for line in _lines("collect"):
        is_missed = any(verdict.startswith("missed") for verdict in line["bars"].values())
        _note(wanted, ["--op", "search", "--set", line["set"]], is_missed)
    return list(wanted.values())


def _lines(benchmark: str) -> list[dict[str, Any]]:
    path = results_folder() / f"{benchmark}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line)["results"] for line in text.splitlines()]


def _note(wanted: dict[str, list[str]], call: list[str], is_missed: bool) -> None:
    wanted.pop(" ".join(call), None)  # a later record replaces an earlier one
    if is_missed:
        wanted[" ".join(call)] = call


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--op", choices=("linear_logprob", "tree_attention", "train_step", "search"))
    parser.add_argument("--head", default="4096x128256", help="E x V, or query heads x key heads x head size")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--forest", choices=tree_attention.FORESTS, default="trees")
    parser.add_argument("--order", choices=("pairs", "questions"), default="pairs")
    parser.add_argument("--shape", choices=sorted(gpu_train_step.SHAPES), default="llama-2-7b")
    parser.add_argument("--set", choices=sorted(search_model.SETS), default="gpu", help="of searches")
    parser.add_argument("--no-record", action="store_true", help="show only")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Profile one op, or all that missed a bar; always 0, since a profile passes no judgement."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    calls = [given] if arguments.op else [given + call for call in missed()]
    if not calls:
        sys.stdout.write("no record in benchmarks/results has a missed bar\n")
    for call in calls:
        one = parse(call)
        rows = profile_kernels(target(one), one.device)
        if not one.no_record:
            command = " ".join(["python -m benchmarks.kernel_profile", *call])
            record("kernel_profile", command, [], {"device": str(one.device), "kernels": rows})
        lines = [
            [row["kernel"][:100], f"{row['seconds'] * 1e3:.3f}", f"{row['share']:.1%}", f"{row['calls']:.0f}"]
            for row in rows
        ]
        show(" ".join(call), ["kernel", "ms a run", "share", "calls"], lines, f"Self time, mean of {NUM_RUNS} runs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
