"""A CPU of a test's own: what torch tells of it, and how long its products take on a clock that only they move."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpo_fast import dtype as dtypes

X86 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": False}
Seconds = Callable[[torch.dtype, int], float]  # of one product of so many multiplications


class Processor:
    """`processor(bf16_ratio=...)` makes this process's CPU one whose bfloat16 products take so many float32 ones.

    Called again it is another CPU: what was measured or said before is forgotten.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.products: list[tuple[torch.dtype, int]] = []  # dtype and multiplications of each since the last call
        self._patch, self._now, self._multiply = patch, 0.0, torch.mm

    def __call__(self, bf16_ratio: float | None = None, told: dict[str, Any] | None = None) -> None:
        """Be a CPU of that ratio, or one without bf16 instructions. `told` is what torch tells instead."""
        has = X86 | {"avx512_bf16": bf16_ratio is not None}
        ratio = 1.0 if bf16_ratio is None else bf16_ratio
        self.runs(lambda dtype, _: 0.5 * ratio if dtype == torch.bfloat16 else 0.5)
        self._patch.setattr(torch.cpu, "get_capabilities", lambda: has if told is None else told)

    def runs(self, seconds: Seconds) -> None:
        """Be a CPU that takes `seconds` for a product."""

        def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            size = left.numel() * right.shape[1]
            self.products.append((left.dtype, size))
            self._now += seconds(left.dtype, size)
            # in float32, so that no test waits for a processor that emulates bfloat16
            return self._multiply(left.float(), right.float()).to(left.dtype)

        self.forget()
        self._patch.setattr(torch, "mm", multiply)
        self._patch.setattr(time, "thread_time", lambda: self._now)

    def forget(self) -> None:
        """Forget what was measured or said."""
        self.products.clear()
        dtypes._bfloat16_ratio.cache_clear()
        dtypes._warn_if_bfloat16_is_slow.cache_clear()
