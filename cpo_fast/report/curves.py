"""`metrics.jsonl` as charts: what is drawn beside what, what a chart says in words, and how much of it is shown.

Every run is a curve with its own steps. A chart has some measures of every curve and, where a training says so, a limit and
marked steps. Its values stand in a table too, for those who do not see it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpo_fast.report.runs import Run, number

MAX_VALUES = 120_000  # of all charts' curves together, 1 MB as JSON
MAX_ROWS = 25  # of a table of values
MAX_OTHERS = 12  # measures that this version does not know, each a chart

_STEP_OF_CHAIN = re.compile(r"rewards/accuracies/step_(\d{1,6})")
# no measures of a model: drawn nowhere
_COUNTS = {
    "step",
    "epoch",
    "seconds",
    "micro_batches",
    "num_tokens",
    "pairs",
    "states",
    "completions",
    "tokens/computed",
}
_COUNTS |= {"tokens/rows", "eval_best_step", "eval_micro_batches", "eval_pairs", "eval_states", "eval_completions"}


@dataclass(frozen=True)
class Measure:
    """A line of a chart: its key in `metrics.jsonl` (or one of `DERIVED`) and what the legend calls it."""

    key: str
    label: str


@dataclass(frozen=True)
class Chart:
    """What one chart shows. `form` is `number`, `share` (shown in per cent) or `log` (a scale of powers of ten)."""

    key: str
    title: str
    text: str
    measures: tuple[Measure, ...]
    form: str = "number"
    unit: str = ""


def _measures(**labels: str) -> tuple[Measure, ...]:
    return tuple(Measure(key.replace("__", "/"), label) for key, label in labels.items())


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "What training minimises, over each step's rows. A falling loss alone does not say that answers get better.",
        _measures(loss="training", eval_loss="held out"),
    ),
    Chart(
        "dev",
        "Questions that are not trained on",
        "Share of dev questions that greedy chains answer as expected: with the reference answer (accuracy) or with the "
        "vote of a search (agreement); and of those whose answer contradicts what half of the chains or more said before "
        "training.",
        _measures(
            eval_accuracy="accuracy",
            eval_agreement="agreement",
            eval_answered="with an answer",
            eval_contradicted="contradicted",
        ),
        "share",
    ),
    Chart(
        "margins",
        "Reward margin",
        "Reward of the chosen response minus that of the rejected one, and both. A reward is β times the log-prob that the "
        "response has gained on the reference.",
        _measures(rewards__margins="margin", rewards__chosen="chosen", rewards__rejected="rejected"),
    ),
    Chart(
        "accuracies",
        "Pairs ranked right",
        "Share of pairs whose chosen response has the higher reward. Half is chance. Where no reward has moved yet, all "
        "pairs are ties, and nothing is drawn.",
        _measures(rewards__accuracies="training", eval_rewards__accuracies="held out"),
        "share",
    ),
    Chart(
        "steps",
        "Pairs ranked right, by step of the chain",
        "The same share for the pairs of each thought of the chain. A step has few pairs, so its lines are rough.",
        (),
        "share",
    ),
    Chart(
        "logps",
        "Log-probs of chosen and rejected",
        "Mean log-prob of a response's tokens. Both falling while the margin grows is what over-optimisation looks like.",
        _measures(logps__chosen_per_token="chosen", logps__rejected_per_token="rejected"),
        unit="nats per token",
    ),
    Chart(
        "drift",
        "Drift of the chosen responses",
        "What chosen responses have gained on the reference. The alarm rings where their lowest tenth falls below its "
        "limit while margins grow.",
        _measures(logps__chosen_drift="mean", logps__chosen_drift_p10="lowest tenth"),
        unit="nats per token",
    ),
    Chart(
        "grad_norm", "Gradient norm", "Over all trained weights, before clipping.", _measures(grad_norm="norm"), "log"
    ),
    Chart(
        "saved",
        "Tokens saved",
        "Share of the rows' tokens that were not computed again, because rows share a prefix.",
        _measures(tokens__saved="saved"),
        "share",
    ),
    Chart(
        "throughput",
        "Throughput",
        "Tokens of rows that a second of training covers, and those it really computed.",
        _measures(rows_per_second="of rows", computed_per_second="computed"),
        unit="tokens per second",
    ),
    Chart("learning_rate", "Learning rate", "As the schedule gives it.", _measures(learning_rate="rate")),
    Chart(
        "entropy",
        "Entropy",
        "Mean entropy of the next-token distribution over scored tokens.",
        _measures(entropy="entropy"),
        unit="nats",
    ),
    Chart(
        "top1",
        "Likeliest token",
        "Share of the chosen responses' tokens that the model finds likeliest.",
        _measures(mean_token_accuracy="training", eval_mean_token_accuracy="held out"),
        "share",
    ),
)

DERIVED = {"rows_per_second": "tokens/rows", "computed_per_second": "tokens/computed"}  # over `seconds`


@dataclass(frozen=True)
class Curve:
    """One training: its steps, ascending, and the values of every measure at them (None: not measured or no number).

    Attributes:
        name: of the run. num_steps: lines of the file that have a step, len(steps) of them are kept.
        limit: of the drift of the lowest tenth, below which the alarm may ring, None where there is none.
        alarm_step: the first step with the alarm, best_step: that of the kept adapter, None where there is none.
        notes: sentences on what is not drawn.
    """

    name: str
    steps: tuple[float, ...]
    values: dict[str, list[float | None]]
    num_steps: int
    limit: float | None
    alarm_step: float | None
    best_step: float | None
    notes: tuple[str, ...]


def curves(runs: Sequence[Run]) -> list[Curve]:
    """The trainings of all runs and of their rounds, sampled so that all together have at most `MAX_VALUES` values."""
    trained = [run for each in runs for run in each.all if run.metrics]
    num_measures = sum(len({key for line in run.metrics for key in line}) for run in trained)
    return [_curve(run, max(50, MAX_VALUES // max(1, num_measures))) for run in trained]


def _curve(run: Run, max_steps: int) -> Curve:
    lines = {number(line.get("step")): line for line in run.metrics}  # a step that was taken again replaces the first
    steps = sorted(step for step in lines if math.isfinite(step))
    notes = []
    if len(run.metrics) > len(steps):
        notes.append(f"{run.name}: {len(run.metrics) - len(steps)} lines of metrics.jsonl name no step of their own")
    kept = _sampled(steps, [step for step in steps if "eval_best_step" in lines[step]], max_steps)
    if len(kept) < len(steps):
        notes.append(f"{run.name}: {len(kept):,} of {len(steps):,} steps are shown; the rest is in metrics.jsonl")
    measures = sorted({key for step in steps for key, value in lines[step].items() if _is_measure(value)})
    values: dict[str, list[float | None]] = {}
    for key in measures:
        column = [math.nan if _is_tied(key, lines[step]) else number(lines[step].get(key)) for step in kept]
        num_bad = sum(key in lines[step] and not math.isfinite(number(lines[step][key])) for step in steps)
        if num_bad:
            notes.append(
                f"{run.name}: {key} is no finite number at {num_bad} of {len(steps)} steps, which leaves a gap"
            )
        values[key] = [float(f"{value:.6g}") if math.isfinite(value) else None for value in column]
    for key, tokens in DERIVED.items():
        if tokens in values and "seconds" in values:
            pairs = zip(values[tokens], values["seconds"], strict=True)
            values[key] = [float(f"{count / seconds:.4g}") if count and seconds else None for count, seconds in pairs]
    lows = [low for low in values.get("logps/chosen_drift_p10", ()) if low is not None]
    limit = number(run.config.get("train.alarm_nats"))
    best = [number(lines[step]["eval_best_step"]) for step in steps if "eval_best_step" in lines[step]]
    return Curve(
        name=run.name,
        steps=tuple(kept),
        values=values,
        num_steps=len(steps),
        limit=lows[0] - limit if lows and math.isfinite(limit) else None,
        alarm_step=next((step for step in steps if lines[step].get("alarm") is True), None),
        best_step=best[-1] if best and math.isfinite(best[-1]) else None,
        notes=tuple(notes),
    )


def _is_tied(key: str, line: dict[str, Any]) -> bool:
    """Whether a share of pairs ranked right says nothing, because no reward has moved yet."""
    before, name, _ = key.partition("rewards/accuracies")
    return bool(name) and number(line.get(key)) == number(line.get(f"{before}rewards/margins")) == 0


def _is_measure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sampled(steps: Sequence[float], always: Sequence[float], count: int) -> list[float]:
    """At most `count` of the steps: the first, the last, and, as far as there is room, those of `always`."""
    if len(steps) <= count:
        return list(steps)
    some = _spaced(always, count // 2)
    return sorted({*some, *_spaced(steps, count - len(some))})


def _spaced(values: Sequence[float], count: int) -> list[float]:
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


@dataclass(frozen=True)
class Figure:
    """A chart with what stands around it: a text for those who do not see it, and its values in tables, one a curve.

    Attributes:
        lines: (place of the curve, measure) of every line, in the order of the legend.
        words: what each line does. tables: (name of the curve, headings, rows, a note on rows left out).
    """

    chart: Chart
    lines: tuple[tuple[int, Measure], ...]
    words: tuple[str, ...]
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...], str], ...]


def figures(found: Sequence[Curve]) -> tuple[list[Figure], list[Figure]]:
    """The charts that have something to show, and those of measures that this version does not know."""
    known = [_figure(_with_steps_of_chain(chart, found), found) for chart in CHARTS]
    drawn = {measure.key for figure in known for _, measure in figure.lines} | _COUNTS
    keys = list(dict.fromkeys(key for curve in found for key in curve.values if key not in drawn))
    named = [Chart(f"other-{place}", key, "", (Measure(key, key),)) for place, key in enumerate(keys[:MAX_OTHERS])]
    others = [_figure(chart, found) for chart in named]
    return [figure for figure in known if figure.lines], [figure for figure in others if figure.lines]


def _with_steps_of_chain(chart: Chart, found: Sequence[Curve]) -> Chart:
    if chart.key != "steps":
        return chart
    numbers = sorted(
        {int(match[1]) for curve in found for key in curve.values if (match := _STEP_OF_CHAIN.fullmatch(key))}
    )
    measures = tuple(Measure(f"rewards/accuracies/step_{step}", f"step {step}") for step in numbers[:8])
    return Chart(chart.key, chart.title, chart.text, measures, chart.form, chart.unit)


def _figure(chart: Chart, found: Sequence[Curve]) -> Figure:
    lines = tuple(
        (place, measure)
        for place, curve in enumerate(found)
        for measure in chart.measures
        if any(value is not None for value in curve.values.get(measure.key, ()))
    )
    words = tuple(_words(found[place], measure, chart, len(found) > 1) for place, measure in lines)
    tables = []
    for place, curve in enumerate(found):
        measures = [measure for number_, measure in lines if number_ == place]
        if measures:
            tables.append(_table(curve, measures, chart))
    return Figure(chart, lines, words, tuple(tables))


def _words(curve: Curve, measure: Measure, chart: Chart, is_named: bool) -> str:
    points = [
        (step, value) for step, value in zip(curve.steps, curve.values[measure.key], strict=True) if value is not None
    ]
    (first, start), (last, end) = points[0], points[-1]
    low, high = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    name = f"{curve.name}, {measure.label}" if is_named else measure.label
    if len(points) == 1:
        return f"{name}: {cell(start, chart.form)} at step {first:g}"
    return (
        f"{name}: {cell(start, chart.form)} at step {first:g}, {cell(end, chart.form)} at step {last:g}; lowest "
        f"{cell(low[1], chart.form)} at step {low[0]:g}, highest {cell(high[1], chart.form)} at step {high[0]:g}"
    )


def _table(
    curve: Curve, measures: Sequence[Measure], chart: Chart
) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    columns = [curve.values[measure.key] for measure in measures]
    places = [place for place in range(len(curve.steps)) if any(column[place] is not None for column in columns)]
    shown = [int(place) for place in _spaced(places, MAX_ROWS)]
    rows = tuple(
        (f"{curve.steps[place]:g}", *(cell(column[place], chart.form) for column in columns)) for place in shown
    )
    note = (
        "" if len(shown) == len(places) else f"{len(shown)} of {len(places)} rows shown; the rest is in metrics.jsonl"
    )
    return curve.name, ("step", *(measure.label for measure in measures)), rows, note


def cell(value: float | None, form: str = "number") -> str:
    """A value as tables and sentences show it, "" for None."""
    if value is None:
        return ""
    if form == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def drawing(found: Sequence[Curve], shown: Sequence[Figure]) -> dict[str, Any]:
    """What `static/page.js` draws, as JSON values."""
    keys = {measure.key for figure in shown for _, measure in figure.lines}
    return {
        "curves": [
            {
                "name": curve.name,
                "steps": list(curve.steps),
                "values": {key: column for key, column in curve.values.items() if key in keys},
                "limit": curve.limit,
                "alarm": curve.alarm_step,
                "best": curve.best_step,
            }
            for curve in found
        ],
        "charts": {
            figure.chart.key: {
                "form": figure.chart.form,
                "lines": [[place, measure.key] for place, measure in figure.lines],
            }
            for figure in shown
        },
    }
