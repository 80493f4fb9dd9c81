"""Short measurements for a GPU that is had for minutes: one probe a command, a line on disk for every figure as it comes.

    ceilings   a large copy, matrix products, and what a tensor core's truncated sums cost in exactness
    check      the self-check of one op in one shape, every error over its bound, whatever lies above
    tiles      tree attention with shipped and alternative tiles side by side; --compile runs each once, untimed
    graph      recording a decode step as a CUDA graph, and replaying it, at several numbers of rows
    head       the log-prob op with chunks and programs of several sizes side by side
    training   a few steps of `cpo-fast train` on a tiny model, DeepSpeed and its process group included

Figures are named as in `gpu_predictions`. On a CPU the kernels need TRITON_INTERPRET=1, and everything is tiny.

    python -m benchmarks.gpu_probes check --op linear_logprob --shape 7b
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import measure, reason
from benchmarks.harness import TimeUp, Timing, end_in_time, record

BENCHMARK = "gpu_probes"
COPY_NUMBERS, MATMUL_SIZE = 1 << 30, 8192  # float32 numbers of the copy: 4 GiB each way; side of the square product
PRODUCTS = (  # M, N, K of bf16 products that the head, a decode step and a training step consist of
    (256, 128256, 4096), (256, 4096, 128256), (1024, 128256, 4096), (1024, 4096, 128256), (1024, 32000, 4096),
    (256, 4096, 4096), (256, 11008, 4096), (256, 4096, 11008), (1701, 4096, 4096), (1701, 11008, 4096),
)  # fmt: skip
SUM_ROWS, SUM_COLUMNS = (13, 37, 199), 517  # the self-check's products
SHAPES = {  # of the models that are checked, 7b that of Llama-2-7B: dtype, heads, key heads, head size, hidden size
    "default": (torch.bfloat16, 8, 2, 128, 1024),
    "7b": (torch.bfloat16, 32, 32, 128, 4096),
    "tiny": (torch.float32, 2, 1, 16, 32),
}
TILE_CASES = ((32, 32, "trees"), (32, 32, "one tree"), (32, 32, "chain"), (32, 8, "one tree"))  # H, G, forest
GRAPH_ROWS = {"cuda": (16, 64, 256), "cpu": (4,)}
HEAD_CASES = {"cuda": (4096, (128256, 32000), (512, 2048)), "cpu": (64, (1000,), (64,))}  # E, V, T
CHUNK_BITS = {"cuda": (25, 26, 27), "cpu": (15, 16)}
PROGRAMS_AN_SM = (4, 16)
CHUNK_VARIABLE = "CPO_KERNELS_MAX_CHUNK_LOGITS"
RUNS, SECONDS_EACH = 12, 0.25


def note(arguments: argparse.Namespace, figures: dict[str, float], **facts: Any) -> None:
    """Put figures on disk and on the screen."""
    command = " ".join(["python -m benchmarks.gpu_probes", *arguments.command])
    record(BENCHMARK, command, [], {"probe": arguments.probe, "figures": figures, **facts})
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    sys.stdout.write(f"{shown or facts}\n")
    sys.stdout.flush()


def milliseconds(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float | str]:
    """Median milliseconds of each, interleaved, or why it could not run."""
    timings = measure(runs, device, RUNS, SECONDS_EACH)
    return {name: t.median * 1e3 if isinstance(t, Timing) else t for name, t in timings.items()}


def ceilings(arguments: argparse.Namespace) -> None:
    """What this card moves and multiplies at most, and how exact its sums are."""
    device, on_gpu = arguments.device, arguments.device.type == "cuda"
    source = torch.randn(COPY_NUMBERS if on_gpu else 1 << 20, device=device)
    target = torch.empty_like(source)
    copied = milliseconds({"copy": partial(target.copy_, source)}, device)["copy"]
    rate = {} if isinstance(copied, str) else {"copy TB/s": 8e-9 * source.numel() / copied}
    note(arguments, rate, num_bytes=8 * source.numel(), milliseconds=copied)
    del source, target
    size = MATMUL_SIZE if on_gpu else 64
    for m, n, k in ((size, size, size), *(PRODUCTS if on_gpu else ())):
        a, b = (torch.randn(count, k, device=device, dtype=torch.bfloat16) for count in (m, n))
        runs: dict[str, Callable[[], Any]] = {"bf16": lambda a=a, b=b: torch.mm(a, b.t())}
        if on_gpu:
            runs["fp32"] = lambda a=a, b=b: torch.mm(a, b.t(), out_dtype=torch.float32)
        name = "matmul" if m == size else f"matmul {m} x {n} x {k}"
        times = milliseconds(runs, device)
        rates = {f"{name}{'' if out == 'bf16' else ' to fp32'} TF/s": 2e-9 * m * n * k / ms
                 for out, ms in times.items() if not isinstance(ms, str)}  # fmt: skip
        note(arguments, rates, milliseconds=times, shape=[m, n, k])
    for hidden_size in (1024, 4096) if on_gpu else (64,):
        errors = {}
        for num_rows in SUM_ROWS:
            generator = torch.Generator().manual_seed(1)
            rows = torch.randn(num_rows, hidden_size, generator=generator)
            weight = torch.randn(SUM_COLUMNS, hidden_size, generator=generator) * hidden_size**-0.5
            h, w = (x.to(device, torch.bfloat16) for x in (rows, weight))
            product = torch.mm(h, w.t(), out_dtype=torch.float32) if on_gpu else h.float() @ w.float().t()
            exact = h.double() @ w.double().t()
            errors[f"mm error, E {hidden_size}, {num_rows} rows"] = float((product.double() - exact).abs().max())
        note(arguments, errors)


def check(arguments: argparse.Namespace) -> None:
    """Error over bound of every result of an op's kernels: above 1 the default implementation would be refused."""
    from cpo_kernels.kernel_check import ModelShape
    from cpo_kernels.linear_logprob import triton
    from cpo_kernels.linear_logprob.check import check_head, head_cases
    from cpo_kernels.self_check import CHECKS

    shape = ModelShape(*SHAPES[arguments.shape])
    for op in arguments.op.split(","):
        started, ratios = time.perf_counter(), {}
        if op == "linear_logprob":  # every head, also behind one that lies outside
            for case in head_cases():
                found = check_head(case, arguments.device, shape, triton)
                ratios |= {f"{name} ({case.name})": value for name, value in found.items()}
        else:
            ratios = CHECKS[op](arguments.device, shape)
        worst = max(ratios.values(), key=lambda value: float("inf") if value != value else value)
        above = {name: value for name, value in ratios.items() if not value <= 1}
        where = f"{op}, {arguments.shape}"
        figures = {f"{where}: worst ratio": worst, f"{where}: refused": float(bool(above))}
        facts = {"op": op, "shape": arguments.shape, "ratios": ratios, "above": above}
        note(arguments, figures, **facts, bound=1.0, seconds=time.perf_counter() - started)


