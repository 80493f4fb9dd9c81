"""Attention of a TRL tree-packed row: ours, that gathers nothing, against TRL's formula by three kernels.

TRL's AsyncGRPO gathers keys and values along the root-to-segment path of every segment, in every layer, for one call of
FlashAttention 3 (Hopper only). The same gathering runs here with SDPA, a path at a time, anywhere; with flash-attn where
the extra `cpo-fast[flash]` is installed; and by TRL's own function where its kernel can be had. Rows are packed by TRL.
Output and gradients of every contestant are first compared with TRL's definition in float64, all heads and rows; if ours
is inexact nothing is timed or printed.

    python -m benchmarks.trl_tree [--set cpu|gpu|tiny] [--rows search,rollouts] [--heads 32x8x128]
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clock import MAX_RUNS, SECONDS_EACH, measure, peak_bytes, reason
from benchmarks.harness import Check, InexactError, Timing, gate, record, show
from benchmarks.workload import TINY, TreeShape, sequences_of, step_pairs
from cpo_kernels.integrations.trl_tree import subtree_end_of_row, tree_row_attention
from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_attention import tree_schedule
from cpo_kernels.tree_attention.flash import load_varlen

SETS = {  # tree shape; tokens of a rollout's prompt, number and turns of rollouts, tokens of a turn; heads; dtype
    "gpu": (TreeShape(), (1024, 16, 4, 256), ((32, 32, 128), (32, 8, 128)), torch.bfloat16),
    "cpu": (TreeShape(), (512, 8, 4, 64), ((8, 2, 64),), torch.float32),
    "tiny": (TINY, (12, 4, 2, 5), ((2, 1, 16),), torch.float32),
}
ROWS = ("search", "rollouts")
OURS, SDPA, FLASH, TRL = "ours", "gather, SDPA a path", "gather, flash-attn", "TRL as it ships, FlashAttention 3"
NAMES = (OURS, SDPA, FLASH, TRL)
RESULT_NAMES = ("out", "dq", "dk", "dv")
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Row:
    """A row as TRL packs it, and random heads that attend over it. T tokens, K gathered rows."""

    arguments: dict[str, Any]  # TRL's keyword arguments, on the device
    num_sequence_tokens: int
    q: torch.Tensor  # [1, H, T, D]
    k: torch.Tensor  # [1, G, T, D]
    v: torch.Tensor  # [1, G, T, D]
    upstream: torch.Tensor  # [1, T, H, D]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.q.shape[2]

    @property
    def num_gathered(self) -> int:
        """K."""
        return len(self.arguments["tree_kv_index"])

    def kv_bytes(self, num_rows: int) -> int:
        """Keys and values of so many rows in one layer."""
        return 2 * num_rows * self.k.shape[1] * self.k.shape[3] * self.k.element_size()


def sequences(name: str, size: str) -> list[list[int]]:
    """Token ids of the samples of a row: a search tree's chains, or rollouts of several turns that fork after some."""
    shape, (prompt, num_rollouts, num_turns, turn), _, _ = SETS[size]
    if name == "search":
        return sequences_of(step_pairs("questions", shape.num_levels * shape.num_rejected, shape))[0]
    if name != "rollouts":
        raise ValueError(f"row: expected one of {', '.join(ROWS)}, got {name!r}")
    generator = random.Random(0)

    def ids(count: int) -> list[int]:
        return [generator.randrange(10, shape.vocab_size) for _ in range(count)]

    found = [ids(prompt + num_turns * turn)]
    while len(found) < num_rollouts:
        kept = generator.randrange(num_turns)  # turns in common with a rollout before
        found.append(generator.choice(found)[: prompt + kept * turn] + ids((num_turns - kept) * turn))
    return found


