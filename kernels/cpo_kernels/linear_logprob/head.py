"""The LM head as one function: hidden rows to final logits, in the accumulation dtype, never rounded to 16 bits.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

(`softcap` None leaves tanh out). `slope` is dz / d(h W^T), the factor that every gradient of z carries. Models that
scale or cap their logits (Cohere, Granite, Gemma 2) train another objective when this is ignored.
"""

from dataclasses import dataclass

import torch

from cpo_kernels.precision import matmul_accumulated

MAX_CHUNK_LOGITS = 1 << 25  # logits held at once: 128 MiB in float32
ROW_TILE = 128  # rows of a matrix product's tile on sm80 and sm90


@dataclass(frozen=True)
class Head:
    """Weight [V, E] (and bias [V]) of an output head with its logit transform; see the module docstring."""

    weight: torch.Tensor  # [V, E]
    bias: torch.Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def trainable(self) -> bool:
        """Whether the weight or the bias takes a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def chunk_rows(self) -> int:
        """Rows whose logits are held at once: whole tiles of a matrix product where that many fit."""
        rows = max(1, MAX_CHUNK_LOGITS // self.weight.shape[0])
        return rows if rows < ROW_TILE else rows // ROW_TILE * ROW_TILE

    @property
    def chunk_columns(self) -> int:
        """Rows of the weight's gradient that are held at once beside their sum."""
        return max(1, MAX_CHUNK_LOGITS // self.weight.shape[1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final logits z [R, V] of hidden rows [R, E]."""
        return self.transform(matmul_accumulated(hidden, self.weight.t()))

    def transform(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw products h W^T to final logits z, same shape."""
        if self.bias is not None:
            raw = raw + self.bias.to(raw.dtype)
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw if self.temperature == 1.0 else raw / self.temperature

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """dz / d(h W^T) at final logits z: a tensor of the shape of z under a soft-cap, else a constant."""
        constant = self.logit_scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1.0 - (logits * self.temperature / self.softcap).square())
