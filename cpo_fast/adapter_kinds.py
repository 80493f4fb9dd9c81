"""Which kinds of PEFT adapters are exact here, and the sentence for one that is not.

`adapter_config.json` tells the kind, so a wrong one is refused before a model is loaded. What it cannot tell (a pattern
that matches the output head, say) the proof of `prepare` finds on the model.

A search computes a token's row from its path alone, in many forwards. So does a training on a forest. Adapters that change
modules and nothing else are exact in both. A training also keeps two copies of the adapter, one of them frozen, which
rules out those that change the base itself.
"""

from collections.abc import Mapping
from typing import Any

# kinds that change modules, token by token. All were compared with PEFT's own forward
# fmt: off
SEARCHED = {
    "LORA", "ADALORA", "BOFT", "C3A", "FOURIERFT", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT",
    "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
}
# fmt: on
_AROUND = "it works around the model's forward and not inside its layers, so a token's path does not decide its result"
_RANDOM = "its layers draw random numbers in training, whatever its settings say"
_NOT_TRAINED = {
    "ADALORA": "it changes its ranks by a schedule of its own while it trains",
    "LOHA": _RANDOM,
    "LOKR": _RANDOM,
}
# starts of A and B that take something away from the base's weights, by drawn numbers or by data that is not here
_CHANGES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")
_HEADS = ("lm_head", "embed_out", "output_layer")


def reason_against_loading(settings: Mapping[str, Any]) -> str | None:
    """Why an adapter with these settings is not computed at all, or None.

    Args:
        settings: `adapter_config.json`, or `PeftConfig.to_dict()`.
    """
    kind, start = _kind(settings), settings.get("init_lora_weights")
    if kind not in SEARCHED:
        return f"is of kind {kind}: {_AROUND}, or it is not known here; train a LoRA"
    if settings.get("alora_invocation_tokens"):
        return (
            "is an activated LoRA (alora_invocation_tokens): PEFT tells it around the model's forward where it begins in a "
            "row; train a plain LoRA"
        )
    if settings.get("layer_replication"):
        return "repeats layers of the base (layer_replication), which are not computed apart; train one without"
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        return (
            f"changes the base when it is loaded (init_lora_weights={start}), each time a little differently; convert it "
            "by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return None


def reason_against_training(settings: Mapping[str, Any]) -> str | None:
    """Why training cannot go on from an adapter with these settings, or None. Else as `reason_against_loading`."""
    kind, bias = _kind(settings), settings.get("bias", "none")
    if kind in _NOT_TRAINED:
        return f"is of kind {kind}, which is searched with and not trained: {_NOT_TRAINED[kind]}; train a LoRA"
    if bias != "none":
        return (
            f"trains biases of the base itself (bias={bias}), which its reference would share; merge it (cpo-fast merge) "
            "and train a new adapter"
        )
    return reason_against_loading(settings) or reason_against_head(settings)


def reason_against_head(settings: Mapping[str, Any]) -> str | None:
    """Why a forest cannot be computed, where the settings name the output head."""
    for key in ("target_modules", "modules_to_save"):
        names = settings.get(key) or ()
        found = [name for name in names if name in _HEADS] if isinstance(names, list | tuple | set) else []
        if found:
            return (
                f"changes the output head ({key} has {found[0]}), whose weight is read directly; merge it (cpo-fast merge) "
                "first"
            )
    return None


def reason_against_tied_tokens(settings: Mapping[str, Any]) -> str | None:
    """Why a forest cannot be computed, where the base's output head is its embeddings."""
    if _kind(settings) == "TRAINABLE_TOKENS" or settings.get("trainable_token_indices"):
        return (
            "trains embeddings of some tokens, and the base's output head is the same weight (tie_word_embeddings), so "
            "that it changes the head too, whose weight is read directly; merge it (cpo-fast merge) first"
        )
    return None


def _kind(settings: Mapping[str, Any]) -> str:
    kind = settings.get("peft_type")
    return str(getattr(kind, "value", kind))
