"""Training goes on from an adapter of any kind: the numbers are PEFT's, and what is saved is what was trained."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from cpo_fast.config import Config
from cpo_fast.errors import CheckpointError, ConfigError, EnvironmentProblem
from cpo_fast.models import load_model, merge
from cpo_fast.train.loop import train
from cpo_fast.train.policy import build_policy, load_policy
from cpo_kernels.integrations.transformers import packed_logps
from tests.cpo_kernels.padded_oracle import padded_logps
from tests.tiny import save_tiny_model
from tests.train.runs import CONSTANT_RATE, MakeConfig, sgd

LINEAR = ["q_proj", "down_proj"]
TOKENS = list(range(5, 60))  # some of which are in every batch
SEQUENCES, STARTS = [[5, 9, 14, 3, 200, 77], [5, 9, 14, 8, 9, 10], [5, 9, 20, 21]], [3, 3, 1]
FIXED = ("base_layer.weight", "vera_A", "vera_B", "randlora_A", "randlora_B")  # saved, and not trained
IDS = torch.tensor([[5, 9, 14, 3, 200, 77, 6, 5]])


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": LINEAR, **settings})


TRAINED: dict[str, Callable[[], PeftConfig]] = {
    "a trained copy of the embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "a trained copy of the norm": lambda: lora(modules_to_save=["norm"]),
    "LoRA on the embeddings": lambda: lora(target_modules=[*LINEAR, "embed_tokens"]),
    "LoRA and some tokens": lambda: lora(trainable_token_indices=TOKENS),
    "some tokens": lambda: TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
    "LoRA with biases of its own": lambda: lora(lora_bias=True),
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA": lambda: lora(use_rslora=True),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),  # the base is another one afterwards
    "dropout": lambda: lora(lora_dropout=0.4),
    "ranks and scales by layer": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7}),
    "DoRA on the embeddings": lambda: lora(use_dora=True, target_modules=["embed_tokens"]),
    "IA3": lambda: IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "VBLoRA": lambda: VBLoRAConfig(r=4, target_modules=["q_proj"], num_vectors=8, vector_length=8),
    "RandLoRA": lambda: RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "OFT": lambda: OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    "HRA": lambda: HRAConfig(r=4, target_modules=LINEAR),
    "layer norms": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
}
REFUSED: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "a trained copy of the head": (lambda: lora(modules_to_save=["lm_head"]), r"output head \(modules_to_save"),
    "LoRA on the head": (lambda: lora(target_modules=["lm_head"]), r"output head \(target_modules"),
    "biases of the base": (lambda: lora(bias="lora_only"), "bias=lora_only"),
    "LoHa": (lambda: LoHaConfig(r=4, target_modules=LINEAR), "kind LOHA.* random numbers"),
    "prompt tuning": (lambda: PromptTuningConfig(num_virtual_tokens=4), "kind PROMPT_TUNING"),
    "prefix tuning": (lambda: PrefixTuningConfig(num_virtual_tokens=4), "kind PREFIX_TUNING"),
    "activated LoRA": (lambda: lora(alora_invocation_tokens=[5, 6]), "activated LoRA"),
    "repeated layers": (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "biases of OFT": (
        lambda: OFTConfig(oft_block_size=8, target_modules=["q_proj"], bias="oft_only"),
        "bias=oft_only",
    ),
    "a schedule of ranks": (lambda: AdaLoraConfig(target_modules=["q_proj"], total_step=9), "kind ADALORA.* ranks"),
    "PiSSA by drawn numbers": (lambda: lora(init_lora_weights="pissa_niter_2"), "init_lora_weights=pissa_niter_2"),
}


def change_trained(model: nn.Module, std: float = 0.05) -> None:
    """Move every trained number a little, so that no update is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def save_adapter_of(settings: PeftConfig, base: str, folder: Path, **options: Any) -> Path:
    """Write an adapter as PEFT writes it."""
    settings.task_type = "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    change_trained(model)
    model.save_pretrained(folder, **options)
    return folder


