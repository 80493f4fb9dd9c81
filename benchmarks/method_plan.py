"""What `benchmarks.method` runs: bases, seeds, ranges of questions, settings and cells. Nothing here computes.

A base is asked the questions of its variants (see `examples/reasoner`). Every seed has its own search questions, its own
sampling and its own adapter initialisation; dev and test questions are the same for all. The primary comparison is CPO
`all` against the base on the test questions, by the exact McNemar test; all others are Holm-corrected.
"""

from collections.abc import Mapping, Sequence
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
# what dev chose for the others, where rate and steps of CPO are not best for them
FPO_TUNED: Mapping[str, Any] = {"lr": 3e-4, "max_steps": 30}
SFT_TUNED: Mapping[str, Any] = {"method": "sft", "lr": 1e-3, "max_steps": 45}
# the adapter whose chains agree best with the votes of the 80 trees that it does not train on, asked every five steps
BY_AGREEMENT: Mapping[str, Mapping[str, Any]] = {
    "pairs": {"num_questions": None},
    "data": {"held_out": 1 - NUM_TRAINED / NUM_SEARCHED},
    "train": {"stop_on": "agreement", "eval_every": 5},
}
TRAIN = {"max_tokens": 16384, "save_every": 10_000}
EVAL = {"batch_size": 300}


@dataclass(frozen=True, eq=False)
class Variant:
    """A kind of question: its task file, where its questions stand, and caps.

    Attributes:
        max_steps: lines of a chain in a search, the answer's included.
        max_lines, max_new_tokens: of a chain that is asked. More than a search's: a cap shall not decide who is right.
    """

    name: str
    max_steps: int
    max_lines: int
    max_new_tokens: int

    @property
    def task_file(self) -> Path:
        return REASONER / f"{self.name}.yaml"

    def questions(self, part: str) -> Path:
        """The file of `search-SEED`, `dev` or `test`."""
        return REASONER / "questions" / self.name / f"{part}.jsonl"


PLAIN, HARD = Variant("plain", 4, 6, 96), Variant("hard", 8, 12, 200)


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
    `settings` are sections of the configuration over the plan's own. With `one_seed` it is run with the first seed alone.
    """

    name: str
    group: str
    searches: tuple[Search, ...] = (BFS,)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: tuple[Variant, ...] = (HARD,)
    method: str = "cot"
    rounds: bool = False
    one_seed: bool = False


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


BOTH = (HARD, PLAIN)


def main_cells() -> list[Cell]:
    """Base, search, and what is trained on the search's trees."""
    return [
        Cell(BASE, "main", (), asked=BOTH, one_seed=True),
        Cell(TREE, "main", (), method="tot", one_seed=True),
        trained("SFT", "main", train={"method": "sft"}),
        trained("SFT, tuned", "main", train=SFT_TUNED),
        trained("FPO", "main", pairs={"rule": "fpo"}),
        trained("FPO, tuned", "main", pairs={"rule": "fpo"}, train=FPO_TUNED),
        trained("CPO lowest", "main", pairs={"rule": "lowest"}),
        trained("CPO lower", "main", pairs={"rule": "lower"}),
        Cell(CPO, "main", asked=BOTH),
        trained("CPO all, best by agreement", "main", **BY_AGREEMENT),
    ]


def ablation_cells() -> list[Cell]:
    """What the paper varies, and what it does not: data, rounds, mixtures, searches, objectives."""
    cells = [
        trained(f"{share:.0%} of the rejected", "rejected thoughts", pairs={"rejected_fraction": share})
        for share in (0.25, 0.5, 0.75)
    ]
    cells += [trained(f"{count} questions", "questions", pairs={"num_questions": count}) for count in (10, 40, 80, 200)]
    cells += [
        Cell(f"{ROUNDS} rounds, {title}", "rounds", settings={"iterate": rounds, "train": {"lr": 3e-4}}, rounds=True)
        for title, rounds in (
            ("CPO only", {"method": "cpo"}),
            ("SFT, then CPO", {"method": "sft_cpo", "sft_lr": SFT_TUNED["lr"]}),
        )
    ]
    cells += [  # hard questions alone are the main cell of CPO
        Cell("plain alone", "mixture", (OTHER,), asked=BOTH),
        Cell("both, equal shares", "mixture", (BFS, OTHER), asked=BOTH),
        Cell("both, all of them", "mixture", (BFS, OTHER), {"pairs": {"num_questions": None}}, BOTH),
    ]
    cells += [trained(f"CPO all, {search.name}", "search", search) for search in (DFS, MCTS, SAMPLED)]
    return cells


