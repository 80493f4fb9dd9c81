"""The cases that `self_check` runs: for each op its inputs, its results by name, and how far rounding may move each.

Sizes are chosen so that every kernel of an op runs, with whole and ragged tiles, in every way that a model can ask for:
`linear_logprob` with a frozen and a trained head, plain and under a soft-cap with a bias, its rows without a gradient by
both paths whatever the dispatch table says, in every shipped tile; `tree_attention` with query ranges in one piece and
in parts; `tree_decode` with rows that decode and rows that are prefilled in one forward. Left out: more than one chunk of
logits, which differs on the host alone, and inputs of more than 2^31 elements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from cpo_kernels.linear_logprob import linear_logprob
from cpo_kernels.linear_logprob.results import OUTPUTS, LogprobResult
from cpo_kernels.linear_logprob.triton import PATHS, path_forced
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.tolerances import kernel_bound, random_subtree_end
from cpo_kernels.tree_attention import TreeSchedule, tree_attention, tree_schedule
from cpo_kernels.tree_decode import DecodePlan, tree_decode

LINE_ROWS = 331  # of attention; prime: several tiles of rows, none of them whole at the end
VOCAB_SIZE = 517  # a few vocabulary tiles and a ragged one; more would test time, not code
TARGETS_PER_ROW = 1.5  # up to a handful of targets a row, some repeated, some rows with none
MANY_ROWS, MEDIUM_ROWS, FEW_ROWS = (
    199,
    37,
    13,
)  # the fused product has a tile for up to 16 rows, one for up to 64, and one beyond
NUM_SEGMENTS = 7
ROOT_KEYS = 291  # of the node under all rows that decode: more than the 256 keys of one item
PREFILLED_ROWS = 70  # more than the 64 queries of one item
SUFFIX_STEP = 11  # the twelfth row has decoded 122 keys, more than one step of a merge
SEED = 20240613
FLOAT32_EPS = torch.finfo(torch.float32).eps

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModelShape:
    """What the kernels' code paths depend on."""

    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    hidden_size: int = 1024