def tiles(arguments: argparse.Namespace) -> None:
    """Forward and backward of every variant on the benchmark's forests, and how far its results are from the shipped."""
    from benchmarks.attention_tiles import SHIPPED, installed, variants
    from benchmarks.tree_attention import SETS, sequences
    from cpo_kernels import build_forest, tree_attention, tree_schedule
    from cpo_kernels.triton_tiles import tile_architecture

    device, on_gpu = arguments.device, arguments.device.type == "cuda"
    size = "gpu" if on_gpu else "tiny"
    head_dim = SETS[size][3][0][2]
    architecture = tile_architecture(device)
    chosen = [v for v in variants(architecture, head_dim) if arguments.compile in ("", v.name)]
    for heads, groups, forest_name in TILE_CASES if on_gpu else ((2, 1, "one tree"),):
        forest = build_forest(sequences(forest_name, size))
        counts = (heads, groups, groups, heads)
        q, k, v, upstream = (
            torch.randn(forest.num_tokens, count, head_dim, device=device).to(torch.bfloat16) for count in counts
        )
        flop = 4e-9 * head_dim * heads * float((forest.position_ids + 1).sum())  # 1e9 operations of a forward
        runs: dict[str, Callable[[], Any]] = {}
        results: dict[str, tuple[torch.Tensor, ...]] = {}
        failures: dict[str, str] = {}
        for variant in chosen:
            schedule = tree_schedule(forest.subtree_end, block_kv=variant.block_kv, heads=(heads, groups)).to(device)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]

            def attend(leaves: Any = leaves, schedule: Any = schedule) -> torch.Tensor:
                return tree_attention(*leaves, schedule.subtree_end, schedule=schedule, impl="triton")

            def forward(variant: Any = variant, attend: Any = attend) -> Any:
                with torch.no_grad(), installed(variant, architecture, head_dim):
                    return attend()

            def backward(out: Any, variant: Any = variant, leaves: Any = leaves, upstream: Any = upstream) -> Any:
                with installed(variant, architecture, head_dim):
                    return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

            try:
                with installed(variant, architecture, head_dim):
                    out = attend()
                results[variant.name] = (out.detach(), *backward(out))
            except Exception as error:  # a variant that does not compile is a result
                failures[variant.name] = reason(error)
                continue
            runs[f"{variant.name}|forward"] = forward
            runs[f"{variant.name}|backward"] = partial(backward, out)
        if arguments.compile:
            continue
        times = milliseconds(runs, device)
        where = forest_name + ("" if heads == groups else f", {heads}x{groups} heads")
        for name in results:
            differences = [
                float((a.float() - b.float()).norm() / b.float().norm())
                for a, b in zip(results[name], results.get(SHIPPED, results[name]), strict=True)
            ]
            took = {part: times[f"{name}|{part}"] for part in ("forward", "backward")}
            figures = {f"{where}: {name}: {part} ms": ms for part, ms in took.items() if not isinstance(ms, str)}
            rates = {part: factor * flop / ms for (part, ms), factor in zip(took.items(), (1, 2.5), strict=True)
                     if not isinstance(ms, str)}  # fmt: skip
            facts = {"heads": [heads, groups, head_dim], "num_rows": forest.num_tokens, "took": took}
            note(arguments, figures, **facts, tflops=rates, differs=max(differences))
        for name, why in failures.items():
            note(arguments, {}, variant=name, forest=where, failure=why)


