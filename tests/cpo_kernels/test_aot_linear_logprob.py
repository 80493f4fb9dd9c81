"""Every Triton kernel of linear_logprob, as calls launch it, compiles for compute capability 8.0 and 9.0 and is read.

No GPU is needed. What would fail or crawl at the first launch fails here: shared memory above the card's limit, spilled
registers, a product without the card's matrix instructions or with more of them than it needs, fewer blocks a
multiprocessor than hide the latency of memory, and logits that are read or written less than 16 bytes at a time.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cpo_kernels.linear_logprob import chunk_size
from cpo_kernels.linear_logprob.results import OUTPUTS, Head
from cpo_kernels.logprob_plan import LogprobPlan
from tests.cpo_kernels.aot import Compiled, assert_fits, assert_matrix_instructions
from tests.cpo_kernels.kernel_device import not_interpreted
from tests.cpo_kernels.launches import Launch, launches
from tests.cpo_kernels.machine_code import (
    Reach,
    assert_reaches,
    disassembled,
    global_accesses,
    machine_code,
    resident_blocks,
)

pytestmark = not_interpreted

MAX_STACK_BYTES = 16  # four registers a thread: the assembler parks that many to reach the next step of occupancy
LEAST_BLOCKS = 8  # of what is bound by memory, on one multiprocessor: see PROGRAMS_AN_SM in `triton_chunked`
META = torch.device("meta")
VOCABS = (32000, 32001, 128256)


@dataclass(frozen=True)
class Call:
    """A pass over a head, with its backward if there is one."""

    mode: str  # see `results`; "chunk" and "fused" are the two paths of rows without a gradient
    dtype: torch.dtype = torch.bfloat16
    transformed: bool = False  # a bias and a soft-cap
    outputs: bool = False
    vocab: int = 32000
    width: int = 4096
    num_rows: int = 2048

    def launched(self) -> list[Launch]:
        """The kernels, on tensors without data."""
        from cpo_kernels.linear_logprob import triton as kernels

        hidden, weight, upstream = (
            torch.empty(shape, dtype=dtype, device=META)
            for shape, dtype in (
                ((self.num_rows, self.width), self.dtype),
                ((self.vocab, self.width), self.dtype),
                ((self.num_rows,), torch.float32),
            )
        )
        bias = torch.empty(self.vocab, dtype=self.dtype, device=META) if self.transformed else None
        head = Head(weight, bias, softcap=30.0 if self.transformed else None)
        rows = torch.arange(self.num_rows)
        plan = LogprobPlan.build(rows, rows, torch.zeros_like(rows), 1).to(META)
        mode, path = ("none", self.mode) if self.mode in kernels.PATHS else (self.mode, None)

        def step() -> None:
            scores = kernels.score(hidden, head, plan, OUTPUTS if self.outputs else (), mode, path)
            if mode == "expected":
                kernels.row_gradients(upstream, scores, plan)
            elif mode == "recompute":
                kernels.head_gradients(upstream, scores, hidden, head, plan, (True, True, self.transformed))

        return launches(step)

    def binaries(self, arch: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Compiled]]:
        """Each kernel by its name, once for all launches that are specialised alike."""
        from cpo_kernels.linear_logprob import triton_fused

        monkeypatch.setattr(triton_fused, "architecture", lambda device: f"sm{arch}")
        return list(dict.fromkeys((launch.name, launch.compiled(arch)) for launch in self.launched()))


DTYPES = (torch.bfloat16, torch.float32)
STORED = [  # through stored logits: frozen and trained heads
    *(Call("expected", dtype, transformed) for dtype in DTYPES for transformed in (False, True)),
    *(Call("recompute", dtype, transformed) for dtype in DTYPES for transformed in (False, True)),
    Call("expected", outputs=True),
    Call("expected", outputs=True, transformed=True),
]
MEMORY_BOUND = {
    "_take_targets", "_logit_partials", "_conditional", "_merge", "_target_logits", "_row_gradients",
    "_product_gradients", "_put_targets",
}  # fmt: skip
GATED = {*MEMORY_BOUND, "_product_partials"}


def assert_hides_latency(name: str, binary: Compiled) -> None:
    """Fail unless a kernel that is bound by memory fits, spills in no loop, and has blocks enough on a multiprocessor."""
    assert_fits(binary, binary.arch, MAX_STACK_BYTES)
    assert binary.stack_bytes == 0 or machine_code(binary).inner_spills == 0, name
    blocks = resident_blocks(binary.arch, binary.registers, binary.shared_bytes, binary.num_warps)
    assert blocks >= LEAST_BLOCKS, f"{name}: {blocks} blocks a multiprocessor"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("call", STORED, ids=str)
def test_kernels_of_stored_logits_fit_the_card(call: Call, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = call.binaries(arch, monkeypatch)
    last = {"expected": ["_conditional", "_row_gradients"], "recompute": ["_product_gradients", "_put_targets"]}
    assert [name for name, _ in binaries] == ["_take_targets", "_logit_partials", "_merge", *last[call.mode]]
    for name, binary in binaries:
        assert_hides_latency(name, binary)


# Accesses that are narrower, of numbers by row: (loads, stores).
SCALARS = {"_logit_partials": (0, 2), "_conditional": (2, 0), "_product_gradients": (4, 0)}


def assert_wide(name: str, binary: Compiled) -> None:
    """Fail unless a kernel reads and writes a chunk 16 bytes at a time."""
    accesses = global_accesses(disassembled(binary))
    narrow = {name: sum(n for access, n in accesses.items() if access[:3] == name and access[3:] != ".128")
              for name in ("LDG", "STG")}  # fmt: skip
    assert (narrow["LDG"], narrow["STG"]) == SCALARS[name], f"{name}: {dict(accesses)}"
    assert accesses["LDG.128"] >= 2, f"{name}: {dict(accesses)}"  # 8 logits a thread


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "transformed"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
@pytest.mark.parametrize("mode", ["expected", "recompute"])
def test_chunks_of_any_vocabulary_are_read_and_written_16_bytes_at_a_time(
    mode: str, dtype: torch.dtype, transformed: bool, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one binary for all of them, so that the self-check's vocabulary stands for a model's."""
    found = {vocab: Call(mode, dtype, transformed, vocab=vocab).binaries(arch, monkeypatch) for vocab in VOCABS}
    wide = [(name, binary) for name, binary in found[VOCABS[0]] if name in SCALARS]
    assert len(wide) == 2
    for name, binary in wide:
        assert_wide(name, binary)
    assert found[32000] == found[32001] == found[128256]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("mode", ["expected", "recompute"])