def objective_cells() -> list[Cell]:
    """Losses that read more of the tree than pairs."""
    return [
        *(
            trained(title, "objectives", BFS, train={"method": method, "lr": rate})
            for title, method, rate in OBJECTIVES
        ),
        trained("CPO all, smoothed by visits", "objectives", MCTS, train={"visit_smoothing": True}),
    ]


# and the rate that dev chose for each
OBJECTIVES = (
    ("TPO", "tpo", 3e-4),
    ("DVO", "dvo", 1e-3),
    ("Tree-GRPO", "tree_grpo", 1e-3),
    ("Full-Step-DPO", "full_step", 3e-3),
)


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
    """The main cells on plain questions, where rate and steps of CPO are best for SFT too."""
    return [
        replace(cell, searches=(OTHER,) * len(cell.searches), asked=(PLAIN,))
        for cell in main_cells()
        if cell.name != "SFT, tuned"
    ]


# rates and steps were chosen on dev questions (benchmarks/results/method_tuning.jsonl)
PLAN = (
    Base("base-0", PLAIN, tuple(plain_cells()), 1e-3, 30),
    Base("base-1", PLAIN, tuple(plain_cells()), 1e-3, 30),
    Base("hard-0", HARD, (*main_cells(), *ablation_cells(), *objective_cells()), 7e-4, 60),
)


# (rate, steps) that were tried with seed 0, and then, around the best of them, with every seed
FIRST_GRID = [(rate, steps) for rate in (3e-4, 1e-3, 3e-3) for steps in (30, 60)]
OBJECTIVE_GRID = [(rate, 60) for rate in (3e-4, 1e-3, 3e-3)]
EVERY_SEED: Mapping[str, Sequence[tuple[float, int]]] = {
    "CPO": [(5e-4, 60), (5e-4, 90), (7e-4, 60), (1e-3, 45), (1e-3, 60)],
    "SFT": [(5e-4, 60), (1e-3, 30), (1e-3, 45)],
}


def tuning_cells() -> list[Cell]:
    """The grid from which rates and steps were chosen, asked dev questions alone."""
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {
        "CPO": {"train": {}},
        "SFT": {"train": {"method": "sft"}},
        "FPO": {"train": {}, "pairs": {"rule": "fpo"}},
    }
    kinds |= {title: {"train": {"method": method}} for title, method, _ in OBJECTIVES}
    cells = [
        Cell(
            f"{kind}, rate {rate:g}, {steps} steps",
            "tuning",
            settings=sections | {"train": {**sections["train"], "lr": rate, "max_steps": steps}},
            one_seed=(rate, steps) not in EVERY_SEED.get(kind, ()),
        )
        for kind, sections in kinds.items()
        for rate in (3e-4, 5e-4, 7e-4, 1e-3, 3e-3)
        for steps in (30, 45, 60, 90)
        if (rate, steps) in (FIRST_GRID if kind in ("CPO", "SFT", "FPO") else OBJECTIVE_GRID)
        or (rate, steps) in EVERY_SEED.get(kind, ())
    ]
    sft_first: dict[str, Mapping[str, Any]] = {"iterate": {"method": "sft_cpo"}}
    rounds = [
        Cell(title, "tuning", settings={"train": train} | sections, rounds=True, one_seed=True)
        for title, train, sections in (
            ("rounds of 20 steps", {"max_steps": 20}, {}),
            ("rounds of 30 steps", {"max_steps": 30}, {}),
            ("rounds of 60 steps", {"max_steps": 60}, {}),
            ("rounds of 60 steps at 3e-4", {"max_steps": 60, "lr": 3e-4}, {}),
            ("rounds of 60 steps at 5e-4", {"max_steps": 60, "lr": 5e-4}, {}),
            ("rounds of 60 steps, base as reference", {"max_steps": 60, "reference_model": "base"}, {}),
            ("rounds of 30 steps, SFT first", {"max_steps": 30}, sft_first),
            (
                "rounds of 60 steps, SFT first at 3e-4",
                {"max_steps": 60},
                {"iterate": {"method": "sft_cpo", "sft_lr": 3e-4}},
            ),
        )
    ]
    stopped = BY_AGREEMENT | {"train": {**BY_AGREEMENT["train"], "lr": 1e-3}}
    held = [
        trained("CPO, beta 0.3, rate 0.001, 60 steps", "tuning", train={"beta": 0.3, "lr": 1e-3, "max_steps": 60}),
        trained("CPO, beta 0.5, rate 0.001, 60 steps", "tuning", train={"beta": 0.5, "lr": 1e-3, "max_steps": 60}),
        trained("CPO, best by agreement, rate 0.001, 60 steps", "tuning", **stopped),
    ]
    return [*cells, *rounds, *held]


TUNING = (Base("hard-0", HARD, tuple(tuning_cells()), 1e-3, 60),)
