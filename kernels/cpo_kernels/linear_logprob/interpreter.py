"""What the kernels of this folder do differently in Triton's interpreter, which runs them on a CPU.

The interpreter keeps bfloat16 as 16-bit integers: a dot or a sum of them is wrong without an error, and a cast to them
cuts the low bits off instead of rounding. So there operands go through float32, which is exact for a load, and a store
rounds by hand, as the hardware does.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # what triton.jit itself looks at when a kernel is defined


@triton.jit
def cast(
    values: tl.tensor,  # [...] fp32
    dtype: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """`values` as `dtype`, rounded to nearest, ties to even."""
    if interpreted and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)