def graph(arguments: argparse.Namespace) -> None:
    """A decode step of so many rows against reading weights and keys once; a step that cannot be recorded is named."""
    from benchmarks.search_model import SETS
    from benchmarks.search_ours import decode_roofline

    chosen = SETS["gpu" if arguments.device.type == "cuda" else "tiny"](arguments.device)
    for num_rows in GRAPH_ROWS[arguments.device.type]:
        started = time.perf_counter()
        try:
            found = decode_roofline(chosen.model, chosen.settings, chosen.shape, num_rows)
        except TimeUp:
            raise
        except Exception as error:  # the next size may work, and the sentence is the result
            note(arguments, {f"graph at {num_rows} rows failed": 1.0}, failure=reason(error))
            continue
        finally:  # an arena of 40 GiB, whose engine and searches point at each other
            gc.collect()
            if arguments.device.type == "cuda":
                torch.cuda.empty_cache()
        figures = {
            f"graph at {num_rows} rows failed": 0.0,
            f"decode step at {num_rows} rows ms": found["step_seconds"] * 1e3,
            f"decode step at {num_rows} rows, share of the roofline": found["share"],
        }
        note(arguments, figures, **found, seconds=time.perf_counter() - started)


def head(arguments: argparse.Namespace) -> None:
    """The full step of the log-prob op with chunks of 2^n logits and so many programs of partial sums an SM."""
    from benchmarks.logprob_case import make_case
    from benchmarks.logprob_peers import contestant
    from cpo_kernels.linear_logprob import triton_chunked

    device, on_gpu = arguments.device, arguments.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden_size, vocabularies, row_counts = HEAD_CASES[device.type]

    def sized(run: Callable[[], Any], bits: int, programs: int) -> Callable[[], Any]:
        def call() -> Any:
            kept = getattr(triton_chunked, "PROGRAMS_AN_SM", None)
            os.environ[CHUNK_VARIABLE], triton_chunked.PROGRAMS_AN_SM = str(1 << bits), programs
            try:
                return run()
            finally:
                del os.environ[CHUNK_VARIABLE]
                triton_chunked.PROGRAMS_AN_SM = kept

        return call

    for vocab in vocabularies:
        for num_rows in row_counts:
            case = make_case("flat", num_rows, hidden_size, vocab, dtype, device)
            ours = contestant(f"ours {'triton' if on_gpu else 'eager'}", case, "gathered")["step"]
            runs = {name: contestant(name, case, "gathered")["step"] for name in ("floor 3 GEMMs", "torch naive")}
            runs["shipped"] = ours
            for bits in CHUNK_BITS[device.type]:
                runs |= {f"2^{bits} logits, {n} programs an SM": sized(ours, bits, n) for n in PROGRAMS_AN_SM}
            times = milliseconds(runs, device)
            figures = {f"head {vocab}, {num_rows} rows: {name} ms": ms
                       for name, ms in times.items() if not isinstance(ms, str)}  # fmt: skip
            note(arguments, figures, milliseconds=times)