def test_rows_that_begin_anywhere_fail(mode: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate sees what it is there for."""
    from cpo_kernels.linear_logprob import triton_chunked

    monkeypatch.setattr(triton_chunked, "row_stride", lambda vocab: vocab)
    for vocab in (32000, 32001):
        for name, binary in Call(mode, vocab=vocab).binaries(arch, monkeypatch):
            if name in SCALARS and vocab == 32001:
                with pytest.raises(AssertionError, match=name):
                    assert_wide(name, binary)
            elif name in SCALARS:
                assert_wide(name, binary)


# Of the fused product by dtype and rows of a tile: share of the matrix peak, blocks a multiprocessor, registers a thread.
# 16 rows are bound by reading the weight. A plain head without outputs on 9.0 has a second block: see PLAIN_REGISTERS.
REACH = {
    (torch.bfloat16, 16): {80: Reach(66, 2, 128), 90: Reach(33, 4, 128)},
    (torch.bfloat16, 64): {80: Reach(100, 2, 248), 90: Reach(100, 3, 168)},
    (torch.bfloat16, 128): {80: Reach(100, 1, 248), 90: Reach(100, 1, 176)},
    (torch.float32, 16): {80: Reach(0, 4, 128), 90: Reach(0, 4, 128)},
    (torch.float32, 64): {80: Reach(0, 2, 128), 90: Reach(0, 2, 128)},
}
PLAIN_REACH = Reach(100, 2, 128)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("width", "outputs", "transformed"),
    [(4096, False, False), (4096, True, True), (576, False, False), (576, True, False)],
)
@pytest.mark.parametrize(("dtype", "block_r"), REACH, ids=str)
def test_fused_products_reach_what_is_written(
    dtype: torch.dtype, block_r: int, width: int, outputs: bool, transformed: bool, arch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    call = Call("fused", dtype, transformed, outputs, 32001, width, block_r - 3)
    (product, binary), *others = call.binaries(arch, monkeypatch)
    assert product == "_product_partials"
    assert {name for name, _ in others} == {"_target_logits", "_merge"}
    for name, other in others:
        assert_hides_latency(name, other)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    hopper = arch == 90 and block_r >= 64  # a smaller tile has no warp-group product
    exact = dtype == torch.float32
    assert_matrix_instructions(binary, hopper and not exact, not hopper and not exact)
    plain = arch == 90 and block_r == 128 and not outputs and not transformed
    a_pass = width if width == 576 else 64  # elements of E: the compiler unrolls what is short
    flops = 0 if exact else 2 * block_r * 128 * a_pass
    assert_reaches(binary, PLAIN_REACH if plain else REACH[dtype, block_r][arch], flops)
    assert exact or machine_code(binary).share(flops) <= 1


def test_a_step_reads_the_weight_as_seldom_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card of 80 GB. One `_take_targets` a chunk, of as many programs as it has rows."""

    def chunks(call: Call) -> list[int]:
        return [launch.grid[0] for launch in call.launched() if launch.name == "_take_targets"]

    monkeypatch.setattr(chunk_size, "CPU_LOGITS", chunk_size.logits_that_fit(60 << 30, 79 << 30))  # of "meta" too
    assert chunks(Call("expected", vocab=128256)) == [1024, 1024]
    assert chunks(Call("expected", vocab=128256, num_rows=1300)) == [768, 532]
    assert chunks(Call("chunk", vocab=32001, num_rows=4000)) == [1024, 1024, 1024, 928]


def test_partial_sums_fill_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows or many: at least as many programs as an H200 holds at once, unless a split would be less than a tile."""
    monkeypatch.setattr(chunk_size, "CPU_LOGITS", 1 << 27)  # of "meta" too

    def programs(**shape: Any) -> int:
        (grid,) = {launch.grid for launch in Call("chunk", **shape).launched() if launch.name == "_logit_partials"}
        return grid[0] * grid[1]

    for shape in ({"vocab": 128256, "num_rows": 2048}, {"vocab": 128256, "num_rows": 256}, {"num_rows": 1000}):
        assert 16 * 132 <= programs(**shape) <= 2 * 16 * 132
    assert programs(num_rows=5) == 5 * 32  # tiles
