"""What README.md says that was measured, and where each figure comes from; `benchmarks/numbers.py` checks it.

Passages are the document's own words with a placeholder for every figure. `EXEMPT` has the figures that are settings,
bounds or versions and not measurements.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.claim import Claim, Figure, Logged, Recorded, exactly, here, ratio

Record = Mapping[str, Any]

STEP = "python -m benchmarks.train_step --threads 2"
STEP_CPU = "python -m benchmarks.train_step --threads 1 --clock cpu"
SEARCH = "python -m benchmarks.collect --threads 2 --max-seconds 900"
DEMO = "python -m benchmarks.demonstration"
END_TO_END = "python -m benchmarks.end_to_end --clock cpu"
OF_REASONER, OF_SMOLLM2 = ({"results.clock": "cpu", "results.set": name} for name in ("reasoner", "smollm2"))
METHOD = "python -m benchmarks.method"
EXACT = "python -m pytest tests/integrations"


def step(*figures: Callable[[Record], Figure], clock: str = "wall") -> Recorded:
    """Figures of the results of one optimizer step."""
    where = {"results.clock": clock}
    return Recorded("train_step", lambda record: [figure(record["results"]) for figure in figures], where)


def times(baseline: str) -> Callable[[Record], Figure]:
    """Seconds of a baseline over those of the packed step."""
    return lambda results: ratio(results["baselines"][baseline]["ratio_to_packed"])


def interval(baseline: str, key: str = "ratio_interval") -> list[Callable[[Record], Figure]]:
    """Both ends, of a ratio or of seconds."""
    return [lambda results, end=end: here(results["baselines"][baseline][key][end]) for end in (0, 1)]  # type: ignore[misc]


def seconds(baseline: str) -> Callable[[Record], Figure]:
    """Seconds of a baseline."""
    return lambda results: here(results["baselines"][baseline]["total_seconds"])


def count(name: str) -> Callable[[Record], Figure]:
    """A number of tokens."""
    return lambda results: exactly(results[name])


def search_row(name: str, *, sampled: bool = False) -> Recorded:
    """A contestant's seconds, with their interval where they were sampled, and its seconds over ours."""

    def figures(record: Record) -> Sequence[Figure]:
        rows = {row["name"]: row for row in record["results"]["rows"]}
        row, ours = rows[name], rows["ours"]["seconds"]
        ends = [here(row["low"]), here(row["high"])] if sampled else []
        return [here(row["seconds"]), *ends, ratio(row["seconds"] / ours)]

    return Recorded("collect", figures)


def demonstration(figures: Callable[[Record], Sequence[Figure]]) -> Recorded:
    """Figures of the whole demonstration with its own seed."""
    where = {"results.seed": 0, "results.quick": False}
    return Recorded("demonstration", lambda record: figures(record["results"]), where)


def method(cell: str, *bases: tuple[str, str]) -> Recorded:
    """Percent right of a row of the method's table, mean over seeds, on each (base, variant), and tokens on the first and
    the last of them.
    """

    def figures(record: Record) -> Sequence[Figure]:
        rows = [
            [one for one in record["results"]["cells"] if (one["base"], one["variant"], one["cell"]) == (*base, cell)]
            for base in bases
        ]
        shares = [mean([one["num_correct"] / one["num_questions"] for one in found]) for found in rows]
        tokens = [mean([one["tokens"] for one in found]) for found in rows]
        return [*(exactly(100 * share) for share in shares), *map(exactly, dict.fromkeys((tokens[0], tokens[-1])))]

    return Recorded("method", figures)


def seeds(base: str, variant: str, cell: str) -> Recorded:
    """Percent right of each seed."""

    def figures(record: Record) -> Sequence[Figure]:
        cells = record["results"]["cells"]
        found = [one for one in cells if (one["base"], one["variant"], one["cell"]) == (base, variant, cell)]
        return [exactly(100 * one["num_correct"] / one["num_questions"]) for one in found]

    return Recorded("method", figures)


def accuracy(results: Record, when: str) -> Sequence[Figure]:
    """Percent right before or after, with both ends of the interval."""
    percent = 100 * results[when] / results["num_questions"]
    return [exactly(percent), *(exactly(100 * end) for end in results[f"{when}_interval"])]


SIDES = ("ours", "alternative")
BASES = (("base-0", "plain"), ("base-1", "plain"), ("hard-0", "hard"))
PERCENT = "{:.1f} % | {:.1f} % | {:.1f} %"
METHOD_ROWS = {
    "base": f"| base, one greedy chain | {PERCENT} | {{:.0f}}, {{:.0f}} |",
    "tree of thought": f"| tree of thought, vote | {PERCENT} | {{:.0f}}, {{:,.0f}} |",
    "SFT": f"| imitation of the winning paths (SFT) | {PERCENT} | {{:.0f}}, {{:.0f}} |",
    "FPO": f"| whole chains as preferences (FPO) | {PERCENT} | {{:.0f}}, {{:.0f}} |",
    "CPO all": f"| **CPO `all`** | {PERCENT} | {{:.0f}}, {{:.0f}} |",
    "CPO all, best by agreement": "| CPO `all`, its step chosen by agreement with votes "
    f"| {PERCENT} | {{:.0f}}, {{:.0f}} |",
}

