"""The check of linear_logprob's Triton kernels: every variant that a model can ask for, in every shipped tile.

A frozen and a trained head, plain and under a soft-cap with a bias, and rows without a gradient by both paths, whatever
the dispatch table says. Not among them: more than one chunk of logits, which differs on the host alone, and inputs of
more than 2^31 elements.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cpo_kernels.kernel_check import FLOAT32_EPS, SEED, ModelShape, Results, error_ratios, random_tensor
from cpo_kernels.linear_logprob import eager
from cpo_kernels.linear_logprob.results import OUTPUTS, Head, PairScores
from cpo_kernels.logprob_plan import LogprobPlan

VOCAB_SIZE = 517  # a few vocabulary tiles and a ragged one; more would test time, not code
TARGETS_PER_ROW = 1.5  # up to a handful of targets a row, some repeated, some rows with none
# the fused product has a tile for up to 16 rows, one for up to 64, and one beyond
MANY_ROWS, MEDIUM_ROWS, FEW_ROWS = 199, 37, 13
PRODUCTS_A_ROUNDING = 32  # of a tensor core's: 16 on Hopper and 8 on Ampere, and random signs take part of the rest
PATHS = ("chunk", "fused")  # of rows that take no gradient


@dataclass(frozen=True)
class HeadCase:
    """One head and a number of rows."""

    name: str
    num_rows: int
    transformed: bool = False  # a bias, a soft-cap, a scale and a temperature
    trained: bool = False  # the head takes a gradient
    outputs: bool = True  # asked where a gradient is taken; where none is, the other way round


def head_cases() -> tuple[HeadCase, ...]:
    """Every variant of a kernel that differs in code."""
    return (
        HeadCase("frozen head", MANY_ROWS),
        HeadCase("fewer rows", MEDIUM_ROWS, outputs=False),
        HeadCase("soft-cap and bias", MEDIUM_ROWS, transformed=True),
        HeadCase("trained head", FEW_ROWS, trained=True, outputs=False),
        HeadCase("trained head, soft-cap and bias", MEDIUM_ROWS, transformed=True, trained=True),
    )


def check_linear_logprob(device: torch.device, shape: ModelShape, kernels: Any = None) -> dict[str, float]:
    """Error over bound of log-probs with a gradient and without one by both paths, of outputs, and of gradients.

    Args:
        device, shape: where, and in what sizes.
        kernels: what has `score`, `row_gradients` and `head_gradients`. None takes the Triton kernels.

    Returns:
        Ratios up to the first head that has something outside the bound.
    """
    if kernels is None:
        from cpo_kernels.linear_logprob import triton as kernels  # loads Triton
    ratios: dict[str, float] = {}
    for case in head_cases():
        ratios |= {f"{name} ({case.name})": value for name, value in check_head(case, device, shape, kernels).items()}
        if not all(value <= 1 for value in ratios.values()):
            break
    return ratios


def check_head(case: HeadCase, device: torch.device, shape: ModelShape, kernels: Any) -> dict[str, float]:
    """Error over bound of every result of one head, by its name."""
    hidden, ref_hidden = (
        random_tensor((case.num_rows, shape.hidden_size), device, shape.dtype, place) for place in (4, 5)
    )
    weight = random_tensor((VOCAB_SIZE, shape.hidden_size), device, shape.dtype, 6, shape.hidden_size**-0.5)
    bias = random_tensor((VOCAB_SIZE,), device, shape.dtype, 7) if case.transformed else None
    transform: tuple[float, float | None, float] = (-1.3, 4.0, 0.8) if case.transformed else (1.0, None, 1.0)
    products = hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    plan, clear = _targets(products.cpu() * transform[0])
    plan, clear = plan.to(device), clear.to(device)
    upstream = random_tensor(tuple(plan.pair_row.shape), device, torch.float32, 8)

    def outputs_of(scores: PairScores, path: str) -> Results:
        assert scores.entropy is not None
        assert scores.mean_logit is not None
        assert scores.is_top1 is not None
        top = (scores.is_top1 & clear).float()
        return {f"entropy{path}": scores.entropy, f"mean logit{path}": scores.mean_logit, f"top-1{path}": top}

    def run(impl: Any, dtype: torch.dtype) -> Results:
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), *transform)
        rows, ref_rows = (x.to(dtype).index_select(0, plan.unique_rows) for x in (hidden, ref_hidden))
        outputs = OUTPUTS if case.outputs else ()
        scores: PairScores = impl.score(rows, head, plan, outputs, "recompute" if case.trained else "expected")
        # the reference model goes through the variants of the policy
        reference: PairScores = impl.score(ref_rows, head, plan, () if impl is eager else outputs, "reference")
        found = {"log-probs": scores.logps, "reference log-probs": reference.logps}
        found |= outputs_of(scores, "") if case.outputs else {}
        grad = upstream.to(scores.logps.dtype)
        if case.trained:
            gradients = impl.head_gradients(grad, scores, rows, head, plan, (True, True, bias is not None))
        else:
            gradients = (impl.row_gradients(grad, scores, plan),)
        names = ("gradient", "weight gradient", "bias gradient")
        found |= {name: gradient for name, gradient in zip(names, gradients, strict=False) if gradient is not None}
        for path in PATHS:
            options = {} if impl is eager else {"path": path}
            scores = impl.score(rows, head, plan, () if case.outputs else OUTPUTS, "none", **options)
            found[f"log-probs, path {path}"] = scores.logps
            found |= {} if case.outputs else outputs_of(scores, f", path {path}")
        return found

    # a logit of size L is rounded by eps L: that much in a log-prob, and as a factor in a gradient. A tensor core adds 8 or
    # 16 products at a time into a float32 that it cuts off: a chain of E / 16 such roundings, all to one side, where the
    # product of the library behind eager may be cut into short chains. A bfloat16 logit is rounded a hundred times as much
    logit_error = FLOAT32_EPS * float(products.abs().max()) * max(1.0, shape.hidden_size / PRODUCTS_A_ROUNDING)
    gradient_error = logit_error * float(upstream.abs().max())
    bands = {
        "gradient": gradient_error,
        "weight gradient": gradient_error * float(hidden.abs().max()),
        "bias gradient": gradient_error,
    }
    bands |= {f"top-1{path}": 0.5 for path in ("", *(f", path {path}" for path in PATHS))}  # right, or off by 1
    # eager multiplies float32 copies where a head is trained; 16-bit operands bring one more rounding of that size
    allowance = 2.0 if case.trained and shape.dtype != torch.float32 else 1.0
    exact, in_dtype, kernel = run(eager, torch.float64), run(eager, shape.dtype), run(kernels, shape.dtype)
    return error_ratios(exact, in_dtype, kernel, bands, logit_error, allowance)


def _targets(logits: torch.Tensor) -> tuple[LogprobPlan, torch.Tensor]:
    """A plan over logits [R, V], and of each of its pairs whether rounding cannot change which logit is the largest."""
    num_rows, num_targets = logits.shape[0], int(TARGETS_PER_ROW * logits.shape[0])
    generator = torch.Generator().manual_seed(SEED)
    rows, targets = (torch.randint(high, (num_targets,), generator=generator) for high in (num_rows, VOCAB_SIZE))
    largest, best = logits.topk(2, dim=1)
    targets = torch.where(rows % 3 == 0, best[rows, 0], targets)  # random ones hardly ever have it
    clear = largest[:, 0] - largest[:, 1] > 1e-3
    plan = LogprobPlan.build(rows, targets, torch.zeros_like(rows), 1)
    return plan, clear[plan.unique_rows[plan.pair_row]]