def stock(config: Config) -> nn.Module:
    """Base plus adapter, by PEFT and Transformers alone."""
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    return PeftModel.from_pretrained(base, str(config.model.adapter), is_trainable=True).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("kind", TRAINED)
def test_training_goes_on_as_pefts_own_forward_and_nothing_is_lost(
    kind: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**CONSTANT_RATE, num_epochs=1, max_steps=1, reference="online")
    adapter = save_adapter_of(TRAINED[kind](), config.model.path, tmp_path / "adapter")
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})
    policy, expected = build_policy(config), stock(config)
    out = packed_logps(policy.model.train(), SEQUENCES, STARTS, reference=policy.reference)
    logps = padded_logps(expected, SEQUENCES, STARTS)
    torch.testing.assert_close(out.segment_logps, logps, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.segment_logps, out.ref_segment_logps)
    out.segment_logps.sum().backward()
    logps.sum().backward()
    trained = {name: each.grad for name, each in policy.model.named_parameters() if each.requires_grad}
    assert trained.keys() == {name for name, each in expected.named_parameters() if each.requires_grad}
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            assert float((trained[name] - parameter.grad).norm() / parameter.grad.norm()) < 1e-5, name

    model, tokenizer = load_model(config.model)
    before = load_file(adapter / "adapter_model.safetensors")
    written = train(config, model, tokenizer, make_optimizer=sgd).adapter_path
    after = load_file(written / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    unmoved = {name for name in after if torch.equal(after[name], before[name])}
    assert all(name.endswith(FIXED) for name in unmoved), unmoved
    again = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(written)})})
    trained_logits = logits(model)
    assert torch.equal(logits(stock(again)), trained_logits)
    assert not torch.equal(logits(stock(config)), trained_logits)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_in_a_sentence_before_a_model_is_loaded(
    kind: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, words = REFUSED[kind]
    config = make_config()
    adapter = save_adapter_of(build(), config.model.path, tmp_path / "adapter")
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=f"^model.adapter: .*{words}"):
        load_policy(config)


def test_dropout_is_off_in_configuration_and_modules_with_one_warning(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    adapter = save_adapter_of(lora(lora_dropout=0.4), config.model.path, tmp_path / "adapter")
    with caplog.at_level(logging.WARNING, logger="cpo_fast"):
        policy = build_policy(
            config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})
        )
    assert [record.getMessage()[:36] for record in caplog.records] == ["lora_dropout=0.4 of the adapter is s"]
    assert {each.lora_dropout for each in policy.model.peft_config.values()} == {0.0}
    assert not any(isinstance(module, nn.Dropout) for module in policy.model.modules())


def test_embeddings_that_an_adapter_brings_are_searched_trained_with_and_saved(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(num_epochs=1, max_steps=1)
    adapter = save_adapter_of(lora(), config.model.path, tmp_path / "adapter", save_embedding_layers=True)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    brought = {name: value + 0.1 for name, value in weights.items() if "lora_" not in name}
    assert len(brought) == 2
    save_file(weights | brought, file, metadata={"format": "pt"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})
    saved = load_file(train(config).adapter_path / "adapter_model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in brought.items():
        assert torch.equal(saved[name], value), name
    save_file(load_file(file) | {"base_model.model.other.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weight.* the first base_model\.model\.other\.weight"):
        load_model(config.model)


def test_a_trained_copy_in_16_bits_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(model={"dtype": "bfloat16"})
    adapter = save_adapter_of(lora(modules_to_save=["norm"]), config.model.path, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"norm\.modules_to_save\.default\.weight would be trained in bfloat16"):
        load_policy(config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})}))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["self_attn"], r"'self_attn' matches \S+self_attn, a LlamaAttention, .* its linear layers are .*q_proj"),
        (["norm"], r"'norm' matches model\.norm, a LlamaRMSNorm"),
        ([], r"the list is empty"),
        ([" "], r"a name is empty"),
        (["q_proj", "lm_head"], r"'lm_head' is the output head"),
        (["model.layers.0.mlp"], r"'model\.layers\.0\.mlp' matches model\.layers\.0\.mlp, a LlamaMLP"),
        ([".*_proj"], r"'\.\*_proj' matches no module"),
    ],
)
def test_targets_that_lora_cannot_change_are_refused(targets: list[str], words: str, make_config: MakeConfig) -> None:
    config = make_config()
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"target_modules": targets})})
    with pytest.raises(ConfigError, match=rf"^lora\.target_modules: {words}"):
        load_policy(config)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_an_update_of_one_tied_weight_is_merged_into_one_of_two(
    targets: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": 2}')
    adapter = save_adapter_of(lora(target_modules=targets), str(base), tmp_path / "adapter")
    config = make_config(model={"path": str(base), "adapter": str(adapter)})
    merge(config, tmp_path / "merged", ["1 + 1 = 2"], max_mean_kl=1e-9)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(stock(config)), rtol=1e-5, atol=1e-5)
    assert merged.generation_config.temperature == 0.6