CLAIMS = [
    *(
        Claim(f"method: {cell}", passage, method(cell, *BASES), METHOD, measured_here=False)
        for cell, passage in METHOD_ROWS.items()
    ),
    Claim(
        "method: SFT, tuned",
        "| the same, tuned for itself | - | - | {:.1f} % | {:.0f} |",
        method("SFT, tuned", BASES[2]),
        METHOD,
        measured_here=False,
    ),
    Claim(
        "method: seeds of CPO on hard questions",
        "on hard questions: CPO `all` ends at {:.0f}, {:.0f} and {:.0f} % there",
        seeds("hard-0", "hard", "CPO all"),
        METHOD,
        measured_here=False,
    ),
    Claim(
        "one step, packed",
        "One step on a 27-pair tree is {:.1f} times faster than padded rows and {:.1f} times faster than TRL's",
        step(times("padded"), times("TRL")),
        STEP,
    ),
    Claim(
        "tokens of one step",
        "from {:.0f} times fewer tokens",
        step(lambda results: exactly(results["padded_tokens"] / results["packed_tokens"])),
        STEP,
    ),
    Claim(
        "one step, packed: seconds",
        "| packed | {:,} | {:.1f} (median of 3, spread {:.0f} %) | 1 |",
        step(
            count("packed_tokens"),
            lambda results: here(results["packed_median_seconds"]),
            lambda results: here(100 * results["packed_spread"]),
        ),
        STEP,
    ),
    Claim(
        "one step, padded rows: seconds",
        "| padded rows, `sdpa`, head on completion rows only | {:,} | {:.0f} [{:.0f}, {:.0f}] | {:.1f} [{:.1f}, {:.1f}] |",
        step(
            count("padded_tokens"),
            seconds("padded"),
            *interval("padded", "interval_seconds"),
            times("padded"),
            *interval("padded"),
        ),
        STEP,
    ),
    Claim(
        "one step, TRL: seconds",
        "| TRL 1.16 `DPOTrainer.compute_loss` | {:,} | {:.0f} [{:.0f}, {:.0f}] | {:.1f} [{:.1f}, {:.1f}] |",
        step(
            count("padded_tokens"), seconds("TRL"), *interval("TRL", "interval_seconds"), times("TRL"), *interval("TRL")
        ),
        STEP,
    ),
    Claim(
        "one step in CPU seconds",
        "which other work on the machine disturbs less: {:.1f} [{:.1f}, {:.1f}] and {:.1f} [{:.1f}, {:.1f}].",
        step(times("padded"), *interval("padded"), times("TRL"), *interval("TRL"), clock="cpu"),
        STEP_CPU,
    ),
    Claim(
        "peak memory of one step",
        "a packed step of all 27 pairs holds {:.1f} GiB at its peak, TRL's of a single pair {:.1f} GiB",
        Logged(
            "one packed step of all pairs holds {} MiB at its peak, TRL's of the last pair alone {} MiB",
            lambda ours, peer: [here(ours / 1024), here(peer / 1024)],
        ),
        "benchmarks.clock.peak_bytes around StepContestant.step",
    ),
    Claim(
        "what a search generates",
        "five sampled verdicts a thought, {:,} tokens in {} samples",
        Recorded("collect", lambda record: [exactly(record["results"][k]) for k in ("num_tokens", "num_samples")]),
        SEARCH,
    ),
    Claim(
        "a search",
        "| `search.engine: arena` | {:.1f} (median of 3, spread {} %) | 1 |",
        Recorded("collect", lambda record: _ours(record["results"]["rows"])),
        SEARCH,
    ),
    Claim(
        "a search without shared reads",
        "| the same, every shared key read once a row | {:.1f} | {:.1f} |",
        search_row("ours without shared reads"),
        SEARCH,
    ),
    Claim(
        "a search by continuous batching",
        "| transformers' continuous batching (a third of the tokens, scaled) | {:.0f} | {:.1f} |",
        search_row("continuous batching"),
        SEARCH,
    ),
    Claim(
        "a search by batched generation",
        "| `generate`, k samples of a state a call | {:.0f} [{:.0f}, {:.0f}] | {:.1f} |",
        search_row("batched", sampled=True),
        SEARCH,
    ),
    Claim(
        "a search by sequential generation",
        "here with lossless stops | {:.0f} [{:.0f}, {:.0f}] | {:.1f} |",
        search_row("sequential", sampled=True),
        SEARCH,
    ),
    Claim(
        "end to end on a tiny model",
        "two evaluations take {:.1f} CPU seconds, and {:.1f} with batched `generate`, TRL's `DPOTrainer` and PEFT, which "
        "compute {:.1f} times the tokens (`python -m benchmarks.end_to_end --clock cpu`). Search is {:.1f} times as fast, "
        "training {:.1f}, and evaluation, which asks some questions alone for their latency, {:.1f}.",
        Recorded("end_to_end", lambda record: _end_to_end(record["results"]["rows"]), OF_REASONER),
        END_TO_END,
    ),
    Claim(
        "end to end on a language model",
        "With SmolLM2-135M, two questions and two steps of four pairs (`--set smollm2`) it is {:.0f} against {:.0f}, of "
        "{:.1f} times the tokens: search {:.1f} times as fast, training {:.1f}, evaluation {:.1f}.",
        Recorded("end_to_end", lambda record: _end_to_end(record["results"]["rows"]), OF_SMOLLM2),
        f"{END_TO_END} --set smollm2",
    ),
    Claim(
        "token trie to forest",
        "64 sequences of 700 tokens become a forest in {:.1f} ms on one core",
        Recorded("forest", lambda record: [here(record["results"]["shared"]["from_lists_ms"])]),
        "python -m benchmarks.forest",
    ),
    Claim(
        "parameters beside TRL's trainer",
        "parameters after 20 SGD steps that moved them by {} | {} (bar: 1e-4 of the movement)",
        Logged("our own loop: parameters moved by {}, largest difference {}, that is 8e-7 of the movement"),
        EXACT,
    ),
    Claim(
        "parameters beside TRL's asynchronous trainer",
        "parameters after 4 SGD steps that moved them by {} | {} (bar: 1e-4 of the movement)",
        Logged(
            "after 4 SGD steps of its trainer are {} from samples alone, where they moved by {}.",
            lambda difference, moved: [here(f"{moved:.1e}".replace("e-0", "e-")), here(_short(difference))],
        ),
        EXACT,
    ),
    Claim(
        "demonstration: the model",
        "A shipped model of {:,} parameters",
        demonstration(lambda results: [exactly(round(results["num_parameters"], -3))]),
        DEMO,
    ),
    Claim(
        "demonstration: accuracy",
        "One greedy chain went from {:.1f} % [{:.1f}, {:.1f}] to {:.1f} % [{:.1f}, {:.1f}] right",
        demonstration(lambda results: [*accuracy(results, "before"), *accuracy(results, "after")]),
        DEMO,
    ),
    Claim(
        "demonstration: chance",
        "(exact McNemar p = {:.0e})",
        demonstration(lambda results: [exactly(results["mcnemar_p"])]),
        DEMO,
    ),
    Claim(
        "demonstration: tokens",
        "at {:.0f} generated tokens a question, where the search takes {}",
        demonstration(lambda results: [exactly(results["tokens"]), exactly(results["search_tokens"])]),
        DEMO,
    ),
    Claim(
        "demonstration: time",
        "It takes {:.0f} CPU seconds",
        demonstration(lambda results: [here(results["cpu_seconds"])]),
        DEMO,
    ),
    Claim(
        "demonstration, several seeds",
        "on nine seeds it ended between {} and {} of 150",
        Logged("questions before, {} to {} after on seeds 0 to 8"),
        "cpo-fast demo --seed N",
    ),
    Claim(
        "bundle for a machine without a network",
        "wheels of the rest, {:.0f} MB in build/gpu-bundle",
        Logged("The bundle (`make gpu-bundle`) has {} MB", lambda megabytes: [here(megabytes)]),
        "make gpu-bundle",
    ),
]