def training(arguments: argparse.Namespace) -> None:
    """Train a tiny adapter from files to files: what DeepSpeed, NCCL and one rank do together shows here first."""
    from benchmarks.step_contestants import TINY_LLAMA, random_model, three_word_tokenizer
    from benchmarks.workload import TINY, step_pairs
    from cpo_fast.config import validate_config
    from cpo_fast.train.loop import train

    failed = "training failed"
    with tempfile.TemporaryDirectory() as scratch:
        model, data = Path(scratch) / "model", Path(scratch) / "pairs.jsonl"
        dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
        random_model(TINY_LLAMA, 2, dtype, torch.device("cpu")).save_pretrained(model)
        three_word_tokenizer().save_pretrained(model)
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        pairs = [dict(zip(names, pair, strict=True)) for pair in step_pairs("questions", 8, TINY)]
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        values = {
            "run": str(Path(scratch) / "run"),
            "model": {"path": str(model), "device": "auto" if arguments.device.type == "cuda" else "cpu"},
            "data": {"path": str(data), "eos": "never"},
            "train": {"batch_pairs": 4, "num_epochs": 2},
        }
        try:
            done = train(validate_config(values))
        except TimeUp:
            raise
        except Exception as error:  # the sentence is the result
            note(arguments, {failed: 1.0}, failure=reason(error))
            return
        steps = [json.loads(line) for line in done.metrics_path.read_text(encoding="utf-8").splitlines()]
        note(arguments, {failed: 0.0, "training: steps": float(len(steps))}, steps=steps)


PROBES: dict[str, Callable[[argparse.Namespace], None]] = {
    "ceilings": ceilings, "check": check, "tiles": tiles, "graph": graph, "head": head, "training": training,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one probe; 1 when the time was up before its end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("probe", choices=sorted(PROBES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--op", default="linear_logprob", help="ops of check, with commas")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="default", help="of check")
    parser.add_argument("--compile", default="", help="of tiles: a variant's name; run it once on every forest")
    arguments = parser.parse_args(argv)
    arguments.command = sys.argv[1:] if argv is None else list(argv)
    end_in_time()
    try:
        PROBES[arguments.probe](arguments)
    except TimeUp as error:
        sys.stderr.write(f"{arguments.probe}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
