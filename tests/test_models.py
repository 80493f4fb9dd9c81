"""Loading: the right weights under fixed rules, every failure as one sentence, hashes that follow the contents."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config

from cpo_fast.adapters import adapter_hash
from cpo_fast.config import ModelConfig
from cpo_fast.errors import CheckpointError, ConfigError, CpoFastError, EnvironmentProblem
from cpo_fast.models import load_model, model_folder, model_hash, resolve_device
from tests.tiny import save_tiny_model, tiny_llama, tiny_model, tiny_tokenizer, with_lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def config(path: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig(**({"path": str(path), "dtype": "float32", "device": "cpu"} | changes))


def failure(settings: ModelConfig) -> CpoFastError:
    with pytest.raises(CpoFastError) as caught:
        load_model(settings)
    assert "\n" not in str(caught.value), "an error is one sentence"
    return caught.value


def test_loaded_model_is_the_saved_one_in_eval_mode(folder: Path) -> None:
    model, tokenizer = load_model(config(folder))
    saved = load_file(folder / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer("a b\n").input_ids == tiny_tokenizer()("a b\n").input_ids
    assert load_model(config(folder, dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_recommended_sampling_settings_do_not_reach_decoding(folder: Path) -> None:
    recommended = json.loads((folder / "generation_config.json").read_text())
    recommended |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "eos_token_id": [2, 4]}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    model, _ = load_model(config(folder))
    assert model.generation_config.eos_token_id == [2, 4]
    ids = torch.tensor([[10, 11, 12]])
    out = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=258, pad_token_id=0)
    expected = ids
    for _ in range(12):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, expected)


def test_adapter_is_applied_in_fp32_with_bit_equal_logits(folder: Path, tmp_path: Path) -> None:
    base, _ = load_model(config(folder))
    ids = torch.tensor([[5, 9, 14, 3]])
    with torch.no_grad():
        plain = base(ids).logits
    wrapped = with_lora(base, seed=7)
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = wrapped(ids).logits
    model, _ = load_model(config(folder, adapter=str(tmp_path / "adapter")))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(plain, expected)
    assert not model.training
    mixed, _ = load_model(config(folder, adapter=str(tmp_path / "adapter"), dtype="bfloat16"))
    dtypes = {name.rpartition("lora_")[1]: p.dtype for name, p in mixed.named_parameters()}
    assert dtypes == {"": torch.bfloat16, "lora_": torch.float32}


def test_wrong_paths_are_configuration_errors_that_name_the_remedy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_adapter").mkdir()
    (tmp_path / "only_adapter" / "adapter_config.json").write_text("{}")
    for path, said in [
        ("", "model.path is not set"),
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "file.gguf", "is a file"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "only_adapter", "set model.adapter"),
        ("nobody/has-this-model", "check the name, or download it while online"),
        ("two words", "check the name"),
    ]:
        error = failure(config(path))
        assert (error.exit_code, said in str(error)) == (2, True), str(error)


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = failure(config(folder))
    assert error.exit_code == 2
    assert "never opened" in str(error)


def test_model_that_needs_its_own_code_is_refused_and_nothing_runs(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    error = failure(config(folder))
    assert error.exit_code == 2
    assert "is not run" in str(error)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_incomplete_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    error = failure(config(folder))
    assert isinstance(error, CheckpointError)
    assert gone in str(error)
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00")
    error = failure(config(folder))
    assert isinstance(error, CheckpointError)
    assert "damaged" in str(error)


def test_broken_config_and_foreign_tokenizer_are_configuration_errors(folder: Path, tmp_path: Path) -> None:
    small = save_tiny_model(tmp_path / "small")
    tiny_llama(vocab_size=50).save_pretrained(small)
    error = failure(config(small))
    assert isinstance(error, ConfigError)
    assert "do not belong together" in str(error)
    (folder / "config.json").write_text("{")
    assert isinstance(failure(config(folder)), ConfigError)


def test_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = with_lora(tiny_llama(vocab_size=259, hidden_size=64))
    deep = with_lora(tiny_llama(vocab_size=259, num_hidden_layers=3))
    shallow = with_lora(tiny_llama(vocab_size=259, num_hidden_layers=1))
    for name, adapter in (("wide", wide), ("deep", deep), ("shallow", shallow)):
        adapter.save_pretrained(tmp_path / name)
        error = failure(config(folder, adapter=str(tmp_path / name)))
        assert isinstance(error, CheckpointError), name
        assert "another" in str(error), str(error)
    (tmp_path / "wide" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in str(failure(config(folder, adapter=str(tmp_path / "wide"))))
    assert failure(config(folder, adapter=str(tmp_path / "nowhere"))).exit_code == 4


def test_missing_library_is_an_environment_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = failure(config(folder))
    assert isinstance(error, EnvironmentProblem)
    assert "pip install transformers" in str(error)


@pytest.mark.usefixtures("no_launcher")
def test_devices_resolve_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no device is called 'gpu0'"):
        resolve_device("gpu0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(EnvironmentProblem, match="no CUDA device"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert resolve_device("auto") == torch.device("cuda:1")
    with pytest.raises(EnvironmentProblem, match="does not exist"):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("no_launcher")
def test_ranks_without_a_gpu_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = []
    for world_size, rank, name in ((1, 0, "auto"), (3, 1, "auto"), (3, 0, "cpu"), (3, 0, "auto"), (3, 0, "auto")):
        for key, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(key, str(value))
        assert resolve_device(name) == torch.device("cpu")
        said.append(caplog.text.count("there is no GPU here"))
    assert said == [0, 0, 0, 1, 1]
    assert "the 3 ranks compute on the CPU" in caplog.text


@pytest.mark.usefixtures("no_launcher")
def test_slurm_tasks_take_turns_on_the_devices_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for num_devices, index in ((4, 3), (2, 1), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=num_devices: count)
        assert resolve_device("auto") == torch.device(f"cuda:{index}")


def test_the_model_s_device_becomes_the_current_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    load_model(config(folder, device="cuda:1"))
    assert chosen == [torch.device("cuda:1")]


def test_model_hash_follows_contents_not_places(folder: Path, tmp_path: Path) -> None:
    first = model_hash(str(folder))
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a note")
    assert model_hash(tmp_path / "copy") == first
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = tmp_path / "copy" / name
        original = file.read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert model_hash(tmp_path / "copy") != first, name
        file.write_bytes(original)
        assert model_hash(tmp_path / "copy") == first


def test_second_hash_reads_nothing(folder: Path) -> None:
    first = model_hash(folder)
    weights = folder / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(bytes(status.st_size))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model_hash(folder) == first  # same path, size and time: taken from memory
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert model_hash(folder) != first


def test_adapter_hash_ignores_where_the_base_model_lay(tmp_path: Path) -> None:
    assert adapter_hash(None) == ""
    with_lora(tiny_llama(), seed=1).save_pretrained(tmp_path / "a")
    with_lora(tiny_llama(), seed=2).save_pretrained(tmp_path / "b")
    first = adapter_hash(tmp_path / "a")
    assert len(first) == 16
    assert first != adapter_hash(str(tmp_path / "b"))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/else"}))
    assert adapter_hash(tmp_path / "a") == first
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 99}))
    assert adapter_hash(tmp_path / "a") != first
    with pytest.raises(CheckpointError, match="no folder"):
        adapter_hash(tmp_path / "none")


def test_model_folder_of_a_folder_is_itself(folder: Path) -> None:
    assert model_folder(str(folder)) == folder


def test_a_model_without_sdpa_is_loaded_with_eager_attention(folder: Path) -> None:
    tiny_model(Gemma2Config, vocab_size=259, head_dim=8, attention="eager").save_pretrained(folder)
    model, _ = load_model(config(folder))
    assert model.config._attn_implementation == "eager"