def make_row(
    name: str, size: str, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Row:  # fmt: skip
    """TRL's row of these sequences, and random q, k, v and upstream gradient."""
    from trl.experimental.async_grpo.packing import TreeRow

    found, packer = sequences(name, size), TreeRow()
    for each in found:
        ids = torch.tensor(each)
        trained = torch.ones_like(ids)
        packer.add(
            {"input_ids": ids, "completion_mask": trained, "old_log_probs": trained, "advantage": 1.0, "group_id": 0}
        )
    packed = packer.pack()
    longest_segment, longest_path = packed["tree_max_seqlens"].tolist()
    tensors = {key: packed[key].to(device) for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    generator, num_rows = torch.Generator(device).manual_seed(0), len(packed["input_ids"])
    num_heads, num_kv_heads, head_dim = heads
    shapes = [(1, count, num_rows, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads)]
    shapes.append((1, num_rows, num_heads, head_dim))
    return Row(
        tensors | {"tree_max_seqlen_q": longest_segment, "tree_max_seqlen_k": longest_path},
        sum(map(len, found)),
        *(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes),
    )


def by_paths(row: Row, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """TRL's formula: gather, then `attend(q [1, H, n, D], k, v [1, G, m, D], mask [n, m])` for each segment."""
    bounds_q, bounds_k = (list(pairwise(row.arguments[f"tree_cu_seqlens_{x}"].tolist())) for x in "qk")
    index, device = row.arguments["tree_kv_index"], row.q.device
    masks = [
        torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=device).tril_((k1 - k0) - (q1 - q0))
        for (q0, q1), (k0, k1) in zip(bounds_q, bounds_k, strict=True)
    ]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.index_select(2, index), v.index_select(2, index)
        parts = [
            attend(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], mask)
            for (q0, q1), (k0, k1), mask in zip(bounds_q, bounds_k, masks, strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    return attention


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention with nothing left to a library."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ keys.transpose(2, 3)) * q.shape[3] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ values


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SDPA, without a mask where it has its own."""
    own = mask.shape[0] == mask.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if own else mask, is_causal=own, enable_gqa=q.shape[1] != k.shape[1]
    )


def build(name: str, row: Row) -> Callable[..., torch.Tensor]:
    """A contestant: q, k, v as Transformers has them -> [1, T, H, D].

    Raises:
        ImportError, ValueError: what it needs is not there.
    """
    layer: Any = SimpleNamespace(config=None, modules=lambda: iter([torch.nn.Linear(1, 1, dtype=row.q.dtype)]))
    if name == OURS:
        return lambda q, k, v: tree_row_attention(layer, q, k, v, None, **row.arguments)[0]
    if name == SDPA:
        return by_paths(row, by_sdpa)
    if not row.q.is_cuda:
        raise ValueError("runs on CUDA only")
    if name == TRL:
        from trl.experimental.async_grpo.packing import tree_attention

        return lambda q, k, v: tree_attention(layer, q, k, v, None, **row.arguments)[0]
    return by_varlen(row, load_varlen())


def by_varlen(row: Row, varlen: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """TRL's formula by one call of flash-attn's `flash_attn_varlen_func`, or a function of its signature."""
    index = row.arguments["tree_kv_index"]
    places = [row.arguments[key] for key in ("tree_cu_seqlens_q", "tree_cu_seqlens_k")]
    places += [row.arguments[key] for key in ("tree_max_seqlen_q", "tree_max_seqlen_k")]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
        return varlen(q, k.index_select(0, index), v.index_select(0, index), *places, causal=True).unsqueeze(0)

    return attention


def forward(attention: Callable[..., torch.Tensor], row: Row) -> torch.Tensor:
    """Output without gradient."""
    with torch.no_grad():
        return attention(row.q, row.k, row.v)


def both(attention: Callable[..., torch.Tensor], row: Row) -> Tensors:
    """Output and the gradients of q, k and v."""
    leaves = [tensor.detach().requires_grad_() for tensor in (row.q, row.k, row.v)]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, row.upstream.to(out.dtype))


def check(
    row: Row, where: str
) -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, dict[str, Any]], list[Check]]:
    """Contestants that run, errors of all, and the checks of ours."""
    double = Row(row.arguments, 0, *(x.double() for x in (row.q, row.k, row.v, row.upstream)))
    exact = both(by_paths(double, written_out), double)
    plain = both(by_paths(row, written_out), row)
    contestants, found, checks = {}, {}, []
    for name in NAMES:
        try:
            attention = build(name, row)
            results = both(attention, row)
        except Exception as error:  # a peer that breaks is a result
            if name == OURS:
                raise InexactError(f"nothing was measured: {name}, {where}: {reason(error)}") from error
            found[name] = {"failure": reason(error)}
            continue
        contestants[name] = attention
        found[name] = {"kept_bytes": kept_bytes(attention, row)}
        for part, got, eager, want in zip(RESULT_NAMES, results, plain, exact, strict=True):
            error = float((got.double() - want).abs().max())
            found[name][f"{part}_error"] = error
            if name == OURS:
                own = float((eager.double() - want).abs().max())
                bound = kernel_bound(own, row.q.dtype, float(want.abs().max()))
                checks.append(Check(f"{name}, {where}: {part}", error, bound))
    return contestants, found, checks


def kept_bytes(attention: Callable[..., torch.Tensor], row: Row) -> int:
    """What autograd keeps between forward and backward, each storage once and q, k and v not at all."""
    leaves = [tensor.detach().requires_grad_() for tensor in (row.q, row.k, row.v)]
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = attention(*leaves)  # keeps alive what was noted, so that no address is given twice
    del out
    return sum(kept.values())


def host_seconds(row: Row) -> float:
    """What ours does once a row for all layers, least of five: the index tensors are verified, the schedule is made."""
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    arrays = [row.arguments[name].long().cpu().numpy() for name in names]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tree_schedule(torch.from_numpy(subtree_end_of_row(*arrays, row.num_tokens)))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def time_row(
    row: Row,
    contestants: dict[str, Callable[..., torch.Tensor]],
    found: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row of results for every contestant and mode."""
    rows: list[dict[str, Any]] = [{"contestant": name, **e} for name, e in found.items() if "failure" in e]
    for mode, run in (("forward", forward), ("both", both)):
        variants = {
            name: (lambda attention=attention: run(attention, row))  # noqa: B023 (called before run changes)
            for name, attention in contestants.items()
        }
        timings = measure(variants, row.q.device, arguments.runs, arguments.seconds_each, arguments.deadline)
        for name, timing in timings.items():
            result: dict[str, Any] = {"contestant": name, "mode": mode, **found[name]}
            num_rows = row.num_tokens if name == OURS else row.num_gathered
            result |= {"kv_rows": num_rows, "kv_bytes": row.kv_bytes(num_rows)}
            if isinstance(timing, Timing):
                result |= {"seconds": timing.median, "least": timing.quantile(0.0), "num_runs": len(timing.seconds)}
                result["peak_bytes"] = peak_bytes(variants[name], row.q.device)
            else:
                result["failure"] = timing
            rows.append(result)
    return rows


def show_row(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of one row, what could not run below it."""
    ours = {row["mode"]: row for row in rows if row["contestant"] == OURS and "seconds" in row}
    lines = []
    for row in [row for row in rows if "failure" not in row]:
        base = ours.get(row["mode"])
        lines.append(
            [row["contestant"], "forward" if row["mode"] == "forward" else "forward + backward"]
            + [f"{row['kv_rows']:,}", f"{row['kv_bytes'] / 2**20:.1f}"]
            + [f"{row['least'] * 1e3:.2f}", f"{row['seconds'] * 1e3:.2f}"]
            + [f"{row['least'] / base['least']:.2f}" if base else "-", f"{row['kept_bytes'] / 2**20:.1f}"]
            + [f"{row['peak_bytes'] / 2**20:.1f}"]
            + [f"{row[f'{part}_error']:.1e}" for part in RESULT_NAMES]
        )
    columns = ["contestant", "mode", "K/V rows", "K/V MiB a layer", "least ms", "median ms", "x ours"]
    columns += ["kept MiB", "peak MiB"]
    columns += [f"{part} err" for part in RESULT_NAMES]
    caption = (
        "K/V: what attention reads; a gathered copy is made beside the rows. x ours: by the least. kept: for backward, "
        "beside q, k and v. Errors against float64."
    )
    failed = [f"{row['contestant']}: {row['failure']}" for row in rows if "failure" in row]
    show(title, columns, lines, "\n".join([caption, *failed]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--set", choices=sorted(SETS), help="sizes; default by device")
    parser.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas")
    parser.add_argument("--heads", help="query heads x key heads x head size, such as 32x8x128")
    parser.add_argument("--runs", type=int, default=MAX_RUNS, help="timed runs of a variant, at most")
    parser.add_argument("--seconds-each", type=float, default=SECONDS_EACH, help="after this a variant drops out")
    parser.add_argument("--max-seconds", type=float, default=480, help="no further row is started after this")
    parser.add_argument("--no-record", action="store_true", help="show only")
    arguments = parser.parse_args(argv)
    arguments.set = arguments.set or ("gpu" if arguments.device.type == "cuda" else "cpu")
    *_, arguments.shapes, arguments.dtype = SETS[arguments.set]
    if arguments.heads:
        arguments.shapes = tuple(tuple(int(x) for x in item.split("x")) for item in arguments.heads.split(","))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, record and show row by row; 1 when ours is inexact."""
    arguments = parse(argv)
    arguments.deadline = time.monotonic() + arguments.max_seconds
    command = " ".join(["python -m benchmarks.trl_tree", *(sys.argv[1:] if argv is None else argv)])
    for name, heads in [(name, heads) for heads in arguments.shapes for name in arguments.rows.split(",")]:
        if time.monotonic() > arguments.deadline:
            sys.stderr.write(f"left out after {arguments.max_seconds:.0f} s: {name}, heads {heads}\n")
            continue
        row = make_row(name, arguments.set, heads, arguments.dtype, arguments.device)
        try:
            contestants, found, checks = check(row, f"{name}, heads {heads}")
            gate(checks)
        except InexactError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        rows, host = time_row(row, contestants, found, arguments), host_seconds(row)
        facts = {"row": name, "heads": heads, "dtype": str(arguments.dtype), "num_tokens": row.num_tokens}
        facts |= {
            "num_sequence_tokens": row.num_sequence_tokens,
            "num_gathered": row.num_gathered,
            "host_seconds": host,
        }
        if not arguments.no_record:
            record("trl_tree", command, checks, facts | {"rows": rows})
        show_row(
            f"{name}: {row.num_tokens:,} tokens for {row.num_sequence_tokens:,} of the samples, {row.num_gathered:,} rows "
            f"to gather ({row.num_gathered / row.num_tokens:.1f} x); H {heads[0]}, G {heads[1]}, D {heads[2]}, "
            f"{str(arguments.dtype).removeprefix('torch.')}; ours once a row on the host: {host * 1e3:.2f} ms",
            rows,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