EXEMPT: dict[str, Sequence[str]] = {
    "README.md": (
        "train: {lr: 5.0e-6, batch_order: questions}",
        "prompt of 450 tokens, three levels, nine losers each, thoughts of about 40 tokens",
        "64 sequences of 700 tokens",
        "1e-12 relative (test)",
        "1e-5 relative (test)",
        "a forest of 32 tokens",
        "95 % interval",
        "On reasoners of 605,000 parameters",
        "End to end on a model of 605,000 parameters",
    ),
}


def _end_to_end(rows: Sequence[Record]) -> Sequence[Figure]:
    stages = {row["stage"]: row for row in rows}
    whole = stages["all"]
    asked = [sum(stages[f"eval {name}"][side]["seconds"] for name in ("base", "adapter")) for side in SIDES]
    return [
        *(here(whole[side]["seconds"]) for side in SIDES),
        ratio(whole["ratio"]["tokens"]),
        *(ratio(stages[stage]["ratio"]["seconds"]) for stage in ("collect", "train")),
        ratio(asked[1] / asked[0]),
    ]


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def _ours(rows: Sequence[Record]) -> Sequence[Figure]:
    (row,) = (row for row in rows if row["name"] == "ours")
    spread = row["note"].rpartition("spread ")[2].rstrip("%")
    return [here(row["seconds"]), here(spread)]