def test_merges_that_are_not_possible_or_not_finite_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    adapter = save_adapter_of(lora(lora_bias=True), config.model.path, tmp_path / "biased")
    biased = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})
    with pytest.raises(ConfigError, match=r"cannot be merged .*lora_bias"):
        merge(biased, tmp_path / "merged", ["1 + 1 = 2"], max_mean_kl=1e-9)
    adapter = save_adapter_of(lora(), config.model.path, tmp_path / "damaged")
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for side in "AB":  # finite, and their product is not
        weights[f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"][0, 0] = 3e38
    save_file(weights, file, metadata={"format": "pt"})
    damaged = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight has NaN or infinity"):
        merge(damaged, tmp_path / "merged", ["1 + 1 = 2"], max_mean_kl=1e-9)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["LoRA and some tokens", "some tokens"])
def test_tokens_of_a_tied_base_are_refused_before_it_is_loaded(
    kind: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter_of(TRAINED[kind](), str(base), tmp_path / "adapter")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"embeddings of some tokens, .*head is the same weight .*cpo-fast merge"):
        load_policy(make_config(model={"path": str(base), "adapter": str(adapter)}))


def settings_of(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def weights_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """The first tensor of the file changed."""

    def write(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        first = min(weights)
        weights[first] = change(weights[first])
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return write


FIRST = r"layers\.0\.mlp\.down_proj\.lora_A\.weight"
DAMAGED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "NaN": (weights_of(lambda one: one.fill_(float("nan"))), CheckpointError, f"{FIRST} in .* has NaN or infinity"),
    "one infinity": (
        weights_of(lambda one: one.index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf")))),
        CheckpointError,
        f"{FIRST} in .* has NaN or infinity",
    ),
    "integers": (
        weights_of(lambda one: one.to(torch.int8)),
        CheckpointError,
        rf"1 weight\(s\) .* the first \S+{FIRST}",
    ),
    "a tensor of another shape": (weights_of(lambda one: one[:, :-1].contiguous()), CheckpointError, "does not fit"),
    "fewer targets than weights": (settings_of(target_modules=["q_proj"]), CheckpointError, rf"first \S+{FIRST}"),
    "targets of numbers": (settings_of(target_modules=5), CheckpointError, "does not fit the model .*damaged"),
    "targets in lists": (settings_of(target_modules=[["q_proj"]]), CheckpointError, "does not fit the model .*damaged"),
    "half a pattern": (settings_of(target_modules="(("), CheckpointError, "does not fit the model .*damaged"),
    "a scale of text": (settings_of(lora_alpha="x"), CheckpointError, "does not fit the model .*damaged"),
    "no kind": (settings_of(peft_type=None), ConfigError, "is of kind None"),
    "a setting of a newer PEFT": (
        settings_of(use_future=True, not_used=False),
        EnvironmentProblem,
        "newer PEFT than .* its setting use_future=True; pip install -U peft",
    ),
    "pickled weights": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        CheckpointError,
        "holds no adapter_model.safetensors",
    ),
    "a pointer of Git LFS": (
        lambda folder: (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        CheckpointError,
        "are damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adapter_is_named(damage: str, make_config: MakeConfig, tmp_path: Path) -> None:
    change, error, words = DAMAGED[damage]
    config = make_config()
    adapter = save_adapter_of(lora(), config.model.path, tmp_path / "adapter")
    change(adapter)
    with pytest.raises(error, match=f"^model.adapter: .*{words}"):
        load_model(config.model.model_copy(update={"adapter": str(adapter)}))
