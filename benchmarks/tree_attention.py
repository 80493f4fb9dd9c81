"""Tree attention, forward and backward: our op against FlexAttention, a dense mask, and the sequences unshared.

Forests as training makes them: eight 27-pair trees under one few-shot prompt, one such tree, 32 pairs of 32 trees,
sequences that share at random, and one long chain, where a tree mask has nothing to offer. Every contestant is first
compared with float64 on the first and the last group of heads (heads do not mix); if ours is inexact nothing is timed or
printed. Schedules and masks are made beforehand, and their making is timed apart.

    python -m benchmarks.tree_attention [--set cpu|gpu|tiny] [--forests trees,chain] [--heads 32x32x128] [--only ours]
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.attention_peers import NAMES, OURS, AttentionCase, Contestant, build
from benchmarks.clock import MAX_RUNS, SECONDS_EACH, measure, peak_bytes, reason
from benchmarks.harness import Check, InexactError, Timing, gate, plot, record, results_folder, show
from benchmarks.workload import TINY, TreeShape, sequences_of, step_pairs
from cpo_kernels import build_forest
from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_attention.reference import visible

NUM_TREES = 8
SMALL = TreeShape(few_shot=120, question=20, num_levels=2, num_rejected=5, thought=20)
SETS = {  # tree shape, pairs of 32 trees, chain tokens, heads (H, G, D), dtype
    "gpu": (TreeShape(), 32, 8192, ((32, 32, 128), (32, 8, 128)), torch.bfloat16),
    "cpu": (SMALL, 8, 512, ((4, 2, 64),), torch.float32),
    "tiny": (TINY, 4, 48, ((2, 1, 16),), torch.float32),
}
FORESTS = ("trees", "one tree", "pairs", "random", "chain")
RESULT_NAMES = ("out", "dq", "dk", "dv")
MODES = ("forward", "both")
Errors = dict[str, Any]


def sequences(name: str, size: str) -> list[list[int]]:
    """Token ids of a forest's sequences."""
    shape, num_pairs, chain, _, _ = SETS[size]
    per_tree = shape.num_levels * shape.num_rejected
    if name == "trees":
        return sequences_of(step_pairs("questions", NUM_TREES * per_tree, shape))[0]
    if name == "one tree":
        return sequences_of(step_pairs("questions", per_tree, shape))[0]
    if name == "pairs":
        return sequences_of(step_pairs("pairs", num_pairs, shape))[0]
    generator = random.Random(0)
    if name == "random":  # prefixes of any length of what is there, continued by anything
        found = [[generator.randrange(shape.vocab_size) for _ in range(chain // 8)]]
        while len(found) < 24:
            base = generator.choice(found)
            new = [generator.randrange(shape.vocab_size) for _ in range(generator.randint(1, chain // 16))]
            found.append(base[: generator.randint(1, len(base))] + new)
        return found
    if name == "chain":
        return [[generator.randrange(shape.vocab_size) for _ in range(chain)]]
    raise ValueError(f"forest: expected one of {', '.join(FORESTS)}, got {name!r}")


def make_case(
    name: str, size: str, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> AttentionCase:
    """A forest and random q, k, v and upstream gradient, on the device."""
    forest = build_forest(sequences(name, size)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    tensors = [
        torch.randn(forest.num_tokens, count, head_dim, generator=generator, device=device).to(dtype)
        for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    return AttentionCase(forest, *tensors)


def group_results(case: AttentionCase, group: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, dq, dk, dv of one key head and its query heads by a written-out softmax, every step in `dtype`."""
    size = case.q.shape[1] // case.k.shape[1]
    wide, narrow = slice(group * size, (group + 1) * size), slice(group, group + 1)
    parts = [case.q[:, wide], case.k[:, narrow], case.v[:, narrow]]
    leaves = [part.to(dtype).requires_grad_() for part in parts]
    q, k, v = (leaf.transpose(0, 1) for leaf in leaves)
    scores = (q @ k.transpose(1, 2)) * case.q.shape[2] ** -0.5
    weights = scores.masked_fill(~visible(case.forest.subtree_end), float("-inf")).softmax(dim=-1)
    out = (weights @ v).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.upstream[:, wide].to(dtype))]


def check_case(
    case: AttentionCase, names: Sequence[str], where: str
) -> tuple[dict[str, Contestant], dict[str, Errors], list[Check]]:
    """Contestants that run, errors of all, and the checks of ours."""
    groups = sorted({0, case.k.shape[1] - 1})
    exact = [group_results(case, group, torch.float64) for group in groups]
    eager = [group_results(case, group, case.q.dtype) for group in groups]
    bounds, sizes = [], []
    for index in range(len(RESULT_NAMES)):
        own = max(float((e[index].double() - x[index]).abs().max()) for e, x in zip(eager, exact, strict=True))
        sizes.append(max(float(x[index].abs().max()) for x in exact))
        bounds.append(kernel_bound(own, case.q.dtype, sizes[-1]))
    del eager
    contestants, found, checks = {}, {}, []
    for name in names:
        try:
            start = time.perf_counter()
            contestant = build(name, case)
            if case.q.is_cuda:
                torch.cuda.synchronize()
            errors: Errors = {"setup_seconds": time.perf_counter() - start}
            errors["forward_error"] = _largest(contestant, 0, contestant.forward(), exact, groups)
        except Exception as error:  # a peer that breaks is a result; ours is caught below
            found[name] = {"failure": reason(error)}
            continue
        contestants[name] = contestant
        try:
            first, second = contestant.both(), contestant.both()
            for index, part in enumerate(RESULT_NAMES):
                errors[f"{part}_error"] = _largest(contestant, index, first[index], exact, groups)
            errors["deterministic"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        except Exception as error:
            errors["backward_failure"] = reason(error)
        found[name] = errors
    for name in [name for name in OURS if name in found]:
        errors = found[name]
        if name == "ours triton" and not case.q.is_cuda and "failure" in errors:
            continue
        if "failure" in errors or "backward_failure" in errors:
            failure = errors.get("failure", errors.get("backward_failure"))
            raise InexactError(f"nothing was measured: {name}, {where}: {failure}")
        checks.append(Check(f"{name}, {where}: forward", errors["forward_error"], bounds[0]))
        checks += [
            Check(f"{name}, {where}: {part}", errors[f"{part}_error"], bound)
            for part, bound in zip(RESULT_NAMES, bounds, strict=True)
        ]
    return contestants, found, checks


def _largest(
    contestant: Contestant, index: int, values: torch.Tensor, exact: list[list[torch.Tensor]], groups: list[int]
) -> float:
    """Largest absolute error of a result over the checked heads; copies of a row add up in gradients only."""
    packed = contestant.packed(values, index > 0)
    worst = 0.0
    for group, truth in zip(groups, exact, strict=True):
        width = truth[index].shape[1]
        ours = packed[:, group * width : (group + 1) * width]
        error = float((ours.double() - truth[index]).abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def time_case(
    case: AttentionCase, contestants: dict[str, Contestant], found: dict[str, Errors], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of results for every contestant and mode."""
    device, (_, num_heads, head_dim) = case.q.device, case.q.shape
    scores = float((case.forest.position_ids + 1).sum())  # visible (row, key) pairs of one head
    rows: list[dict[str, Any]] = [{"contestant": n, **e} for n, e in found.items() if "failure" in e]
    for mode in MODES:
        variants = {
            name: getattr(contestant, mode)
            for name, contestant in contestants.items()
            if mode == "forward" or "backward_failure" not in found[name]
        }
        for name, timing in measure(
            variants, device, arguments.runs, arguments.seconds_each, arguments.deadline
        ).items():
            row: dict[str, Any] = {"contestant": name, "mode": mode, **found[name]}
            if isinstance(timing, Timing):
                # two products of 2 D operations a score forward, five more backward
                flop = 2 * head_dim * num_heads * scores * (2 if mode == "forward" else 7)
                row |= {"seconds": timing.median, "p10": timing.quantile(0.1), "p90": timing.quantile(0.9)}
                row |= {"num_runs": len(timing.seconds), "tflops": flop / timing.median / 1e12}
                row["peak_bytes"] = peak_bytes(variants[name], device)
            else:
                row["failure"] = timing
            rows.append(row)
    return rows


def show_case(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of one forest, what could not run below it."""

    def text(row: dict[str, Any], key: str, form: str, factor: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] * factor, form)

    ours = {
        r["mode"]: r["seconds"] for name in reversed(OURS) for r in rows if r["contestant"] == name and "seconds" in r
    }
    lines, failed = [], []
    for row in rows:
        if "failure" in row:
            failed.append(f"{row['contestant']}: {row['failure']}")
            continue
        if "backward_failure" in row:
            failed.append(f"{row['contestant']}, backward: {row['backward_failure']}")
        forward = row["mode"] == "forward"
        errors = ("forward_error", None, None, None) if forward else tuple(f"{part}_error" for part in RESULT_NAMES)
        lines.append(
            [row["contestant"], "forward" if forward else "forward + backward", text(row, "seconds", ".3f", 1e3)]
            + [f"{text(row, 'p10', '.3f', 1e3)} - {text(row, 'p90', '.3f', 1e3)}"]
            + [f"{row['seconds'] / ours[row['mode']]:.2f}" if row["mode"] in ours else "-"]
            + [
                text(row, "tflops", ".2f"),
                text(row, "peak_bytes", ".1f", 2**-20),
                text(row, "setup_seconds", ".1f", 1e3),
            ]
            + [text(row, key, ".1e") if key else "" for key in errors]
            + [{None: "-", True: "yes", False: "no"}[row.get("deterministic")]]
        )
    columns = ["contestant", "mode", "ms", "p10 - p90", "x ours", "TF/s", "MiB", "setup ms"]
    columns += [f"{part} err" for part in RESULT_NAMES] + ["same twice"]
    caption = "TF/s counts visible scores only. Errors: largest against float64 on the first and last group of heads."
    show(title, columns, lines, "\n".join([caption, *failed]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--set", choices=sorted(SETS), help="sizes; default by device")
    parser.add_argument("--forests", default=",".join(FORESTS), help="which, separated by commas")
    parser.add_argument("--heads", help="query heads x key heads x head size, such as 32x8x128")
    parser.add_argument("--only", default="", help="contestants whose name contains this, and ours")
    parser.add_argument("--runs", type=int, default=MAX_RUNS, help="timed runs of a variant, at most")
    parser.add_argument("--seconds-each", type=float, default=SECONDS_EACH, help="after this a variant drops out")
    parser.add_argument("--max-seconds", type=float, default=480, help="no further forest is started after this")
    parser.add_argument("--no-record", action="store_true", help="show only")
    arguments = parser.parse_args(argv)
    arguments.set = arguments.set or ("gpu" if arguments.device.type == "cuda" else "cpu")
    *_, arguments.shapes, arguments.dtype = SETS[arguments.set]
    if arguments.heads:
        arguments.shapes = tuple(tuple(int(x) for x in item.split("x")) for item in arguments.heads.split(","))
    arguments.names = [name for name in NAMES if name in OURS or arguments.only in name]
    arguments.forests = arguments.forests.split(",")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check all forests, then time, record and show one by one; 1 when ours is inexact."""
    arguments = parse(argv)
    arguments.deadline = time.monotonic() + arguments.max_seconds
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    command = " ".join(["python -m benchmarks.tree_attention", *(sys.argv[1:] if argv is None else argv)])
    settings = [(name, heads) for heads in arguments.shapes for name in arguments.forests]
    checks: dict[Any, list[Check]] = {}
    for name, heads in settings:
        case = make_case(name, arguments.set, heads, arguments.dtype, arguments.device)
        try:
            checks[name, heads] = check_case(case, OURS, f"{name}, heads {heads}")[2]
            gate(checks[name, heads])
        except InexactError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    for name, heads in settings:
        if time.monotonic() > arguments.deadline:
            sys.stderr.write(f"left out after {arguments.max_seconds:.0f} s: {name}, heads {heads}\n")
            continue
        case = make_case(name, arguments.set, heads, arguments.dtype, arguments.device)
        contestants, found, _ = check_case(case, arguments.names, f"{name}, heads {heads}")
        rows = time_case(case, contestants, found, arguments)
        facts = {"forest": name, "heads": heads, "dtype": str(arguments.dtype), "num_rows": case.forest.num_tokens}
        facts["num_sequence_tokens"] = int(case.forest.path_offsets[-1])
        if not arguments.no_record:
            record("tree_attention", command, checks[name, heads], facts | {"rows": rows})
        show_case(
            f"{name}: {facts['num_rows']:,} rows for {facts['num_sequence_tokens']:,} tokens of sequences; "
            f"H {heads[0]}, G {heads[1]}, D {heads[2]}, {str(arguments.dtype).removeprefix('torch.')}",
            rows,
        )
        panel = lines.setdefault(f"H {heads[0]}, G {heads[1]}, D {heads[2]}", {})
        for row in [row for row in rows if row.get("mode") == "both" and "seconds" in row]:
            panel.setdefault(row["contestant"], []).append((facts["num_sequence_tokens"], row["seconds"] * 1e3))
    if lines and not arguments.no_record:
        plot(results_folder() / "tree_attention.png", "Forward and backward", lines, "tokens of the sequences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
