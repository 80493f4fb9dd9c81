"""Tree attention without a T x T matrix, in plain torch: one contiguous slice of queries per run of keys.

Rows [a, b) of one branchless run are seen by exactly the rows [a, end): by those in [a, b) causally, by the rest fully.
Both ranges are slices of the forest's rows, so nothing is gathered, copied or masked away, and the work is exactly the
visible pairs plus half a square on each diagonal. The softmax is merged over runs online (running maximum and sum). The
backward recomputes the probabilities from the saved log-sum-exp and walks the same slices. Runs are visited in one fixed
order, so the result is bitwise repeatable. float32 accumulators (float64 for float64 inputs).
"""

import functools
from typing import Any, NamedTuple

import torch

from cpo_kernels.device import accumulation_dtype, to_device
from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.window import Window, sink_gradient

BLOCK_KEYS = 256  # at most, of one run: the prompt, the longest run, is a few hundred tokens
MAX_RUN_SCORES = 1 << 24  # scores held at once over all heads: 64 MiB in float32


class KeyRun(NamedTuple):
    """Keys [key_start, key_stop) of one branchless run against queries [query_start, query_stop) of its subtree."""

    key_start: int
    key_stop: int
    query_start: int
    query_stop: int


class KeyRuns(NamedTuple):
    """The runs of a forest in visiting order, and the rows that see and are seen by nothing but themselves."""

    runs: list[KeyRun]
    isolated: torch.Tensor  # int64, on the device of q


def key_runs(schedule: TreeSchedule, num_heads: int, device: torch.device) -> KeyRuns:
    """What a schedule says about runs, cut to size on the host and kept with it for all layers of a step."""
    key = ("eager", num_heads, device)
    if key not in schedule.host_derived:
        starts, stops, ends = schedule.host_segment_start, schedule.host_segment_stop, schedule.host_segment_end
        runs, isolated = _cut(starts.tolist(), stops.tolist(), ends.tolist(), num_heads)
        schedule.host_derived[key] = KeyRuns(runs, to_device(torch.tensor(isolated, dtype=torch.int64), device))
    derived: KeyRuns = schedule.host_derived[key]
    return derived


