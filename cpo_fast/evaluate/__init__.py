"""Measuring a model: accuracy by greedy chain and by tree of thought, what a question costs, and paired comparisons."""

from cpo_fast.evaluate.comparison import Agreement, Comparison, Difference, compare
from cpo_fast.evaluate.evaluation import evaluate, evaluate_methods
from cpo_fast.evaluate.overview import Overview, folder_evaluations, run_overview
from cpo_fast.evaluate.result import Evaluation, QuestionResult, RunIdentity, read_evaluation
from cpo_fast.evaluate.statistics import Spread, holm, mcnemar_exact, paired_bootstrap, spread, wilson_interval

__all__ = [
    "Agreement",
    "Comparison",
    "Difference",
    "Evaluation",
    "Overview",
    "QuestionResult",
    "RunIdentity",
    "Spread",
    "compare",
    "evaluate",
    "evaluate_methods",
    "folder_evaluations",
    "holm",
    "mcnemar_exact",
    "paired_bootstrap",
    "read_evaluation",
    "run_overview",
    "spread",
    "wilson_interval",
]