def check_tree_attention(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """Error over bound of out, dq, dk and dv."""
    schedule = in_parts(tree_schedule(random_subtree_end(SEED, LINE_ROWS, num_padding=3))).to(device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    inputs = [
        _random((LINE_ROWS, count, shape.head_dim), device, shape.dtype, place) for place, count in enumerate(heads)
    ]

    def run(dtype: torch.dtype, impl: str) -> Results:
        q, k, v = (tensor.to(dtype).requires_grad_() for tensor in inputs[:3])
        out = tree_attention(q, k, v, schedule.subtree_end, schedule=schedule, impl=impl)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    q, k, v, upstream = (float(tensor.double().norm(dim=-1).max()) for tensor in inputs)
    # float32 accumulators err too; dq and dk are sums of (dp - delta) k, whose terms cancel, in a lone row to nothing
    product = shape.head_dim**-0.5 * upstream * v
    sizes = {"out": v, "dq": product * k, "dk": product * q, "dv": upstream}
    return _excess(run, shape.dtype, {name: 8 * FLOAT32_EPS * size for name, size in sizes.items()})


def in_parts(schedule: TreeSchedule) -> TreeSchedule:
    """The same schedule with the query range of every second key block cut at its query blocks.

    A range is cut by itself where thousands of rows see a block, as they do a prompt, which is too long a line for a
    check. The schedule is on the CPU.
    """
    work: list[tuple[int, int, int, int]] = []  # block, start, stop, part
    split_block, split_offsets = [], [0]
    ranges = zip(schedule.kv_query_start.tolist(), schedule.kv_query_stop.tolist(), strict=True)
    for block, (start, stop) in enumerate(ranges):
        starts = list(range(start, stop, schedule.block_q if block % 2 == 0 else stop - start))
        first_part = split_offsets[-1]
        for place, (piece, piece_stop) in enumerate(zip(starts, [*starts[1:], stop], strict=True)):
            work.append((block, piece, piece_stop, first_part + place if len(starts) > 1 else -1))
        if len(starts) > 1:
            split_block.append(block)
            split_offsets.append(first_part + len(starts))
    columns = zip(("work_block", "work_start", "work_stop", "work_part"), zip(*work, strict=True), strict=True)
    tensors = {name: torch.tensor(column, dtype=torch.int32) for name, column in columns}
    tensors["split_block"] = torch.tensor(split_block, dtype=torch.int32)
    tensors["split_offsets"] = torch.tensor(split_offsets, dtype=torch.int32)
    return replace(schedule, num_parts=split_offsets[-1], **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class HeadCase:
    """One head and a number of rows through `linear_logprob`."""

    name: str
    num_rows: int
    transformed: bool = False  # a bias, a soft-cap, a scale and a temperature
    trained: bool = False  # the head takes a gradient
    outputs: bool = True  # asked where a gradient is taken; where none is, the other way round


def head_cases() -> Sequence[HeadCase]:
    """Every variant of a kernel that differs in code."""
    return (
        HeadCase("frozen head", MANY_ROWS),
        HeadCase("fewer rows", MEDIUM_ROWS, outputs=False),
        HeadCase("soft-cap and bias", MEDIUM_ROWS, transformed=True),
        HeadCase("trained head", FEW_ROWS, trained=True, outputs=False),
        HeadCase("trained head, soft-cap and bias", MEDIUM_ROWS, transformed=True, trained=True),
    )


def check_linear_logprob(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """Error over bound of log-probs with a gradient and without one by both paths, of outputs, and of gradients.

    The first head that has something outside the bound is the last.
    """
    ratios: dict[str, float] = {}
    for case in head_cases():
        ratios |= {f"{name} ({case.name})": value for name, value in _check_head(case, device, shape).items()}
        if not all(value <= 1 for value in ratios.values()):
            break
    return ratios


def _check_head(case: HeadCase, device: torch.device, shape: ModelShape) -> dict[str, float]:
    hidden, ref_hidden = (_random((case.num_rows, shape.hidden_size), device, shape.dtype, place) for place in (4, 5))
    weight = _random((VOCAB_SIZE, shape.hidden_size), device, shape.dtype, 6, shape.hidden_size**-0.5)
    bias = _random((VOCAB_SIZE,), device, shape.dtype, 7) if case.transformed else None
    options = {"logit_scale": -1.3, "softcap": 4.0, "temperature": 0.8} if case.transformed else {}
    products = hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    plan, clear = _targets(products.cpu() * options.get("logit_scale", 1.0))
    plan, clear = plan.to(device), clear.to(device)
    upstream = _random(tuple(plan.rows.shape), device, torch.float32, 8)

    def outputs_of(result: LogprobResult, path: str) -> Results:
        assert result.entropy is not None
        assert result.mean_logit is not None
        assert result.is_top1 is not None
        top = (result.is_top1 & clear).float()
        return {f"entropy{path}": result.entropy, f"mean logit{path}": result.mean_logit, f"top-1{path}": top}

    def run(dtype: torch.dtype, impl: str) -> Results:
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(case.trained)]
        if bias is not None:
            leaves.append(bias.to(dtype).requires_grad_(case.trained))

        def score(asked: bool, ref: torch.Tensor | None = None) -> LogprobResult:
            some_bias = leaves[2] if bias is not None else None
            outputs = OUTPUTS if asked else ()
            return linear_logprob(
                leaves[0], leaves[1], plan, ref, bias=some_bias, outputs=outputs, impl=impl, **options
            )

        result = score(case.outputs, ref_hidden.to(dtype))
        assert result.ref_token_logps is not None
        logps, wanted = result.token_logps, leaves if case.trained else leaves[:1]
        gradients = torch.autograd.grad(logps, wanted, upstream.to(logps.dtype))
        found = dict(zip(("gradient", "weight gradient", "bias gradient"), gradients, strict=False))
        found |= {"log-probs": logps.detach(), "reference log-probs": result.ref_token_logps}
        found |= {"segment sums": result.segment_logps.detach()} | (outputs_of(result, "") if case.outputs else {})
        for path in PATHS:
            with path_forced(path), torch.no_grad():
                result = score(not case.outputs)
            found[f"log-probs, path {path}"] = result.token_logps
            found |= {} if case.outputs else outputs_of(result, f", path {path}")
        return found

    # a logit of size L is rounded by eps L: that much in a log-prob, and as a factor in a gradient
    logit_error = FLOAT32_EPS * float(products.abs().max())
    gradient_error = logit_error * float(upstream.abs().max())
    bands = {
        "segment sums": logit_error * plan.rows.shape[0] / NUM_SEGMENTS,
        "gradient": gradient_error,
        "weight gradient": gradient_error * float(hidden.abs().max()),
        "bias gradient": gradient_error,
    }
    bands |= {f"top-1{path}": 0.5 for path in ("", *(f", path {path}" for path in PATHS))}  # right, or off by 1
    # eager multiplies float32 copies where a head is trained; 16-bit operands bring one more rounding of that size
    allowance = 2.0 if case.trained and shape.dtype != torch.float32 else 1.0
    return _excess(run, shape.dtype, bands, logit_error, allowance)


def _targets(logits: torch.Tensor) -> tuple[LogprobPlan, torch.Tensor]:
    """A plan over logits [R, V], and of each token whether it is beyond rounding that it has the largest or has not."""
    num_rows, num_targets = logits.shape[0], int(TARGETS_PER_ROW * logits.shape[0])
    generator = torch.Generator().manual_seed(SEED)
    rows, targets = (torch.randint(high, (num_targets,), generator=generator) for high in (num_rows, VOCAB_SIZE))
    largest, best = logits.topk(2, dim=1)
    targets = torch.where(rows % 3 == 0, best[rows, 0], targets)  # random ones hardly ever have it
    clear = largest[:, 0] - largest[:, 1] > 1e-3
    return LogprobPlan.build(rows, targets, torch.arange(num_targets) % NUM_SEGMENTS, NUM_SEGMENTS), clear[rows]


def check_tree_decode(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """Error over bound of the output, and of the keys and values that were stored."""
    plan, num_arena_rows, unseen = _frontier()
    plan = plan.to(device)
    num_rows, num_kv_heads = len(plan.slots), shape.num_kv_heads
    q, k_new, v_new = (
        _random((num_rows, count, shape.head_dim), device, shape.dtype, 9 + place)
        for place, count in enumerate((shape.num_heads, num_kv_heads, num_kv_heads))
    )
    arenas = [
        _random((num_arena_rows, num_kv_heads, shape.head_dim), device, shape.dtype, 12 + place) for place in (0, 1)
    ]
    for arena in arenas:
        arena[unseen.to(device)] = float("nan")  # a key too many shows, and one that was not stored

    def run(dtype: torch.dtype, impl: str) -> Results:
        k_arena, v_arena = (arena.to(dtype, copy=True) for arena in arenas)
        out = tree_decode(q.to(dtype), k_new.to(dtype), v_new.to(dtype), k_arena, v_arena, plan, impl=impl)
        return {"out": out, "stored keys": k_arena[plan.slots], "stored values": v_arena[plan.slots]}

    largest = max(float(x.double().norm(dim=-1).nan_to_num().max()) for x in (v_new, arenas[1]))
    return _excess(run, shape.dtype, {"out": 8 * FLOAT32_EPS * largest})


def _frontier() -> tuple[DecodePlan, int, torch.Tensor]:
    """Nine rows that decode under one node and three under another, both below a root; then a node that is prefilled.

    Returns:
        The plan, the number of arena rows, and which of them hold nothing that is read before the call, [C] bool.
    """
    nodes, end = [], 0
    for length in (ROOT_KEYS, 37, 1, PREFILLED_ROWS):
        nodes.append((end + 3, length))
        end += 3 + length
    root, left, right, prefilled = nodes
    lengths = [1 + SUFFIX_STEP * row for row in range(12)]
    starts = [end + 2 * row + sum(lengths[:row]) for row in range(12)]
    items = [
        (0, 12, *root, root[1]),
        (0, 9, *left, left[1]),
        (9, 3, *right, right[1]),
        (12, PREFILLED_ROWS, *root, root[1]),
        (12, PREFILLED_ROWS, *prefilled, 1),
    ]
    slots = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
    slots += range(prefilled[0], prefilled[0] + PREFILLED_ROWS)
    nothing = [0] * PREFILLED_ROWS
    plan = DecodePlan.build(slots, items, starts + nothing, lengths + nothing)
    unseen = torch.ones(starts[-1] + lengths[-1] + 2, dtype=torch.bool)
    for start, length in (*nodes, *zip(starts, lengths, strict=True)):
        unseen[start : start + length] = False
    unseen[slots] = True
    return plan, len(unseen), unseen


def _excess(
    run: Callable[[torch.dtype, str], Results],
    dtype: torch.dtype,
    bands: dict[str, float],
    other_band: float = 0.0,
    allowance: float = 1.0,
) -> dict[str, float]:
    """Error of every result over what is allowed; gradients are allowed `allowance` times as much."""
    exact, eager, kernel = run(torch.float64, "eager"), run(dtype, "eager"), run(dtype, "triton")
    ratios = {}
    for name, result in kernel.items():
        want = exact[name].double()
        eager_error, error = (float((given[name].double() - want).abs().max()) for given in (eager, kernel))
        bound = kernel_bound(eager_error, result.dtype, float(want.abs().max()))
        ratios[name] = error / (bound * (allowance if "gradient" in name else 1.0) + bands.get(name, other_band))
    return ratios


def _random(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, place: int, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + place)  # on the CPU: the same numbers on every device
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)
