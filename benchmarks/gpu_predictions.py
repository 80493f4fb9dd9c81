"""What was predicted of an H200 before anything had run on one, figure by figure, and the bar where there is one.

Predictions were made on 2026-11-28 for revision 5720e77: read from machine code compiled for compute capability 9.0
(Triton 3.6.0), from counted kernel launches and simulated rounding, from published rates, or guessed. `after` is what was
predicted for the change that the prediction proposes. A prediction is not edited when it turns out wrong.
"""

from dataclasses import dataclass

Range = tuple[float, float]
WITHIN = ("<=", 1.0)  # the bound of an error ratio
NEVER = ("<=", 0.0)  # of what may not happen
COMPUTED, GUESSED, MIXED, ELSEWHERE = "computed", "guessed", "computed and guessed", "measured on such a card"


@dataclass(frozen=True)
class Prediction:
    """One figure.

    Attributes:
        figure: its name in the records, with its unit.
        step: of `gpu_quick` that measures it; "" where none does.
        shipped: least and greatest predicted value at revision 5720e77; of a figure that is 1 where something failed and
            else 0, the probability of 1, twice.
        basis: measured, computed, guessed; what is computed from guesses says both.
        after: predicted after the proposed change.
        bar: a limit and on which side of it the figure must lie: ("<=", 2.8).
    """

    figure: str
    step: str
    shipped: Range
    basis: str
    after: Range | None = None
    bar: tuple[str, float] | None = None

    @property
    def is_chance(self) -> bool:
        """Whether `shipped` is the probability of a figure of 1."""
        return self.bar == NEVER


def _exactly(value: float) -> Range:
    return (value, value)


PREDICTIONS = (
    # ceilings
    Prediction("copy TB/s", "ceilings", _exactly(4.3), ELSEWHERE),
    Prediction("matmul TF/s", "ceilings", _exactly(790), ELSEWHERE),
    # the self-check refuses correct kernels where the product behind eager is split; error over bound, above 1 is refused
    Prediction("linear_logprob, 7b: refused", "check linear_logprob, 7b", _exactly(0.45), MIXED, None, NEVER),
    Prediction("linear_logprob, default: refused", "check linear_logprob, default", _exactly(0.2), MIXED, None, NEVER),
    Prediction("linear_logprob, 7b: worst ratio", "check linear_logprob, 7b", (0.5, 4.3), MIXED, (0, 1), WITHIN),
    Prediction("linear_logprob, default: worst ratio", "check linear_logprob, default", (0.2, 1.5), MIXED, (0, 1), WITHIN),
    Prediction("tree_attention, 7b: worst ratio", "check tree_attention, 7b", (0, 1), GUESSED, None, WITHIN),
    Prediction("tree_attention, default: worst ratio", "check tree_attention, default", (0, 1), GUESSED, None, WITHIN),
    Prediction("tree_decode, 7b: worst ratio", "check tree_decode, 7b", (0, 1), GUESSED, None, WITHIN),
    Prediction("tree_decode, default: worst ratio", "check tree_decode, default", (0, 1), GUESSED, None, WITHIN),
    Prediction("sample_tokens, 7b: worst ratio", "check sample_tokens, 7b", (0, 1), GUESSED, None, WITHIN),
    Prediction("fused_layers, 7b: worst ratio", "check fused_layers, 7b", (0, 1), GUESSED, None, WITHIN),
    # attention, 32 heads of 128, benchmark forests; `before`: the tiles of revision 5720e77
    Prediction("trees: before: forward ms", "tiles", (0.28, 0.38), GUESSED),
    Prediction("trees: before: backward ms", "tiles", (1.4, 1.8), MIXED),
    Prediction("trees: shipped: backward ms", "tiles", (1.4, 1.8), MIXED, (0.7, 0.9)),
    Prediction("chain: before: forward ms", "tiles", (1.0, 1.3), GUESSED),
    Prediction("chain: before: backward ms", "tiles", (5.5, 7.0), COMPUTED),
    Prediction("chain: shipped: backward ms", "tiles", (5.5, 7.0), COMPUTED, (3.0, 3.5)),
    Prediction("trees: FlexAttention: forward ms", "flex", (0.35, 0.5), GUESSED),
    Prediction("trees: FlexAttention: backward ms", "flex", (1.1, 1.5), GUESSED),
    Prediction("chain: FlexAttention: forward ms", "flex", (1.2, 1.5), GUESSED),
    Prediction("chain: FlexAttention: backward ms", "flex", (4.0, 5.0), GUESSED),
    # a decode step of the Llama-2-7B shape, recorded; 1 is a failed recording
    Prediction("graph at 16 rows failed", "graph", _exactly(0.12), GUESSED, None, NEVER),
    Prediction("graph at 64 rows failed", "graph", _exactly(0.12), GUESSED, None, NEVER),
    Prediction("graph at 256 rows failed", "graph", _exactly(0.12), GUESSED, None, NEVER),
    Prediction("decode step at 16 rows ms", "graph", (5.5, 6.5), GUESSED),
    Prediction("decode step at 256 rows ms", "graph", (10.5, 12.5), MIXED, (7.5, 9.5)),
    Prediction("decode step at 256 rows, share of the roofline", "graph", (0.32, 0.38), MIXED, None, (">=", 0.5)),
    # search
    Prediction("collect: batched over ours", "collect", (8, 100), "guessed: 95 % that the bar is met", None, (">=", 8)),
    # a training step of one tree of 27 pairs, Llama-2-7B shape
    Prediction("step: ours s", "train", (0.22, 0.30), MIXED),
    Prediction("step: TRL s", "train", (3.5, 4.5), MIXED),
    Prediction("step: TRL over ours", "train", (13, 17), MIXED),
    Prediction("step: share of the token ratio", "train", (0.65, 0.85), MIXED, None, (">=", 0.7)),
    Prediction("step: MFU of ours", "train", (0.22, 0.30), MIXED),
    Prediction("step: peak memory over TRL's", "train", (0, 0.5), "the bar alone", None, ("<=", 0.5)),
    # the head, E 4096, full step
    Prediction("head 128256, 512 rows: ours ms", "logprob", (3.0, 3.3), MIXED, (2.4, 2.7), ("<=", 2.8)),
    Prediction("head 128256, 512 rows: floor ms", "logprob", _exactly(2.04), COMPUTED),
    Prediction("head 128256, 2048 rows: ours ms", "logprob", (11.5, 13.0), MIXED, (10.0, 10.8), ("<=", 10.5)),
    Prediction("head 128256, 2048 rows: floor ms", "logprob", _exactly(8.17), COMPUTED),
    Prediction("head 128256: largest error of a log-prob", "logprob", (2e-5, 4e-5), COMPUTED, None, ("<=", 1e-5)),
    # DeepSpeed with NCCL and a process group of one
    Prediction("training failed", "training", _exactly(0.12), GUESSED, None, NEVER),
    # chunks of the head, side by side
    Prediction("head 128256, 2048 rows: 2^25 logits, 4 programs an SM ms", "head", (11.5, 13.0), MIXED),
    Prediction("head 128256, 2048 rows: 2^27 logits, 4 programs an SM ms", "head", (10.0, 10.8), MIXED),
    Prediction("head 32000, 2048 rows: 2^25 logits, 4 programs an SM ms", "head", (2.6, 2.9), MIXED),
    Prediction("head 32000, 2048 rows: floor 3 GEMMs ms", "head", _exactly(2.04), COMPUTED),
)  # fmt: skip
