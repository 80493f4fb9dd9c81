"""A merged model is base plus adapter, or it is not written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cpo_fast.config import Config, dump_config
from cpo_fast.errors import CheckpointError, ConfigError
from cpo_fast.models import _cast, _dtype_of_files, load_model, merge
from cpo_fast.train.loop import train
from tests.cli.commands import run
from tests.processor import Processor
from tests.tiny import tiny_tokenizer


@pytest.fixture
def trained(make_config: Callable[..., Config]) -> Config:
    config = make_config(num_epochs=1, lr=0.05)
    adapter = train(config).adapter_path
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})


def test_merged_model_gives_the_logits_of_base_plus_adapter(trained: Config, tmp_path: Path) -> None:
    result = merge(trained, tmp_path / "merged", ["1 + 1 = 2", "hello"], max_mean_kl=1e-6)
    assert result.mean_kl < 1e-9
    ids = torch.tensor([[7, 9, 30, 200]])
    with_adapter, _ = load_model(trained.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, with_adapter(ids).logits, rtol=1e-5, atol=1e-5)
    untrained, _ = load_model(trained.model.model_copy(update={"adapter": None}))
    assert float((merged(ids).logits - untrained(ids).logits).abs().max()) > 1e-3


def test_the_command_says_nothing_but_what_it_made(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No library warns: PEFT asks by an old name, and DeepSpeed guesses its device."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(trained))
    shown = run("merge", str(path), "-o", str(tmp_path / "merged"))
    assert shown.stderr == ""
    assert [line.partition(":")[0] for line in shown.stdout.splitlines()] == [
        "merged model",
        "KL from base plus adapter",
    ]


def test_merge_that_drifts_is_refused_and_writes_nothing(trained: Config, tmp_path: Path) -> None:
    low = trained.model_copy(update={"model": trained.model.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(CheckpointError, match="differs from base plus adapter") as raised:
        merge(low, tmp_path / "merged", ["1 + 1 = 2"], max_mean_kl=1e-12)
    assert raised.value.exit_code == 4
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def stored(trained: Config, tmp_path: Path) -> Callable[[torch.dtype], Config]:
    """`stored(dtype)`: the trained configuration over a base whose files have that dtype, with `model.dtype: auto`."""

    def make(dtype: torch.dtype) -> Config:
        folder = tmp_path / f"base-{dtype}"
        AutoModelForCausalLM.from_pretrained(trained.model.path, dtype=dtype).save_pretrained(folder)
        tiny_tokenizer(folder)
        return trained.model_copy(
            update={"model": trained.model.model_copy(update={"path": str(folder), "dtype": "auto"})}
        )

    return make


def sums(config: Config) -> dict[str, torch.Tensor]:
    """W + (alpha / r) B A in float32, by the equation."""
    assert config.model.adapter is not None
    weights = {name: value.float() for name, value in load_file(Path(config.model.path) / "model.safetensors").items()}
    adapter = load_file(Path(config.model.adapter) / "adapter_model.safetensors")
    for name, down in adapter.items():
        if name.endswith(".lora_A.weight"):
            up = adapter[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[layer] = weights[layer] + config.lora.alpha / config.lora.r * (up @ down)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_keeps_the_dtype_of_the_base_s_files_on_every_device(
    dtype: torch.dtype, stored: Callable[[torch.dtype], Config], tmp_path: Path, processor: Processor
) -> None:
    config, results = stored(dtype), []
    for ratio in (40.0, 0.5):
        processor(bf16_ratio=ratio)
        target = tmp_path / f"merged-{ratio}"
        result = merge(config, target, ["1 + 1 = 2"], max_mean_kl=1e-2)
        results.append((result.mean_kl, result.max_kl, (target / "model.safetensors").read_bytes()))
    assert results[0] == results[1], "what the device computes in decides nothing"
    assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    merged = load_file(target / "model.safetensors")
    for name, value in sums(config).items():
        # PEFT and the equation may sum in another order: one place of the last, or of float32
        torch.testing.assert_close(merged[name], value.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert merged[name].dtype == dtype
    assert (results[0][0] < 1e-9) == (dtype == torch.float32), "the divergence is that of the written weights"


def test_a_named_dtype_is_written_whatever_the_base_s_files_have(
    stored: Callable[[torch.dtype], Config], tmp_path: Path
) -> None:
    config = stored(torch.bfloat16)
    for name in ("float32", "bfloat16"):
        named = config.model_copy(update={"model": config.model.model_copy(update={"dtype": name})})
        merge(named, tmp_path / name, ["1 + 1 = 2"], max_mean_kl=1.0)
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {str(value.dtype) for value in weights.values()} == {f"torch.{name}"}


def test_the_dtype_that_most_numbers_have_is_that_of_the_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    assert _dtype_of_files(tmp_path) == torch.float32
    save_file({"c": torch.ones(2, 1, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    assert _dtype_of_files(tmp_path) == torch.bfloat16
    save_file({"d": torch.ones(5, dtype=torch.int8)}, tmp_path / "3.safetensors")
    with pytest.raises(ConfigError, match=r"are I8, which a merged model cannot keep; .*model\.dtype=float32"):
        _dtype_of_files(tmp_path)


def test_rounded_weights_are_compared_with_exact_positions(trained: Config) -> None:
    """Rotary frequencies are no weights: rounded to bfloat16 they would turn far positions by radians."""
    model, _ = load_model(trained.model)
    model = _cast(model.merge_and_unload(), torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_merge_needs_an_adapter_and_an_empty_folder(trained: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter is not set"):
        merge(
            trained.model_copy(update={"model": trained.model.model_copy(update={"adapter": None})}),
            tmp_path / "m",
            [],
            1,
        )
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        merge(trained, tmp_path / "m", ["a"], 1.0)
    assert (tmp_path / "m" / "precious").read_text() == "x"


def test_command_prints_the_divergence(trained: Config, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{path: {trained.model.path}, dtype: float32}}\n")
    result = run(
        "merge", str(tmp_path / "c.yaml"), f"model.adapter={trained.model.adapter}", "-o", str(tmp_path / "m"), "--json"
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["mean_kl"] < 1e-9
    assert (tmp_path / "m" / "model.safetensors").is_file()
