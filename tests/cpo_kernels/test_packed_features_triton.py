"""Models with windows, sinks and soft-caps through `packed_logps` by the Triton kernels, against the stock model.

`test_tree_attention_features_triton.py` holds the kernels alone to a dense softmax.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, PreTrainedModel

from cpo_kernels.integrations.transformers import hook, packed_logps, prepare
from cpo_kernels.tolerances import end_to_end_bound
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels
from tests.cpo_kernels.padded_oracle import relative_error, trained_gradients, worst_gradient_error
from tests.tiny import tiny_mistral, tiny_model

BOUND = 1e-5 if DEVICE == "cpu" else end_to_end_bound(torch.float32)
TRUNK = list(range(3, 15))
ROWS = [TRUNK + list(range(20, 30)), TRUNK + list(range(50, 53)), TRUNK[:7] + list(range(60, 65))]
STARTS = [10, 12, 1]
SIZES = {"head_dim": 16, "num_hidden_layers": 1}
WINDOW = 9


def gpt_oss() -> PreTrainedModel:
    model = tiny_model(
        GptOssConfig, num_local_experts=3, num_experts_per_tok=2, attention="eager", sliding_window=WINDOW, **SIZES
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0, generator=torch.Generator().manual_seed(1))
    return model


def gemma2() -> PreTrainedModel:
    capped = {"attn_logit_softcapping": 0.02, "query_pre_attn_scalar": 16}  # scores of these weights are of that size
    return tiny_model(Gemma2Config, attention="eager", sliding_window=64, **capped, **SIZES)


# model, place of the argument of `attention_layer` that it needs
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "window of Mistral": (lambda: tiny_mistral(sliding_window=WINDOW, **SIZES), 7),
    "soft-cap of Gemma 2": (gemma2, 8),
    "sinks of gpt-oss": (gpt_oss, 9),
}


def one_by_one(model: PreTrainedModel, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
    sums = []
    for row, start in zip(rows, starts, strict=True):
        ids = torch.tensor([row], device=DEVICE)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
        sums.append(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum())
    return torch.stack(sums)


def gradients(model: PreTrainedModel, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    (logps * torch.tensor([1.0, -2.0, 0.5], device=DEVICE)).sum().backward()
    return trained_gradients(model)


@runs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_one_unpadded_forward_a_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, place = MODELS[name]
    stock = build().to(DEVICE)
    model = prepare(copy.deepcopy(stock), impl="eager")
    expected = one_by_one(stock, ROWS, STARTS)
    actual = packed_logps(model, ROWS, STARTS, impl="triton").segment_logps
    assert relative_error(actual.detach(), expected.detach()) <= BOUND
    assert worst_gradient_error(gradients(model, actual), gradients(stock, expected)) <= BOUND

    kept: Any = hook.attention_layer  # the argument matters on this forest

    def losing(*arguments: Any) -> Any:
        return kept(*arguments[:place], None, *arguments[place + 1 :])

    monkeypatch.setattr(hook, "attention_layer", losing)
    with torch.no_grad():
        lost = packed_logps(model, ROWS, STARTS, impl="eager").segment_logps
    assert relative_error(lost, expected.detach()) > 10 * BOUND
