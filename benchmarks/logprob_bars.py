"""What the log-prob op must reach on a GPU, typed once, and the verdict on every line of it.

Times are for E 4096, V 128256, a full step, bf16: between 1.2 and 1.45 times what three matrix products need at the
card's dense bf16 rate. A bar that cannot be judged says why and counts as neither met nor missed.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "ours triton"
HEAD = (4096, 128256)
STEP_MS = {  # card -> rows -> milliseconds
    "H200": {512: 2.8, 2048: 10.5, 8192: 40.0},
    "A100": {512: 7.5, 2048: 29.0, 8192: 113.0},
}
MAX_LOGP_ERROR = 1e-5
MAX_GRAD_ERROR = 2.5e-3  # relative; bf16 gradients alone cost 1.7e-3
MAX_NAIVE_TIME, MAX_NAIVE_MEMORY, NAIVE_ROWS = 1.10, 1 / 8, 8192
# peer -> (least speed-up of a full step, most rows it is asked for, least V / E)
MIN_SPEEDUP = {
    "CCE exact": (1.5, None, 0),
    "verl": (1.5, None, 0),
    "Liger DPO": (3.0, 2048, 30),
    "Liger FLCE": (3.0, 2048, 30),
    "QuACK": (0.9, None, 0),  # where it runs: sm90 and later
}


@dataclass(frozen=True)
class Verdict:
    """One bar on one shape: `met`, `missed` or `not judged`, the last with a reason."""

    bar: str
    status: str
    measured: float | None
    limit: float
    why: str = ""


def judge(rows: Sequence[dict[str, Any]], head: tuple[int, int], num_rows: int, device_name: str) -> list[Verdict]:
    """Verdicts on one shape.

    Args:
        rows: results of the shape, as `benchmarks.linear_logprob` records them.
        head: (E, V).
        num_rows: T.
        device_name: the GPU's name.
    """
    found = {(r["contestant"], r["layout"], r["mode"], r["set"]): r for r in rows}

    def get(name: str, field: str, mode: str = "step") -> Any:
        row = found.get((name, "gathered", mode, "flat"))
        return None if row is None else row.get(field)

    def ratio(field: str, numerator: str, denominator: str) -> float | None:
        top, bottom = get(numerator, field), get(denominator, field)
        return None if top is None or not bottom else top / bottom

    def missing(name: str) -> str:
        failed = get(name, "failure")
        return f"{name}: {failed}" if failed else f"{name} is not among the contestants"

    verdicts = []
    card = next((card for card in STEP_MS if card in device_name), None)
    if head == HEAD and num_rows in STEP_MS["H200"]:
        name = f"step, ms on {card or device_name}"
        if card is None:
            verdicts.append(Verdict(name, "not judged", None, float("nan"), "no bar for this card"))
        else:
            seconds, limit = get(OURS, "seconds"), STEP_MS[card][num_rows]
            verdicts.append(
                _verdict(name, None if seconds is None else 1e3 * seconds, limit, operator.le, missing(OURS))
            )
    if num_rows == NAIVE_ROWS:
        time, memory = ratio("seconds", OURS, "torch naive"), ratio("peak_bytes", OURS, "torch naive")
        why = missing("torch naive") if get(OURS, "seconds") else missing(OURS)
        verdicts.append(_verdict("step time over torch naive", time, MAX_NAIVE_TIME, operator.le, why))
        verdicts.append(_verdict("peak memory over torch naive", memory, MAX_NAIVE_MEMORY, operator.le, why))
    for peer, (limit, most_rows, least_aspect) in MIN_SPEEDUP.items():
        if (most_rows is None or num_rows <= most_rows) and head[1] / head[0] >= least_aspect:
            speedup = ratio("seconds", peer, OURS)
            why = missing(peer) if get(OURS, "seconds") else missing(OURS)
            verdicts.append(_verdict(f"step, {peer} over ours", speedup, limit, operator.ge, why))
    for field, limit, what in (
        ("logp_error", MAX_LOGP_ERROR, "largest error of a log-prob"),
        ("grad_error", MAX_GRAD_ERROR, "relative error of the gradient"),
        ("confident_grad_error", MAX_GRAD_ERROR, "the same on confident tokens"),
    ):
        verdicts.append(_verdict(what, get(OURS, field, "policy"), limit, operator.le, missing(OURS)))
    return verdicts


def _verdict(
    bar: str, measured: float | None, limit: float, meets: Callable[[float, float], bool], why: str
) -> Verdict:
    if measured is None:
        return Verdict(bar, "not judged", None, limit, why)
    return Verdict(bar, "met" if meets(measured, limit) else "missed", measured, limit)
