"""What `benchmarks.method` runs: bases, seeds, ranges of questions, settings and cells. Nothing here computes.

A base is asked the questions of its variants (see `examples/reasoner`). Every seed has its own search questions, its own
sampling and its own adapter initialisation; dev and test questions are the same for all. The primary comparison is CPO
`all` against the base on the test questions, by the exact McNemar test; all others are Holm-corrected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REASONER = Path("examples/reasoner")
SEEDS = (0, 1, 2)
NUM_SEARCHED = 200  # questions searched for each seed, of which a cell trains on NUM_TRAINED unless it says otherwise
NUM_TRAINED = 120
ROUNDS = 3

LORA = {
    "r": 8,
    "alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SEARCH = {
    "num_candidates": 8,
    "num_kept": 3,
    "temperature": 0.9,
    "max_thought_tokens": 24,
    "evaluator": "logits",
    "questions_in_flight": 64,  # a tiny model: many lines at once cost little more than few
    "batch_size": 2048,
}
FPO_TUNED: Mapping[str, Any] = {"lr": 3e-4}  # at the rate of the others its chains get worse
TRAIN = {"max_tokens": 16384, "save_every": 10_000}


@dataclass(frozen=True, eq=False)
class Variant:
    """A kind of question: its task file, its lines (the answer's included), and where its questions stand."""

    name: str
    max_steps: int

    @property
    def task_file(self) -> Path:
        return REASONER / f"{self.name}.yaml"

    def questions(self, part: str) -> Path:
        """The file of `search-SEED`, `dev` or `test`."""
        return REASONER / "questions" / self.name / f"{part}.jsonl"


PLAIN, HARD = Variant("plain", 4), Variant("hard", 8)


@dataclass(frozen=True, eq=False)
class Search:
    """Trees that cells train on: of one base, variant and seed, with settings of their own."""

    name: str = "bfs"
    variant: Variant = HARD
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_questions: int = NUM_SEARCHED


BFS = Search()


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of the table: what is trained, on which trees, and on which variants it is asked.

    `searches` without any is a model that is not trained. `rounds` runs `cpo-fast iterate` in place of one training.
    `settings` are sections of the configuration over the plan's own.
    """

    name: str
    group: str
    searches: tuple[Search, ...] = (BFS,)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: tuple[Variant, ...] = (HARD,)
    method: str = "cot"
    rounds: bool = False


BASE, TREE, CPO = "base", "tree of thought", "CPO all"

# the budget of the search level by level: 16 states are expanded
BUDGET = {"max_nodes": 128}
DFS = Search("dfs", settings={"strategy": "dfs", **BUDGET}, num_questions=NUM_TRAINED)
MCTS = Search(
    "mcts",
    settings={"strategy": "mcts", "num_simulations": 64, "exploration": 0.2, **BUDGET},
    num_questions=NUM_TRAINED,
)
SAMPLED = Search(
    "sampled verdicts",
    settings={"evaluator": "sample", "num_verdicts": 5, "verdict_temperature": 1.0, "max_verdict_tokens": 1},
    num_questions=80,
)
OTHER = Search("bfs", PLAIN)


def trained(name: str, group: str, search: Search = BFS, **settings: Mapping[str, Any]) -> Cell:
    """A cell that trains on one search."""
    return Cell(name, group, (search,), settings)


def main_cells() -> list[Cell]:
    """Base, search, and what is trained on the search's trees."""
    return [
        Cell(BASE, "main", ()),
        Cell(TREE, "main", (), method="tot"),
        trained("SFT", "main", train={"method": "sft"}),
        trained("FPO", "main", pairs={"rule": "fpo"}),
        trained("FPO, tuned", "main", pairs={"rule": "fpo"}, train=FPO_TUNED),
        trained("CPO lowest", "main", pairs={"rule": "lowest"}),
        trained("CPO lower", "main", pairs={"rule": "lower"}),
        trained(CPO, "main"),
    ]


def ablation_cells() -> list[Cell]:
    """What the paper varies, and what it does not: data, rounds, mixtures, searches, objectives."""
    cells = [
        trained(f"{share:.0%} of the rejected", "rejected thoughts", pairs={"rejected_fraction": share})
        for share in (0.25, 0.5, 0.75)
    ]
    cells += [trained(f"{count} questions", "questions", pairs={"num_questions": count}) for count in (10, 40, 80, 200)]
    cells += [
        Cell(f"{ROUNDS} rounds, {title}", "rounds", settings={"iterate": {"method": method}}, rounds=True)
        for title, method in (("CPO only", "cpo"), ("SFT, then CPO", "sft_cpo"))
    ]
    both = (HARD, PLAIN)
    cells += [
        Cell("hard alone", "mixture", (BFS,), asked=both),
        Cell("plain alone", "mixture", (OTHER,), asked=both),
        Cell("both, equal shares", "mixture", (BFS, OTHER), asked=both),
        Cell("both, all of them", "mixture", (BFS, OTHER), {"pairs": {"num_questions": None}}, both),
    ]
    cells += [trained(f"CPO all, {search.name}", "search", search) for search in (DFS, MCTS, SAMPLED)]
    return cells


def objective_cells() -> list[Cell]:
    """Losses that read more of the tree than pairs."""
    return [
        *(trained(title, "objectives", BFS, train={"method": method}) for title, method in OBJECTIVES),
        trained("CPO all, smoothed by visits", "objectives", MCTS, train={"visit_smoothing": True}),
    ]


OBJECTIVES = (("TPO", "tpo"), ("DVO", "dvo"), ("Tree-GRPO", "tree_grpo"), ("Full-Step-DPO", "full_step"))


@dataclass(frozen=True, eq=False)
class Base:
    """A base, the kind of question that its cells train on, its cells, and the rate and steps of their training."""

    name: str
    variant: Variant
    cells: tuple[Cell, ...]
    rate: float
    steps: int

    @property
    def path(self) -> Path:
        return REASONER / self.name


def plain_cells() -> list[Cell]:
    """The main cells on plain questions."""
    return [replace(cell, searches=(OTHER,) * len(cell.searches), asked=(PLAIN,)) for cell in main_cells()]


# rates and steps were chosen on dev questions with seed 0 (benchmarks/results/method_tuning.jsonl)
PLAN = (
    Base("base-0", PLAIN, tuple(plain_cells()), 1e-3, 30),
    Base("base-1", PLAIN, tuple(plain_cells()), 1e-3, 30),
    Base("hard-0", HARD, (*main_cells(), *ablation_cells(), *objective_cells()), 1e-3, 60),
)


def tuning_cells() -> list[Cell]:
    """The grid from which rate and steps were chosen, asked dev questions alone, with seed 0."""
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {
        "CPO": {"train": {}},
        "SFT": {"train": {"method": "sft"}},
        "FPO": {"train": {}, "pairs": {"rule": "fpo"}},
    }
    return [
        Cell(
            f"{kind}, rate {rate:g}, {steps} steps",
            "tuning",
            settings=sections | {"train": {**sections["train"], "lr": rate, "max_steps": steps}},
        )
        for kind, sections in kinds.items()
        for rate in (3e-4, 1e-3, 3e-3)
        for steps in (30, 60)
    ]


TUNING = (Base("hard-0", HARD, tuple(tuning_cells()), 1e-3, 30),)
