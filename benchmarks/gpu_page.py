"""The page of a quick GPU run: figures beside predictions and bars, what was not measured, how each step ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_predictions import PREDICTIONS, Prediction
from benchmarks.harness import table

FAR = 1.5  # times the nearer end of a prediction: beyond it a figure is a surprise that wants an explanation
FOLLOW_UP = ("flex", "head", "training")  # steps of the second command


@dataclass(frozen=True)
class Outcome:
    """How a step ended. `what` is "ok" or says otherwise; `tail` is the end of its output."""

    step: str
    what: str
    seconds: float = 0.0
    tail: tuple[str, ...] = ()


def figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures by their names in `gpu_predictions`, from records of the benchmarks; the latest of a name counts."""
    found: dict[str, float] = {}
    for line in lines:
        read = _READERS.get(line["benchmark"])
        if read is not None:
            found |= {name: value for name, value in read(line["results"]).items() if value is not None}
    return found


def _probe(results: Mapping[str, Any]) -> dict[str, Any]:
    return dict(results["figures"])


def _attention(results: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of FlexAttention; its backward is what forward and backward take beyond the forward."""
    seconds = {(r["contestant"], r["mode"]): r["seconds"] for r in results["rows"] if "seconds" in r}
    found = {}
    for name in {name for name, _ in seconds}:
        where, forward = f"{results['forest']}: {name}", seconds.get((name, "forward"))
        found[f"{where}: forward ms"] = None if forward is None else 1e3 * forward
        if forward is not None and (name, "both") in seconds:
            found[f"{where}: backward ms"] = 1e3 * (seconds[name, "both"] - forward)
    return found


def _collect(results: Mapping[str, Any]) -> dict[str, Any]:
    seconds = {row["name"]: row["seconds"] for row in results["rows"]}
    found = {f"collect: {name} over ours": s / seconds["ours"] for name, s in seconds.items() if name != "ours"}
    return found | {"collect: ours s": seconds["ours"]}


def _train(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = {row["name"]: row for row in results["rows"]}
    ours, theirs = rows.get("packed", {}), rows.get("TRL", {})
    return {
        "step: ours s": ours.get("seconds"),
        "step: TRL s": theirs.get("seconds"),
        "step: TRL over ours": theirs.get("speedup"),
        "step: share of the token ratio": theirs.get("share_of_token_ratio"),
        "step: MFU of ours": ours.get("mfu"),
        "step: peak memory over TRL's": theirs.get("memory_ratio"),
    }


def _train_part(results: Mapping[str, Any]) -> dict[str, Any]:
    """A contestant by itself, where the command did not come to its end."""
    name = {"packed": "ours", "TRL": "TRL"}.get(results["name"])
    return {} if name is None else {f"step: {name} s": results["seconds"]}


def _head(results: Mapping[str, Any]) -> dict[str, Any]:
    vocab, num_rows = results["vocab_size"], results["num_rows"]
    rows = {
        (r["contestant"], r["mode"]): r for r in results["rows"] if r["layout"] == "gathered" and r["set"] == "flat"
    }
    found: dict[str, Any] = {}
    for name, shown in (("ours triton", "ours"), ("floor 3 GEMMs", "floor"), ("torch naive", "naive")):
        seconds = rows.get((name, "step"), {}).get("seconds")
        found[f"head {vocab}, {num_rows} rows: {shown} ms"] = None if seconds is None else 1e3 * seconds
    found[f"head {vocab}: largest error of a log-prob"] = rows.get(("ours triton", "policy"), {}).get("logp_error")
    return found


_READERS = {
    "gpu_probes": _probe,
    "tree_attention": _attention,
    "collect": _collect,
    "gpu_train_step_contestants": _train_part,
    "gpu_train_step": _train,
    "linear_logprob": _head,
}


def page(outcomes: Sequence[Outcome], lines: Sequence[Mapping[str, Any]], more: bool) -> str:
    """Predicted figures, then the others, then checks, failures of contestants, and steps.

    Args:
        outcomes: of the steps that have ended.
        lines: records of this run, in the order written.
        more: whether this is the follow-up, which measures other predictions.
    """
    found = figures(lines)
    ended = {outcome.step: outcome for outcome in outcomes}
    predicted = [p for p in PREDICTIONS if (p.step in FOLLOW_UP) == more]
    rows = [_row(p, found.get(p.figure), ended.get(p.step)) for p in predicted]
    device = next((line["environment"]["device"] for line in lines if "environment" in line), "nothing measured")
    parts = [f"Measured on: {device}. Predicted for an H200, before anything had run on a GPU."]
    parts.append(table(["figure", "measured", "predicted", "after the change", "bar", "verdict"], rows))
    others = sorted(found.keys() - {p.figure for p in predicted})
    if others:
        parts += [
            "",
            "Further figures",
            table(["figure", "measured"], [[name, _number(found[name])] for name in others]),
        ]
    parts += ["", *_remarks(lines)]
    steps = [[o.step, o.what, f"{o.seconds:.0f}"] for o in outcomes]
    parts += ["", table(["step", "how it ended", "s"], steps)] if steps else []
    for outcome in outcomes:
        if outcome.what != "ok" and outcome.tail:
            parts += [
                "",
                f"{outcome.step}, {outcome.what}; its last lines:",
                *(f"  {line[:160]}" for line in outcome.tail),
            ]
    return "\n".join(parts) + "\n"


def _row(prediction: Prediction, measured: float | None, outcome: Outcome | None) -> list[str]:
    row = [prediction.figure, "-" if measured is None else _number(measured)]
    row.append(f"{prediction.shipped[0]:.0%} likely" if prediction.is_chance else _range(prediction.shipped))
    row.append("" if prediction.after is None else _range(prediction.after))
    row.append("" if prediction.bar is None else f"{prediction.bar[0]} {_number(prediction.bar[1])}")
    if measured is None:
        how = "its step did not run" if outcome is None else f"its step: {outcome.what}"
        return [*row, f"not measured; {how}"]
    verdicts = []
    if prediction.bar is not None:
        side, limit = prediction.bar
        verdicts.append("met" if (measured <= limit if side == "<=" else measured >= limit) else "MISSED")
    ends = (*prediction.shipped, *(prediction.after or ()))
    if not prediction.is_chance and not min(ends) / FAR <= measured <= max(ends) * FAR:
        verdicts.append("a surprise")
    return [*row, ", ".join(verdicts)]


def _remarks(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ratios above their bound, and every contestant or variant that could not run, by name."""
    remarks = []
    for line in lines:
        results = line["results"]
        if results.get("probe") == "check":
            above = ", ".join(f"{name} {value:.2f}" for name, value in results["above"].items())
            first = sorted(results["ratios"].items(), key=lambda item: item[1])[-3:]
            shown = above or "nothing above 1; nearest " + ", ".join(f"{name} {value:.2f}" for name, value in first)
            remarks.append(f"self-check {results['op']}, {results['shape']}: {shown}")
        if "failure" in results:
            named = results.get("variant", results.get("probe"))
            remarks.append(f"{named}: {results['failure']}")
        for name, why in (results.get("failures") or {}).items():
            remarks.append(f"{line['benchmark']}, {name}: {why}")
        failed = {
            row["contestant"]: row["failure"]
            for row in results.get("rows", ())
            if "contestant" in row and "failure" in row
        }
        remarks += [f"{line['benchmark']}, {name}: {why}" for name, why in failed.items()]
        for bar, status in _bars(results):
            remarks.append(f"{line['benchmark']}, {bar}: {status}")
        checks = line.get("checks") or ()
        if line["benchmark"] == "gpu_train_step" and checks:
            text = ", ".join(f"{check['name']} {check['error']:.1e} (bound {check['bound']:.0e})" for check in checks)
            remarks.append(f"gradient check of the step, float32: {text}")
    return remarks


def _bars(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    bars = results.get("bars") or {}
    if isinstance(bars, Mapping):
        return list(bars.items())
    return [(bar["bar"], bar["status"]) for bar in bars]


def _range(values: tuple[float, float]) -> str:
    low, high = values
    return _number(low) if low == high else f"{_number(low)} - {_number(high)}"


def _number(value: float) -> str:
    return format(value, ".3g") if abs(value) < 1000 else format(value, ".0f")
