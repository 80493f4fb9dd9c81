"""Compile a Triton kernel for a GPU that is not there, and read what the binary needs.

`triton.compile` runs through to machine code without a driver; registers and stack are then read off the binary by the
`cuobjdump` that Triton ships, and what its loops issue by `machine_code`. Shared memory above the card's limit, a spill
or a product without matrix instructions do not stop the compiler, so `assert_fits` and `assert_matrix_instructions` do.
The process must not have TRITON_INTERPRET set: there, kernels are not kernels.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Shared memory that one block may use: 163 KiB on compute capability 8.0, 227 KiB on 9.0.
MAX_SHARED_BYTES = {80: 166912, 90: 232448}


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs of the card."""

    shared_bytes: int  # per block
    registers: int  # per thread
    stack_bytes: int  # per thread; registers that were spilled
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    arch: int  # compute capability, 80 or 90
    num_warps: int  # per block


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, object],
    arch: int,
    num_warps: int,
    num_stages: int,
    divisible: Sequence[str] = (),
) -> Compiled:
    """Compile `kernel` for compute capability `arch` (80 or 90).

    Args:
        kernel: a `triton.jit` function.
        signature: Triton type of every argument that is no constexpr, as "*bf16", "*i64", "i32", "fp32".
        constexprs: value of every constexpr argument.
        arch: 80 or 90.
        num_warps: warps of a block.
        num_stages: stages of software pipelining.
        divisible: integer arguments that are multiples of 16 in real calls, as strides are; pointers always count so.

    Raises:
        ValueError: an argument of the kernel is in neither or in both of `signature` and `constexprs`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    if sorted([*signature, *constexprs]) != sorted(names):
        raise ValueError(f"{kernel.__name__}: expected arguments {names}, got {[*signature, *constexprs]}")
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in divisible]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constexprs else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    binary = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    return read_binary(binary, arch)


def read_binary(binary: Any, arch: int) -> Compiled:
    """What a result of `triton.compile` needs."""
    code = binary.asm["cubin"]
    registers, stack_bytes = _resources(code)
    shared_bytes, num_warps = int(binary.metadata.shared), int(binary.metadata.num_warps)
    return Compiled(shared_bytes, registers, stack_bytes, binary.asm["ptx"], code, arch, num_warps)


def assert_fits(binary: Compiled, arch: int, max_stack_bytes: int) -> None:
    """Fail on more shared memory than the card has, or more spilled registers than a kernel may have."""
    assert binary.shared_bytes <= MAX_SHARED_BYTES[arch], f"{binary.shared_bytes} bytes of shared memory"
    assert binary.stack_bytes <= max_stack_bytes, f"{binary.stack_bytes} bytes of stack, {binary.registers} registers"


def assert_matrix_instructions(binary: Compiled, warp_group: bool, warp: bool) -> None:
    """Fail unless the products are, and are only, the warp group's of 9.0, a warp's as on 8.0, or neither."""
    assert ("wgmma.mma_async" in binary.ptx) is warp_group, "wgmma.mma_async"
    assert ("mma.sync" in binary.ptx) is warp, "mma.sync"


def nvidia_tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton ships."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread of the one kernel in `cubin`."""
    tool = nvidia_tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=600)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise ValueError(f"cuobjdump: expected REG and STACK, got {done.stdout!r}")
    return int(found[1]), int(found[2])
