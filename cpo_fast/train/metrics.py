"""Step statistics under TRL's names, plus accuracy per reasoning step and the tokens that sharing saved.

Sums are kept on the device over a step's micro-batches and turned into numbers once, when a line is written.
"""

from collections.abc import Sequence
from typing import Any

import torch

from cpo_fast.train.objective import MicroBatchResult

PER_PAIR = ("losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps")
PER_TOKEN = ("entropy_sum", "chosen_logit_sum", "rejected_logit_sum", "num_top1")


class StepMetrics:
    """Collects the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        """Start empty."""
        self.results: list[MicroBatchResult] = []
        self.steps: list[int] = []

    def add(self, result: MicroBatchResult, steps: Sequence[int]) -> None:
        """Add a micro-batch; `steps` is each pair's reasoning step, 0 when it has none."""
        self.results.append(result)
        self.steps.extend(steps)

    def summary(self) -> dict[str, float]:
        """Means over the step's pairs (rewards, log-probs) or tokens (entropy, logits, accuracy), as TRL logs them."""
        pairs = {name: torch.cat([getattr(result, name) for result in self.results]) for name in PER_PAIR}
        tokens = {name: float(sum(getattr(result, name) for result in self.results)) for name in PER_TOKEN}
        num_chosen = int(sum(result.chosen_lengths.sum() for result in self.results))
        num_rejected = int(sum(result.rejected_lengths.sum() for result in self.results))
        margins = pairs["chosen_rewards"] - pairs["rejected_rewards"]
        correct = (margins > 0).float()
        computed = sum(result.num_tokens for result in self.results)
        rows = sum(result.num_sequence_tokens for result in self.results)
        values = {
            "loss": float(pairs["losses"].mean()),
            "rewards/chosen": float(pairs["chosen_rewards"].mean()),
            "rewards/rejected": float(pairs["rejected_rewards"].mean()),
            "rewards/accuracies": float(correct.mean()),
            "rewards/margins": float(margins.mean()),
            "logps/chosen": float(pairs["chosen_logps"].mean()),
            "logps/rejected": float(pairs["rejected_logps"].mean()),
            "logits/chosen": tokens["chosen_logit_sum"] / max(num_chosen, 1),
            "logits/rejected": tokens["rejected_logit_sum"] / max(num_rejected, 1),
            "entropy": tokens["entropy_sum"] / max(num_chosen + num_rejected, 1),
            "mean_token_accuracy": tokens["num_top1"] / max(num_chosen, 1),
            "pairs": len(self.steps),
            "micro_batches": len(self.results),
            "tokens/computed": computed,
            "tokens/rows": rows,
            "tokens/saved": 1 - computed / rows if rows else 0.0,
        }
        values.update(_accuracy_by_step(correct, self.steps))
        return values

    def nonfinite_pairs(self) -> list[int]:
        """Places, in the order of addition, of pairs whose loss is not finite."""
        losses = torch.cat([result.losses for result in self.results])
        return (~torch.isfinite(losses)).nonzero().squeeze(1).tolist()


def _accuracy_by_step(correct: torch.Tensor, steps: Sequence[int]) -> dict[str, float]:
    by_step: dict[int, list[float]] = {}
    for value, step in zip(correct.tolist(), steps, strict=True):
        if step:
            by_step.setdefault(step, []).append(value)
    return {f"rewards/accuracies/step_{step}": sum(v) / len(v) for step, v in sorted(by_step.items())}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers with nine significant digits, enough to tell float32 values apart and short enough to read."""
    return {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in values.items()}
