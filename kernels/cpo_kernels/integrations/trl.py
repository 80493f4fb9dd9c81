"""TRL's `DPOTrainer` on a token forest: the same losses, metrics and options, shared prefixes computed once a batch.

    trainer = PackedDPOTrainer(model=..., args=DPOConfig(...), train_dataset=..., processing_class=...)

TRL asks its model for per-token log-probs by `model(..., labels=labels, fused_lm_head=True)`. That one call is answered
from a forest of the batch's rows. Everything above it is TRL's own code: all fifteen losses and their mixtures,
f-divergences, `ld_alpha`, truncation, the reference (adapter off, copied adapter, separate or synchronised model,
precomputed log-probs), `compute_metrics`, gradient checkpointing. Logs gain `packing/tokens`, `packing/padded_tokens`
and `packing/tokens_saved` per batch.

Under `bf16=True` a float32 model runs under autocast, as in TRL. `REFUSED_OPTIONS`, vision data, mixture-of-experts losses,
dropout and sharded weights (FSDP, ZeRO-3) are refused by name. DDP works. ZeRO 1 and 2 are let through and untried.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import ProcessorMixin
from trl import DPOTrainer

from cpo_kernels.integrations.padded import PaddedLogps, packed_token_logps
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.model import model_parts, unwrap_peft
from cpo_kernels.integrations.transformers.proof import check_training

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(
        "PackedDPOTrainer needs a TRL whose DPOTrainer calls the model with fused_lm_head=True (1.16 does); "
        "this one has no trl.trainer.utils.FusedCausalLMOutput"
    ) from error

# option of DPOConfig -> why a packed batch cannot honour it
REFUSED_OPTIONS = {
    "use_weighting": "its weights need log sum p^2 of every row, which packed log-probs do not give",
    "padding_free": "it describes a padded batch; the forest has no padding already",
    "use_liger_kernel": "it replaces layers of the model after they were proved exact",
    "activation_offloading": "it was never tried on a forest",
    "torch_compile": "a forest's shape changes with every batch",
    "fsdp": "the output head is read as one tensor and would be sharded",
    "neftune_noise_alpha": "its noise is drawn anew for every row, and rows share the embeddings of their prefix",
    "parallelism_config": "a forest is one line of tokens and is not cut over devices",
}
# TRL's name of a per-token output -> the name it has here
_OUTPUTS = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "is_top1"}


class PackedDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` with the same arguments, computing each batch as one forest.

    Args:
        impl: implementation of the kernels, None to choose by device. All other arguments are those of `DPOTrainer`.

    Raises:
        ValueError: an option of `REFUSED_OPTIONS`, or a model or data set that cannot be packed exactly.
    """

    def __init__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> None:
        self._packing_impl = impl
        self._is_packed = False
        self._policy_batch: PaddedLogps | None = None
        _refuse_arguments(inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs).arguments)
        super().__init__(*args, **kwargs)
        self._pack_models()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._pack_models()  # TRL precomputes before its own constructor returns
        return super()._precompute_ref_logps(*args, **kwargs)

    def _pack_models(self) -> None:
        if self._is_packed:
            return
        self._refuse_models()
        models = [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        for model in models:
            causal_lm = unwrap_peft(model)
            # accelerate has put autocast around the reference's forward, and prepare compares exactly
            wrapped = causal_lm.__dict__.pop("forward", None)
            prepare(model)
            try:
                check_training(model, model_parts(model))
            except ValueError as error:
                raise _refusal(f"disable_dropout={self.args.disable_dropout}", str(error)) from None
            if wrapped is not None:
                causal_lm.forward = wrapped
            _route_forward(causal_lm, self._packed_forward)
        self._is_packed = True

    def _refuse_models(self) -> None:
        if self.aux_loss_enabled:
            raise _refusal("router_aux_loss_coef", "expert routing statistics differ when prefixes are shared")

    def _packed_forward(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,  # [B, L]
        attention_mask: torch.Tensor,  # [B, L]
        labels: torch.Tensor,  # [B, L], -100 where not scored
        use_cache: bool = False,
        **others: Any,
    ) -> FusedCausalLMOutput:
        """What TRL's fused LM head returns, [B, L - 1] per token. An input that would change it is refused."""
        unknown = sorted(name for name, value in others.items() if value is not None)
        if unknown:
            raise ValueError(f"PackedDPOTrainer: the collator gives {unknown}, which a forest has no place for")
        is_reference = self.model.training and not torch.is_grad_enabled()
        asked = () if is_reference else tuple(_OUTPUTS.values())
        with self.accelerator.autocast():  # the policy's call comes under it, a separate reference's does not
            batch = packed_token_logps(model, input_ids, attention_mask, labels != -100, asked, self._packing_impl)
        self._policy_batch = self._policy_batch or batch
        extra = {name: batch.outputs.get(ours) for name, ours in _OUTPUTS.items()}
        return FusedCausalLMOutput(log_probs=batch.logps, label_mask=labels[:, 1:] != -100, **extra)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self._policy_batch = None
        result = super()._compute_loss(model, inputs, return_outputs)
        policy = self._policy_batch  # TRL asks the policy first
        assert policy is not None
        self._policy_batch = None  # it holds the graph
        counts = torch.tensor([[policy.num_tokens, policy.num_padded_tokens]], device=self.accelerator.device)
        tokens, padded_tokens = self.accelerator.gather(counts).sum(dim=0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["packing/tokens"].append(tokens)
        metrics["packing/padded_tokens"].append(padded_tokens)
        metrics["packing/tokens_saved"].append(padded_tokens - tokens)
        return result


def _route_forward(model: torch.nn.Module, packed: Callable[..., Any]) -> None:
    """Let `model(..., fused_lm_head=True)` run `packed(model, ...)`. Every other call stays as it was.

    The instance's forward is replaced, where TRL puts its own fused LM head. So a call through DDP or DeepSpeed arrives
    here inside the module that they wrap.
    """
    stock = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return packed(self, *args, **kwargs) if kwargs.pop("fused_lm_head", None) else stock(*args, **kwargs)

    # a method and not a plain function: accelerate unwraps `forward.__func__`
    model.forward = types.MethodType(forward, model)


def _refuse_arguments(arguments: dict[str, Any]) -> None:
    options = arguments.get("args")
    for name, why in REFUSED_OPTIONS.items():
        if getattr(options, name, None):
            raise _refusal(f"{name}={getattr(options, name)!r}", why)
    plugin = getattr(options, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise _refusal("DeepSpeed ZeRO-3", REFUSED_OPTIONS["fsdp"])
    data = arguments.get("train_dataset")
    columns = set() if data is None else set(next(iter(data)))
    if columns & {"image", "images"} or isinstance(arguments.get("processing_class"), ProcessorMixin):
        raise _refusal("vision data", "images have no place in a token trie")


def _refusal(what: str, why: str) -> ValueError:
    return ValueError(f"PackedDPOTrainer does not support {what}: {why}")
