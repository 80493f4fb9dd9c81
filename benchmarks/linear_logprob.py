"""LM head, log-softmax and gather: our op against every installed peer and against bare matrix products.

Frozen head; three modes (log-probs without gradient; policy forward and backward; the full step with a reference), two
layouts (the scored rows alone; all rows, unscored ones masked), and once a set in which a tenth of the rows has two to
eight targets. All contestants of all shapes are compared with float64 first, on ordinary and on confident tokens
(p > 0.9999); if ours is inexact nothing is timed or printed. A peer that is inexact is shown with its error, one that
cannot run with the reason. On a GPU the bars of `logprob_bars` are judged line by line.

    python -m benchmarks.linear_logprob [--set cpu|gpu|tiny] [--heads 4096x128256] [--rows 512,2048] [--only ours] ...
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.clock import MAX_RUNS, SECONDS_EACH, measure, peak_bytes, reason
from benchmarks.harness import Check, InexactError, Timing, gate, plot, record, results_folder, show
from benchmarks.logprob_bars import Verdict, judge
from benchmarks.logprob_case import LogprobCase, make_case
from benchmarks.logprob_peers import FLOORS, LAYOUTS, NAMES, OURS, Result, contestant

GPU_HEADS = ((576, 49152), (2048, 32000), (4096, 32000), (4096, 128256), (3584, 152064), (8192, 128256), (2304, 256000))
SETS = {  # heads (E, V), rows, dtype
    "gpu": (GPU_HEADS, (64, 256, 512, 2048, 8192, 32768), torch.bfloat16),
    "cpu": (((256, 8192),), (64, 256), torch.float32),  # a larger head makes torch's chunked path take minutes
    "tiny": (((64, 1000),), (64,), torch.float32),
}
MODES = ("forward", "policy", "step")
GEMMS = {"forward": 1, "policy": 2, "step": 3}  # products of T x V x E that a frozen head needs
MANY_ROWS = 2048  # rows of the set with many targets, or the largest below
CONFIDENT_ROWS = 512
# Ours must keep logits in float32 and leave the targets out of the expectation. What breaks either rule is far outside:
# logits rounded to bf16 move log-probs by 1e-2, a plain W[t] - E[W] moves confident gradients by half.
MAX_ERRORS = {  # log-prob relative to max(1, largest |logp|); gradients relative
    torch.float32: {"logp_error": 1e-5, "grad_error": 1e-4, "confident_grad_error": 1e-4},
    torch.bfloat16: {"logp_error": 1e-4, "grad_error": 2.5e-3, "confident_grad_error": 2.5e-3},
}

_ERRORS = ("mean_logp_error", "sum_error", "ref_logp_error", "grad_error", "confident_grad_error")  # of a step

Shape = tuple[int, int, int]  # E, V, T
Errors = dict[str, Any]


def run_once(case: LogprobCase, name: str, layout: str, mode: str) -> Result:
    """One run of a contestant."""
    return contestant(name, case, layout)[mode]()


def errors_of(case: LogprobCase, result: Result, per_row: bool) -> Errors:
    """Largest and mean log-prob error, largest error of a sequence's sum, gradient error; None for what is not given.

    The gradient error is relative to the gradient of all checked rows, or the largest of the single rows.
    """
    truth, found = case.truth, Errors()
    if result.logps is not None:
        error = result.logps.double()[truth.tokens] - truth.logps
        sums = error.new_zeros(int(truth.sequences.max()) + 1).index_add_(0, truth.sequences, error)
        found |= {"logp_error": float(error.abs().max()), "mean_logp_error": float(error.abs().mean())}
        found["sum_error"] = float(sums.abs().max())
    if result.grad is not None:
        difference = result.grad[truth.rows].double() - truth.grad_rows
        size = truth.grad_rows.norm(dim=1) if per_row else truth.grad_rows.norm()
        found["grad_error"] = float(((difference.norm(dim=1) if per_row else difference.norm()) / size).max())
    if result.ref_logps is not None:
        error = result.ref_logps.double()[truth.tokens] - truth.ref_logps
        found["ref_logp_error"] = float(error.abs().max())
    return found


def equal_twice(first: Result, second: Result) -> bool:
    """Whether two runs are bitwise equal."""
    pairs = ((first.logps, second.logps), (first.grad, second.grad), (first.ref_logps, second.ref_logps))
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def check_shape(
    case: LogprobCase, confident: LogprobCase | None, names: Sequence[str]
) -> dict[tuple[str, str], Errors]:
    """Errors of every contestant in every layout; a failure where it could not run."""
    found: dict[tuple[str, str], Errors] = {}
    for layout in LAYOUTS if case.one_target_a_row else LAYOUTS[:1]:
        for name in names:
            try:
                modes = contestant(name, case, layout)
                if not modes:
                    continue
                full = modes["step"]()
                errors = errors_of(case, full, per_row=False)
                if "forward" in modes and name not in FLOORS:  # without gradient other kernels run
                    errors["forward_logp_error"] = errors_of(case, modes["forward"](), per_row=False)["logp_error"]
                if name not in FLOORS:
                    errors["deterministic"] = equal_twice(full, modes["step"]())
                if confident is not None and layout == "gathered" and name not in FLOORS:
                    sure = errors_of(confident, run_once(confident, name, layout, "step"), per_row=True)
                    errors["confident_grad_error"] = sure.get("grad_error")
                found[name, layout] = errors
            except Exception as error:  # a peer that breaks is a result; ours is caught by the gate
                found[name, layout] = {"failure": reason(error)}
    return found


def our_checks(
    case: LogprobCase, shape: Shape, kind: str, found: dict[tuple[str, str], Errors], is_cuda: bool
) -> list[Check]:
    """The gate: ours in each layout. Triton on a CPU does not run, and is not asked to."""
    bounds = MAX_ERRORS[case.hidden.dtype]
    magnitude = max(1.0, float(case.truth.logps.abs().max()))
    checks = []
    for (name, layout), errors in found.items():
        if name not in OURS or (name == "ours triton" and not is_cuda and "failure" in errors):
            continue
        where = f"{name}, {layout}, {kind}, E {shape[0]} V {shape[1]} T {shape[2]}"
        if "failure" in errors:
            raise InexactError(f"nothing was measured: {where}: {errors['failure']}")
        keys = ["logp_error", "forward_logp_error", "ref_logp_error", "grad_error"]
        keys += ["confident_grad_error"] if "confident_grad_error" in errors else []
        for key in keys:
            of_logps = key.endswith("logp_error")
            bound = bounds["logp_error"] * magnitude if of_logps else bounds[key]
            checks.append(Check(f"{where}: {key}", errors.get(key, float("nan")), bound))
    return checks


def time_shape(
    case: LogprobCase, kind: str, found: dict[tuple[str, str], Errors], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of results for every contestant, layout and mode."""
    rows: list[dict[str, Any]] = []
    device, (num_rows, hidden_size) = case.hidden.device, case.hidden.shape
    for layout in LAYOUTS if kind == "flat" else LAYOUTS[:1]:
        able = [name for name, place in found if place == layout and "failure" not in found[name, place]]
        contestants = {name: contestant(name, case, layout) for name in able}
        rows += [
            {"contestant": name, "layout": layout, "mode": "step", "set": kind, "failure": errors["failure"]}
            for (name, place), errors in found.items()
            if place == layout and "failure" in errors
        ]
        for mode in MODES if kind == "flat" else ("step",):
            variants = {name: modes[mode] for name, modes in contestants.items() if mode in modes}
            timings = measure(variants, device, arguments.runs, arguments.seconds_each, arguments.deadline)
            for name, timing in timings.items():
                row: dict[str, Any] = {"contestant": name, "layout": layout, "mode": mode, "set": kind}
                if isinstance(timing, Timing):
                    flop = 2 * GEMMS[mode] * num_rows * hidden_size * case.weight.shape[0]
                    row |= {"seconds": timing.median, "p10": timing.quantile(0.1), "p90": timing.quantile(0.9)}
                    row |= {"num_runs": len(timing.seconds), "tflops": flop / timing.median / 1e12}
                    row["peak_bytes"] = peak_bytes(variants[name], device)
                else:
                    row["failure"] = timing
                row |= found[name, layout]
                if mode == "forward":
                    row = {k: v for k, v in row.items() if k not in _ERRORS} | {
                        "logp_error": row.get("forward_logp_error")
                    }
                rows.append(row)
    _add_ratios(rows)
    return rows


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Times naive (of the same layout) and times the floor of three products, in place."""
    seconds = {(r["contestant"], r["layout"], r["mode"]): r["seconds"] for r in rows if "seconds" in r}
    for row in rows:
        naive = seconds.get(("torch naive", row["layout"], row["mode"]))
        floor = seconds.get((FLOORS[0], "gathered", row["mode"]))
        if "seconds" in row:
            row["times_naive"] = row["seconds"] / naive if naive else None
            row["times_floor"] = row["seconds"] / floor if floor else None


def show_shape(shape: Shape, dtype: torch.dtype, rows: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> None:
    """The table of one shape and the verdicts below it."""

    def text(row: dict[str, Any], key: str, form: str, factor: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] * factor, form)

    lines, failed = [], {}
    for row in sorted(rows, key=lambda r: (r["set"], MODES.index(r["mode"]), r["layout"] != "gathered")):
        start = [row["contestant"], row["mode"], row["layout"] if row["set"] == "flat" else row["set"]]
        if "failure" in row:
            failed.setdefault(f"{row['contestant']}: {row['failure']}", []).append(f"{start[2]} {start[1]}")
            continue
        lines.append(
            start
            + [text(row, "seconds", ".3f", 1e3), f"{text(row, 'p10', '.3f', 1e3)} - {text(row, 'p90', '.3f', 1e3)}"]
            + [text(row, "times_naive", ".2f"), text(row, "times_floor", ".2f"), text(row, "tflops", ".2f")]
            + [text(row, "peak_bytes", ".1f", 2**-20)]
            + [text(row, key, ".1e") for key in ("logp_error", "mean_logp_error", "sum_error", "grad_error")]
            + [text(row, "confident_grad_error", ".1e")]
            + [{None: "-", True: "yes", False: "no"}[row.get("deterministic")]]
        )
    columns = ["contestant", "mode", "rows", "ms", "p10 - p90", "x naive", "x floor", "TF/s", "MiB", "logp err"]
    columns += ["mean", "sum err", "dH err", "confident", "same twice"]
    kept = "; ".join(
        f"{v.bar}: {v.status}"
        + (f" ({v.measured:.3g}, bar {v.limit:.3g})" if v.measured is not None else f" ({v.why})")
        for v in verdicts
    )
    title = f"E {shape[0]}, V {shape[1]}, {shape[2]} scored rows, {str(dtype).removeprefix('torch.')}"
    caption = "TF/s counts 1, 2 and 3 products. Errors against float64; dH relative, per row on confident tokens. "
    caption += f"Bars: {kept}." if kept else "Bars are for a GPU."
    show(title, columns, lines, "\n".join([caption, *(f"{why} ({', '.join(at)})" for why, at in failed.items())]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--set", choices=sorted(SETS), help="shapes; default by device")
    parser.add_argument("--heads", help="E x V of the set to keep or to add, such as 4096x128256,576x49152")
    parser.add_argument("--rows", help="scored rows, such as 512,2048")
    parser.add_argument("--only", help="contestants whose name contains one of these, separated by commas")
    parser.add_argument("--skip", help="contestants whose name contains this are left out")
    parser.add_argument("--runs", type=int, default=MAX_RUNS, help="timed runs of a variant, at most")
    parser.add_argument(
        "--seconds-each", type=float, default=SECONDS_EACH, help="seconds of a variant before it drops out"
    )
    parser.add_argument("--max-seconds", type=float, default=480, help="no further shape is started after this")
    parser.add_argument("--no-record", action="store_true", help="show only")
    arguments = parser.parse_args(argv)
    heads, rows, arguments.dtype = SETS[arguments.set or ("gpu" if arguments.device.type == "cuda" else "cpu")]
    if arguments.heads:
        heads = tuple(tuple(int(x) for x in head.split("x")) for head in arguments.heads.split(","))
    if arguments.rows:
        rows = tuple(int(x) for x in arguments.rows.split(","))
    arguments.shapes = [(hidden_size, vocab, t) for hidden_size, vocab in heads for t in rows]
    keep, drop = (arguments.only or "").split(","), arguments.skip
    # ours stays: without it nothing would be gated
    arguments.names = [n for n in NAMES if n in OURS or (any(k in n for k in keep) and not (drop and drop in n))]
    return arguments


def cases(shape: Shape, rows: Sequence[int], arguments: argparse.Namespace) -> Iterator[tuple[str, LogprobCase]]:
    """The sets that are timed at a shape, one at a time, so that one is in memory."""
    hidden_size, vocab, num_rows = shape
    many_at = max((t for t in rows if t <= MANY_ROWS), default=min(rows))
    for kind in ("flat", "many") if num_rows == many_at else ("flat",):
        yield kind, make_case(kind, num_rows, hidden_size, vocab, arguments.dtype, arguments.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Check all shapes, then time, record and show one by one; 1 when ours is inexact."""
    arguments = parse(argv)
    arguments.deadline = time.monotonic() + arguments.max_seconds
    rows = sorted({t for _, _, t in arguments.shapes})
    command = " ".join(["python -m benchmarks.linear_logprob", *(sys.argv[1:] if argv is None else argv)])
    is_cuda = arguments.device.type == "cuda"
    found, checks = {}, {}
    try:
        for shape in arguments.shapes:
            sure_rows = min(shape[2], CONFIDENT_ROWS)
            sure = make_case("confident", sure_rows, *shape[:2], arguments.dtype, arguments.device)
            checks[shape] = []
            for kind, case in cases(shape, rows, arguments):
                found[shape, kind] = check_shape(case, sure if kind == "flat" else None, arguments.names)
                checks[shape] += our_checks(case, shape, kind, found[shape, kind], is_cuda)
            gate(checks[shape])
    except InexactError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for shape in arguments.shapes:
        if time.monotonic() > arguments.deadline:
            sys.stderr.write(f"left out after {arguments.max_seconds:.0f} s: E {shape[0]} V {shape[1]} T {shape[2]}\n")
            continue
        results: list[dict[str, Any]] = []
        for kind, case in cases(shape, rows, arguments):
            results += time_shape(case, kind, found[shape, kind], arguments)
        verdicts = judge(results, shape[:2], shape[2], torch.cuda.get_device_name()) if is_cuda else []
        if not arguments.no_record:
            body = {"hidden_size": shape[0], "vocab_size": shape[1], "num_rows": shape[2]}
            body |= {"dtype": str(arguments.dtype), "rows": results, "bars": [asdict(v) for v in verdicts]}
            record("linear_logprob", command, checks[shape], body)
        show_shape(shape, arguments.dtype, results, verdicts)
        for row in results:
            if row["mode"] == "step" and row["layout"] == "gathered" and row["set"] == "flat" and "seconds" in row:
                panel = lines.setdefault(f"E {shape[0]}, V {shape[1]}", {})
                panel.setdefault(row["contestant"], []).append((shape[2], row["seconds"] * 1e3))
    if lines and not arguments.no_record:
        plot(results_folder() / "linear_logprob.png", "Full step, scored rows gathered", lines, "scored rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