def _cut(starts: list[int], stops: list[int], ends: list[int], num_heads: int) -> tuple[list[KeyRun], list[int]]:
    """Runs (rows [start, stop), subtree ending at end, ascending) cut to bounded size, and isolated rows."""
    runs: list[KeyRun] = []
    isolated: list[int] = []
    covered = 0  # rows before it lie in the subtree of an earlier run
    for start, stop, end in zip(starts, stops, ends, strict=True):
        if start >= covered and end == start + 1:
            isolated.append(start)  # a root without children: every padding row is one
            continue
        covered = max(covered, end)
        for key_start in range(start, stop, BLOCK_KEYS):
            key_stop = min(key_start + BLOCK_KEYS, stop)
            step = max(BLOCK_KEYS, MAX_RUN_SCORES // (num_heads * (key_stop - key_start)))
            for query_start in range(key_start, end, step):
                runs.append(KeyRun(key_start, key_stop, query_start, min(query_start + step, end)))
    return runs, isolated


class EagerTreeAttention(torch.autograd.Function):
    """Forward and backward over `KeyRuns`: q [T, H, D], k and v [T, Hkv, D], out [T, H, D] in the dtype of q."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: KeyRuns,
        scale: float,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,  # [H]
    ) -> torch.Tensor:
        grouped_q, grouped_k, grouped_v = (_grouped(x, k.shape[1]) for x in (q, k, v))
        grouped_q = grouped_q * scale  # once per query rather than once per score
        out = torch.zeros_like(grouped_q)  # [Hkv, G, T, D]
        maximum = torch.full(grouped_q.shape[:3], float("-inf"), dtype=out.dtype, device=out.device)  # [Hkv, G, T]
        total = torch.zeros_like(maximum)
        for run in plan.runs:
            queries, keys = slice(run.query_start, run.query_stop), slice(run.key_start, run.key_stop)
            scores = _scores(grouped_q, grouped_k, run, window, softcap)  # [Hkv, G, nq, nk]
            if scores is None:
                continue
            new_maximum = torch.maximum(maximum[:, :, queries], scores.amax(dim=-1))
            # a window may hide all that a query has met so far
            shift = new_maximum if window is None else new_maximum.masked_fill(new_maximum.isneginf(), 0.0)
            weights = torch.exp_(scores.sub_(shift.unsqueeze(-1)))
            decay = torch.exp(maximum[:, :, queries] - shift)
            maximum[:, :, queries] = new_maximum
            total[:, :, queries] = total[:, :, queries] * decay + weights.sum(dim=-1)
            out[:, :, queries] = out[:, :, queries] * decay.unsqueeze(-1) + weights @ grouped_v[:, :, keys]
        if plan.isolated.numel() > 0:
            rows = plan.isolated
            out[:, :, rows] = grouped_v[:, :, rows].expand(-1, out.shape[1], -1, -1)
            own = 0.0 if sinks is None else _own_scores(grouped_q, grouped_k, rows, softcap)
            maximum[:, :, rows], total[:, :, rows] = own, 1.0
        out /= total.unsqueeze(-1)
        log_sum_exp = maximum + total.log()
        if sinks is not None:
            joined = torch.logaddexp(log_sum_exp, _by_group(sinks, out))
            out *= torch.exp(log_sum_exp - joined).unsqueeze(-1)
            log_sum_exp = joined
        result = _ungrouped(out, q.dtype)
        ctx.save_for_backward(q, k, v, result, log_sum_exp, sinks)
        ctx.plan, ctx.scale, ctx.window, ctx.softcap = plan, scale, window, softcap
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dq, dk, dv over the same runs: p = exp(s - lse), ds = p * (dp - sum(dout * out)). The scale sits in q.

        A soft-cap multiplies ds by its slope 1 - (s / c)^2. `sink_gradient` says what the sinks get.
        """
        q, k, v, out, log_sum_exp, sinks = ctx.saved_tensors
        num_kv_heads = k.shape[1]
        grouped_q, grouped_k, grouped_v = (_grouped(x, num_kv_heads) for x in (q, k, v))
        grouped_q = grouped_q * ctx.scale
        grad_out = _grouped(grad_outputs[0], num_kv_heads)
        delta = (grad_out * _grouped(out, num_kv_heads)).sum(dim=-1, keepdim=True)  # [Hkv, G, T, 1]
        wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (grouped_q, grouped_k, grouped_v))
        for run in ctx.plan.runs:
            queries, keys = slice(run.query_start, run.query_stop), slice(run.key_start, run.key_stop)
            scores = _scores(grouped_q, grouped_k, run, ctx.window, ctx.softcap)
            if scores is None:
                continue
            slope = None if ctx.softcap is None else _slope(scores, ctx.softcap)
            weights = torch.exp_(scores.sub_(log_sum_exp[:, :, queries].unsqueeze(-1)))
            run_grad = grad_out[:, :, queries]
            if wants_v:
                grad_v[:, 0, keys] += _fold(weights).transpose(1, 2) @ _fold(run_grad)
            if not (wants_q or wants_k):
                continue
            grad_scores = (run_grad @ grouped_v[:, :, keys].transpose(2, 3)).sub_(delta[:, :, queries])
            grad_scores.mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            if wants_q:
                grad_q[:, :, queries] += grad_scores @ grouped_k[:, :, keys]
            if wants_k:
                grad_k[:, 0, keys] += _fold(grad_scores).transpose(1, 2) @ _fold(grouped_q[:, :, queries])
        if ctx.plan.isolated.numel() > 0:
            rows = ctx.plan.isolated
            if sinks is None:  # the softmax of one score is one
                grad_v[:, 0, rows] = grad_out[:, :, rows].sum(dim=1)
            else:
                own = _own_scores(grouped_q, grouped_k, rows, ctx.softcap)
                weights = torch.exp(own - log_sum_exp[:, :, rows]).unsqueeze(-1)  # [Hkv, G, N, 1]
                run_grad = grad_out[:, :, rows]
                grad_v[:, 0, rows] = (weights * run_grad).sum(dim=1)
                grad_scores = weights * ((run_grad * grouped_v[:, :, rows]).sum(-1, keepdim=True) - delta[:, :, rows])
                if ctx.softcap is not None:
                    grad_scores = grad_scores * _slope(own, ctx.softcap).unsqueeze(-1)
                grad_q[:, :, rows] = grad_scores * grouped_k[:, :, rows]
                grad_k[:, 0, rows] = (grad_scores * grouped_q[:, :, rows]).sum(dim=1)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[7]:
            rows = log_sum_exp.flatten(0, 1), delta.flatten(0, 1).squeeze(-1)
            grad_sinks = sink_gradient(sinks, *rows, grad_outputs[0])
        return (
            _ungrouped(grad_q.mul_(ctx.scale), q.dtype) if wants_q else None,
            _ungrouped(grad_k, k.dtype) if wants_k else None,
            _ungrouped(grad_v, v.dtype) if wants_v else None,
            None,
            None,
            None,
            None,
            grad_sinks,
        )


