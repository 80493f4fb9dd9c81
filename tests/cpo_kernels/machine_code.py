"""What a compiled kernel issues, from its machine code: matrix instructions and spills of inner loops, resident blocks.

A loop is what lies between a branch backwards and its target; an inner loop holds no other loop. One pass through an inner
loop is priced by a model of one multiprocessor, in clock cycles at which nothing else waits:

* `HGMMA.64xNx16` (9.0, one for each four warps) takes N / 2 cycles of the tensor cores, 4,096 products and sums in 16 bits
  a cycle, and reads N x 16 values of B from shared memory, and 64 x 16 of A too unless A lies in registers, at 128 bytes a
  cycle. The longer counts: with A in shared memory N = 16 reaches 40 % of the peak, N = 32 67 % and N = 64 all of it.
* `HMMA.16816` (8.0, one for each warp) takes 2 cycles of the tensor cores, 2,048 a cycle, and `HMMA.1688` takes 1. Its
  operands come from shared memory by `LDSM`, 4 cycles for four matrices (`.4`), 2 and 1 for two and one. The two overlap:
  the longer counts. 9.0 has HMMA too, priced here at the peak of 9.0, which it is known not to reach.

`Loop.share` is the part of the matrix peak that a pass can reach by this model. Everything else is left out: exponentials,
scalar instructions, waiting for memory. It compares tiles, and is no prediction of time.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from tests.cpo_kernels.aot import Compiled, nvidia_tool

MATRIX_FLOPS = {80: 2048, 90: 4096}  # 16-bit, a cycle of one multiprocessor
SHARED_BYTES_A_CYCLE = 128
MAX_WARPS, MAX_BLOCKS, REGISTERS = 64, 32, 65536  # of one multiprocessor of 8.0 and of 9.0
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}  # of one multiprocessor
RESERVED_BYTES = 1024  # of shared memory, taken by the system from every block

LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;")
BRANCH = re.compile(r"\bBRA\b.*\(?(?P<label>\.L\w+)")
WARP_GROUP = re.compile(r"\bHGMMA\.64x(?P<columns>\d+)x16\.\S+\s+R\w+,\s*(?P<a>g?desc|R)")
WARP = re.compile(r"\bHMMA\.(?P<shape>16816|1688)\.(?!\S*TF32)")
MATRIX_LOAD = re.compile(r"\bLDSM\.\S*?(?:\.(?P<count>[24]))?\s")
GLOBAL_ACCESS = re.compile(r"\b(LDG|STG)\.\S*?(?:\.(U?8|S8|U?16|S16|64|128))?(?:\.CONSTANT)?\s")
WAIT = re.compile(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)")  # until no more groups of copies are on their way
SPILL = re.compile(r"\b(LDL|STL)\b")
MATRIX = re.compile(r"\b[A-Z]*MMA\.")


@dataclass(frozen=True)
class Loop:
    """One pass through an inner loop."""

    instructions: tuple[str, ...]
    arch: int
    num_warps: int  # of the block that runs it

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return sum(bool(SPILL.search(text)) for text in self.instructions)

    @property
    def copies_in_flight(self) -> int:
        """Groups of copies to shared memory on their way while a pass computes, 0 where it waits for all of them."""
        return min((int(found[1], 16) for text in self.instructions if (found := WAIT.search(text))), default=0)

    @property
    def matrix_instructions(self) -> Counter[str]:
        """Matrix instructions and loads of their operands that a warp issues, as "64x128 registers" or "HMMA.16816"."""
        counts: Counter[str] = Counter()
        for text in self.instructions:
            if group := WARP_GROUP.search(text):
                counts[f"64x{group['columns']} {'registers' if group['a'] == 'R' else 'shared'}"] += 1
            elif warp := WARP.search(text):
                counts[f"HMMA.{warp['shape']}"] += 1
            elif load := MATRIX_LOAD.search(text):
                counts[f"LDSM.{load['count'] or 1}"] += 1
            elif MATRIX.search(text):
                raise ValueError(f"no price is known for the matrix instruction {text!r}")
        return counts

    @property
    def cycles(self) -> float:
        """That the tensor cores and shared memory are busy with the products of one pass of the whole block."""
        warp_groups = warps = loads = 0.0
        for name, count in self.matrix_instructions.items():
            if name.startswith("64x"):
                columns, a = name.removeprefix("64x").split()
                read = (int(columns) + (64 if a == "shared" else 0)) * 16 * 2 / SHARED_BYTES_A_CYCLE
                warp_groups += count * max(int(columns) / 2, read) * self.num_warps / 4
            elif name.startswith("HMMA"):
                flops = 2 * 16 * 8 * (16 if name.endswith("16816") else 8)
                warps += count * flops / MATRIX_FLOPS[self.arch] * self.num_warps
            else:
                loads += count * int(name.removeprefix("LDSM.")) * self.num_warps
        # HMMA beside HGMMA would be a product without the matrix instructions of its card: `assert_matrix_instructions`
        return warp_groups + max(warps, loads)

    def share(self, flops: int) -> float:
        """Of the matrix peak that one pass can reach, where `flops` is what its products need (2 M N K each)."""
        return flops / MATRIX_FLOPS[self.arch] / self.cycles


@dataclass(frozen=True)
class MachineCode:
    """What one kernel issues, and how many of its blocks a multiprocessor holds."""

    registers: int  # per thread
    stack_bytes: int  # per thread
    shared_bytes: int  # per block
    blocks: int  # of one multiprocessor at a time, by registers, shared memory and warps
    inner_loops: tuple[Loop, ...]
    outer_spills: int  # loads and stores of spilled registers in loops around these

    @property
    def inner_spills(self) -> int:
        return sum(loop.spills for loop in self.inner_loops)

    def share(self, flops: int) -> float:
        """The least of all inner loops with products; see `Loop.share`.

        Raises:
            ValueError: no inner loop has a matrix instruction.
        """
        shares = [loop.share(flops) for loop in self.inner_loops if loop.cycles > 0]
        if not shares:
            raise ValueError("no inner loop has matrix instructions")
        return min(shares)


@dataclass(frozen=True)
class Reach:
    """What is written beside a tile: the share of the matrix peak, resident blocks, registers a thread."""

    percent: int  # rounded down
    blocks: int
    registers: int


@functools.cache
def machine_code(binary: Compiled) -> MachineCode:
    """Disassemble a compiled kernel and count."""
    inner, outer_spills = inner_loops(disassembled(binary), binary.arch, binary.num_warps)
    blocks = resident_blocks(binary.arch, binary.registers, binary.shared_bytes, binary.num_warps)
    return MachineCode(binary.registers, binary.stack_bytes, binary.shared_bytes, blocks, inner, outer_spills)


def global_accesses(disassembly: str) -> Counter[str]:
    """Loads from and stores to global memory of `disassembled`, loops or not, by width: "LDG.128", "STG.32", "LDG.U16"."""
    return Counter(f"{name}.{width or 32}" for name, width in GLOBAL_ACCESS.findall(disassembly))


@functools.cache
def disassembled(binary: Compiled) -> str:
    """The output of `nvdisasm -c`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.cubin)
        file.flush()
        command = [str(nvidia_tool("nvdisasm")), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def assert_reaches(binary: Compiled, reach: Reach, flops: int = 0) -> None:
    """Fail on a spill in an inner loop, and where the machine code is worse than what is written beside its tile.

    Args:
        binary: of `compile_kernel`.
        reach: what is written.
        flops: needed by the products of one pass through an inner loop, 2 M N K each; 0 where there is no product.
    """
    code = machine_code(binary)
    assert code.inner_spills == 0, f"{code.inner_spills} spills in an inner loop"
    assert code.blocks >= reach.blocks, f"{code.blocks} blocks a multiprocessor, {reach.blocks} are written"
    assert code.registers <= reach.registers, f"{code.registers} registers, {reach.registers} are written"
    percent = int(100 * code.share(flops)) if flops else 0
    assert percent >= reach.percent, f"{percent} % of the matrix peak, {reach.percent} % are written"


def inner_loops(disassembly: str, arch: int, num_warps: int) -> tuple[tuple[Loop, ...], int]:
    """The loops that hold no other, and the spills in the loops around them, of `nvdisasm -c` of one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction["text"])
    if not instructions:
        raise ValueError("no instructions: not the output of nvdisasm -c")
    loops = set()
    for place, text in enumerate(instructions):
        branch = BRANCH.search(text)
        if branch is not None and labels.get(branch["label"], place + 1) < place:  # a branch to itself ends a kernel
            loops.add((labels[branch["label"]], place + 1))
    inner = sorted(loop for loop in loops if not any(_holds(loop, other) for other in loops))
    inside = {place for start, stop in inner for place in range(start, stop)}
    around = {place for start, stop in loops for place in range(start, stop)} - inside
    found = tuple(Loop(tuple(instructions[start:stop]), arch, num_warps) for start, stop in inner)
    return found, sum(bool(SPILL.search(instructions[place])) for place in around)


def _holds(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]


def resident_blocks(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that one multiprocessor holds at a time. Registers are given out in eights a thread, to whole warps."""
    by_registers = REGISTERS // (_round_up(registers, 8) * 32 * num_warps)
    by_shared = SHARED_BYTES[arch] // _round_up(shared_bytes + RESERVED_BYTES, 128)
    return min(by_registers, by_shared, MAX_WARPS // num_warps, MAX_BLOCKS)


def _round_up(value: int, step: int) -> int:
    return (value + step - 1) // step * step
