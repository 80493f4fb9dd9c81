"""Measuring a model: greedy chain-of-thought accuracy with its uncertainty, and what a question costs."""

from cpo_fast.evaluate.chain_of_thought import Evaluation, QuestionResult, evaluate
from cpo_fast.evaluate.statistics import Spread, spread, wilson_interval

__all__ = ["Evaluation", "QuestionResult", "Spread", "evaluate", "spread", "wilson_interval"]
