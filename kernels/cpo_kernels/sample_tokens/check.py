"""The check of the sampler's Triton kernels: rows of every kind and setting, token by token against plain torch."""

from collections.abc import Callable

import torch

from cpo_kernels.kernel_check import FLOAT32_EPS, ModelShape
from cpo_kernels.sample_tokens.eager import NOT_FINITE, sample_tokens_eager

VOCAB_SIZE = 2600  # of three blocks, the last a part of one
COPIES = 8  # rows of each kind and setting, which read other numbers
# temperature, top-p and top-k (0: all) of a row
SETTINGS = ((0.0, 0.9, 40), (1.0, 1.0, 0), (0.7, 0.2, 0), (1.0, 0.9, 0), (0.3, 1.0, 1), (1.2, 1.0, 40), (0.8, 0.7, 40))

# logits, uniforms, step, temperature, top_p, top_k, penalty, seen -> tokens [B] and log-probs [B]
Sampler = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def check_sample_tokens(device: torch.device, shape: ModelShape, kernels: Sampler | None = None) -> dict[str, float]:
    """Error over bound of the tokens, of which each must be the same, and of their log-probs.

    By `kernels`, as a rule the Triton kernels. The shape of the model does not matter to them.
    """
    if kernels is None:
        from cpo_kernels.sample_tokens.triton_sampler import sample_tokens_triton  # loads Triton

        kernels = sample_tokens_triton
    logits = _rows().to(device)
    num_rows = len(logits)
    rows = torch.arange(num_rows)
    settings = torch.tensor(SETTINGS, dtype=torch.float64)[rows % len(SETTINGS)].to(device)
    temperature, top_p = settings[:, 0].contiguous(), settings[:, 1].contiguous()
    top_k = torch.where(settings[:, 2] > 0, settings[:, 2], VOCAB_SIZE).long()
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64).to(device)
    penalty = torch.where(rows % 2 == 0, 1.3, 0.8).double().to(device)
    seen = (torch.rand(num_rows, VOCAB_SIZE, generator=generator) < 0.3).to(device)
    step = (rows % 3).to(device)  # the last of them past the end
    ratios: dict[str, float] = {}
    for name, given in {
        "plain": (None, None, None, None),
        "top-p": (top_p, None, None, None),
        "all": (top_p, top_k, penalty, seen),
        "greedy": (None, None, penalty, seen),
    }.items():
        numbers = None if name == "greedy" else uniforms
        (tokens, logps), flags = _run(sample_tokens_eager, logits, numbers, step, temperature, *given)
        (found, found_logps), found_flags = _run(kernels, logits, numbers, step, temperature, *given)
        usable = tokens != NOT_FINITE
        num_wrong = int((found != tokens).sum())
        if flags is not None and found_flags is not None:
            num_wrong += int((flags != found_flags)[usable].sum())
        ratios[f"tokens ({name})"] = float("inf") if num_wrong else 0.0
        error = (found_logps - logps)[usable].abs().max() / (1 + logps[usable].abs().max())
        ratios[f"log-probs ({name})"] = float(error) / (FLOAT32_EPS * 1e-4)
    return ratios


def _run(
    sample: Sampler, logits: torch.Tensor, *given: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    *others, seen = given
    flags = None if seen is None else seen.clone()
    return sample(logits, *others, flags), flags


def _rows() -> torch.Tensor:
    """Logits [B, V] float32, all settings of each kind: ordinary, peaked, flat, tied, mostly excluded, not finite."""
    generator = torch.Generator().manual_seed(1)
    count = COPIES * len(SETTINGS)
    ordinary = 3 * torch.randn(count, VOCAB_SIZE, generator=generator)
    excluded = ordinary.masked_fill(torch.rand(count, VOCAB_SIZE, generator=generator) < 0.99, float("-inf"))
    spoiled = ordinary[:6].clone()
    spoiled[0, 7] = spoiled[1, -1] = float("nan")
    spoiled[2, 7] = spoiled[3, -1] = float("inf")
    spoiled[4:] = float("-inf")
    return torch.cat([ordinary, 9 * ordinary, torch.zeros(count, VOCAB_SIZE), ordinary.round(), excluded, spoiled])
