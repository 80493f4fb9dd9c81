"""Step statistics under TRL's names, plus accuracy per reasoning step, drift per token and the tokens that sharing saved.

Sums are kept on the device over a step's micro-batches and turned into numbers once, when a line is written.
"""

from collections.abc import Sequence
from typing import Any

import torch

from cpo_fast.data.pair import PreferencePair
from cpo_fast.data.sft import SftExample
from cpo_fast.train.objective import MicroBatch, MicroBatchResult
from cpo_fast.train.sft import SftResult

PER_PAIR = ("losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps")
PER_TOKEN = ("entropy_sum", "chosen_logit_sum", "rejected_logit_sum", "num_top1")


class PreferenceMetrics:
    """Collects the micro-batches of pairs of one optimizer step or one validation."""

    def __init__(self, beta: float) -> None:
        """`beta` turns rewards back into log-ratios."""
        self.beta = beta
        self.results: list[MicroBatchResult] = []
        self.pairs: list[PreferencePair] = []

    def add(self, micro: MicroBatch, result: MicroBatchResult) -> None:
        """Add one micro-batch and what the module made of it."""
        self.results.append(result)
        self.pairs.extend(micro.pairs)

    def summary(self) -> dict[str, float]:
        """Means over the pairs (rewards, log-probs) or tokens (entropy, logits, accuracy), as TRL logs them."""
        pairs = {name: torch.cat([getattr(result, name) for result in self.results]) for name in PER_PAIR}
        tokens = {name: float(sum(getattr(result, name) for result in self.results)) for name in PER_TOKEN}
        num_chosen = int(sum(result.chosen_lengths.sum() for result in self.results))
        num_rejected = int(sum(result.rejected_lengths.sum() for result in self.results))
        margins = pairs["chosen_rewards"] - pairs["rejected_rewards"]
        correct = (margins > 0).float()
        values = {
            "loss": float(pairs["losses"].mean()),
            "rewards/chosen": float(pairs["chosen_rewards"].mean()),
            "rewards/rejected": float(pairs["rejected_rewards"].mean()),
            "rewards/accuracies": float(correct.mean()),
            "rewards/margins": float(margins.mean()),
            "logps/chosen": float(pairs["chosen_logps"].mean()),
            "logps/rejected": float(pairs["rejected_logps"].mean()),
            "logps/chosen_per_token": float(pairs["chosen_logps"].sum()) / max(num_chosen, 1),
            "logps/rejected_per_token": float(pairs["rejected_logps"].sum()) / max(num_rejected, 1),
            "logps/chosen_drift": float(pairs["chosen_rewards"].sum()) / self.beta / max(num_chosen, 1),
            "logits/chosen": tokens["chosen_logit_sum"] / max(num_chosen, 1),
            "logits/rejected": tokens["rejected_logit_sum"] / max(num_rejected, 1),
            "entropy": tokens["entropy_sum"] / max(num_chosen + num_rejected, 1),
            "mean_token_accuracy": tokens["num_top1"] / max(num_chosen, 1),
            "pairs": len(self.pairs),
            **_sharing(self.results),
        }
        values.update(_accuracy_by_step(correct, [pair.step for pair in self.pairs]))
        return values

    def nonfinite(self) -> list[str]:
        """Source rows of pairs whose loss is not finite."""
        return _nonfinite(self.results, [pair.source for pair in self.pairs])


class SftMetrics:
    """Collects the micro-batches of completions of one optimizer step or one validation."""

    def __init__(self) -> None:
        """Start empty."""
        self.results: list[SftResult] = []
        self.sources: list[str] = []

    def add(self, micro: Sequence[SftExample], result: SftResult) -> None:
        """Add one micro-batch and what the module made of it."""
        self.results.append(result)
        self.sources.extend(example.source for example in micro)

    def summary(self) -> dict[str, float]:
        """Means over completion tokens, under the names of TRL's SFTTrainer."""
        num_tokens = max(int(sum(result.lengths.sum() for result in self.results)), 1)
        return {
            "loss": float(sum(result.loss_sum.detach() for result in self.results)) / num_tokens,
            "entropy": float(sum(result.entropy_sum for result in self.results)) / num_tokens,
            "mean_token_accuracy": float(sum(result.num_top1 for result in self.results)) / num_tokens,
            "completions": len(self.sources),
            **_sharing(self.results),
        }

    def nonfinite(self) -> list[str]:
        """Source rows of completions whose loss is not finite."""
        return _nonfinite(self.results, self.sources)


def _sharing(results: Sequence[MicroBatchResult] | Sequence[SftResult]) -> dict[str, float]:
    computed = sum(result.num_tokens for result in results)
    rows = sum(result.num_sequence_tokens for result in results)
    return {
        "micro_batches": len(results),
        "tokens/computed": computed,
        "tokens/rows": rows,
        "tokens/saved": 1 - computed / rows if rows else 0.0,
    }


def _nonfinite(results: Sequence[MicroBatchResult] | Sequence[SftResult], sources: Sequence[str]) -> list[str]:
    losses = torch.cat([result.losses for result in results])
    return [sources[place] for place in (~torch.isfinite(losses)).nonzero().squeeze(1).tolist()]


def _accuracy_by_step(correct: torch.Tensor, steps: Sequence[int]) -> dict[str, float]:
    by_step: dict[int, list[float]] = {}
    for value, step in zip(correct.tolist(), steps, strict=True):
        if step:
            by_step.setdefault(step, []).append(value)
    return {f"rewards/accuracies/step_{step}": sum(v) / len(v) for step, v in sorted(by_step.items())}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers with nine significant digits, enough to tell float32 values apart and short enough to read."""
    return {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in values.items()}