def _scores(
    grouped_q: torch.Tensor, grouped_k: torch.Tensor, run: KeyRun, window: Window | None, softcap: float | None
) -> torch.Tensor | None:
    """Scores [Hkv, G, nq, nk] of a run, -inf where a query does not see a key. None: a window hides all of them."""
    too_far = None
    if window is not None:
        too_far = window.hides(slice(run.query_start, run.query_stop), slice(run.key_start, run.key_stop))
        if bool(too_far.all()):
            return None
    queries = grouped_q[:, :, run.query_start : run.query_stop]
    scores = _capped(queries @ grouped_k[:, :, run.key_start : run.key_stop].transpose(2, 3), softcap)
    if run.query_start < run.key_stop:  # the diagonal: these queries see the run only up to themselves
        first = run.query_start - run.key_start
        height, width = min(run.query_stop, run.key_stop) - run.query_start, run.key_stop - run.key_start
        hidden = _later_keys(scores.device)[first : first + height, :width]
        scores[:, :, :height].masked_fill_(hidden, float("-inf"))
    if too_far is not None:
        scores.masked_fill_(too_far, float("-inf"))
    return scores


def _own_scores(
    grouped_q: torch.Tensor, grouped_k: torch.Tensor, rows: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """[Hkv, G, N], the score of each row on its own key."""
    return _capped((grouped_q[:, :, rows] * grouped_k[:, :, rows]).sum(dim=-1), softcap)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _slope(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Derivative of the soft-cap, from capped scores; 0 where a score is hidden."""
    return 1 - (scores.clamp(min=-softcap) / softcap).square_()


def _by_group(sinks: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return sinks.to(out.dtype).reshape(*out.shape[:2], 1)  # [Hkv, G, 1]


@functools.cache
def _later_keys(device: torch.device) -> torch.Tensor:
    """[BLOCK_KEYS, BLOCK_KEYS] bool, True where a key of a run stands after the query. Masks are its slices."""
    return torch.ones(BLOCK_KEYS, BLOCK_KEYS, dtype=torch.bool, device=device).triu_(1)


def _grouped(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    rows, heads, head_dim = x.shape
    grouped = x.reshape(rows, num_kv_heads, heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
    return grouped.to(accumulation_dtype(x.dtype)).contiguous()  # [Hkv, G, T, D]


def _ungrouped(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    num_kv_heads, group, rows, head_dim = x.shape
    return x.permute(2, 0, 1, 3).reshape(rows, num_kv_heads * group, head_dim).to(dtype)


def _fold(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])  # [Hkv, G * nq, .]
