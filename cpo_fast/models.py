"""Models: loaded with their tokenizer and an optional adapter, named by the hash of their files, merged for good.

Every command loads models here, so that all of them see the same weights under the same rules. Code shipped with a model
runs only after `allow_remote_code` (the command-line flag). Quantised weights and placement over several devices are left
out. torch and transformers are imported inside the functions: this module is cheap to import.

`merge` writes W' = round(W + (alpha / r) B A), summed in float32 and rounded once. The rounding changes the model, so
it is compared with base plus adapter, token by token, as KL divergence of their next-token distributions on real
prompts, and refused above a limit.
"""

import hashlib
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.adapter_kinds import reason_against_head, reason_against_tied_tokens
from cpo_fast.adapters import adapter_folder, adapter_hash, adapter_settings, check_adapter, load_adapter
from cpo_fast.base_sample import FOLDER, check_base
from cpo_fast.config import Config, ModelConfig
from cpo_fast.dtype import dtype_name, resolve_dtype
from cpo_fast.errors import CheckpointError, ConfigError, EnvironmentProblem, first_line, require_library
from cpo_fast.files import aside_of, file_digest, files_hash, removed_on_error
from cpo_fast.model_card import merged_card
from cpo_fast.progress import is_shown, stage
from cpo_fast.ranks import find_ranks
from cpo_fast.threads import choose_threads

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# what is read of a hub repository: weights and tables, from its top folder, never a pickle or a Python file
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_HUB_IGNORED = ("*/*", "consolidated*")  # other formats and second copies of the same weights
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_remote_code_allowed = False


def allow_remote_code() -> None:
    """Let models of this process run the Python code in their folder. Only the command-line flag calls this."""
    global _remote_code_allowed
    _remote_code_allowed = True


def resolve_device(name: str) -> "torch.device":
    """The torch device that `model.device` means.

    Args:
        name: `auto` (this process's CUDA device, by its place on the host under a launcher, if there is one, else
            cpu), or `cpu`, `cuda`, `cuda:N`.

    Raises:
        ConfigError: torch does not know such a device.
        EnvironmentProblem: torch is missing, or this machine has no such CUDA device.
    """
    torch = require_library("torch")
    if name == "auto":
        ranks, num_devices = find_ranks(), torch.cuda.device_count() if torch.cuda.is_available() else 0
        # Slurm may show each task one device only, whatever its place on the host
        local = ranks.local_rank % max(1, num_devices) if ranks.launcher == "slurm" else ranks.local_rank
        name = f"cuda:{local}" if num_devices else "cpu"
        if not num_devices and ranks.world_size > 1 and ranks.rank == 0:
            _say_cpu_ranks(ranks.world_size)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device: no device is called '{name}'; use auto, cpu or cuda:N") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise EnvironmentProblem(f"model.device: '{name}' is asked for, but torch sees no CUDA device; use auto or cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"model.device: '{name}' does not exist; torch sees {torch.cuda.device_count()} CUDA device(s), from cuda:0"
        )
    return device


@cache
def _say_cpu_ranks(num_ranks: int) -> None:
    logger.warning(
        "there is no GPU here, so that the %d ranks compute on the CPU; model.device=cpu says that this is meant",
        num_ranks,
    )


def free_device_bytes(device: "torch.device") -> int:
    """Bytes that this process can still allocate on a device: free ones, and those that torch holds unused."""
    if device.type == "cuda":
        from cpo_kernels.device import free_and_total_bytes

        return free_and_total_bytes(device)[0]
    import psutil  # type: ignore[import-untyped]  # comes with DeepSpeed and accelerate

    return int(psutil.virtual_memory().available)


def model_folder(path: str) -> Path:
    """The folder that holds a model's files: `path` itself, or the snapshot of a hub id (downloaded when missing).

    Raises:
        ConfigError: `path` is empty, no folder and no readable hub id, or the folder holds no model that may be read.
        EnvironmentProblem: a hub id is given and huggingface_hub is missing.
    """
    if not path:
        raise ConfigError("model.path is not set; give the folder or the hub id of a causal language model")
    local = Path(path).expanduser()
    folder = local if local.exists() else _download(path)
    if not folder.is_dir():
        raise ConfigError(f"model.path: {path} is a file; give the folder that holds config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"model.path: {path} holds a PEFT adapter; set model.adapter to it and model.path to its base model"
            )
        raise ConfigError(f"model.path: {path} holds no config.json; give the folder of a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.path: {path} holds no *.safetensors weights, and pickled weights (*.bin, *.pt) are never opened; "
            "save the model with save_pretrained, which writes safetensors"
        )
    return folder


def check_model_path(path: str) -> None:
    """Refuse in moments, before libraries load, what `model_folder` refuses of a path. A hub id is left to it.

    Raises:
        ConfigError: as `model_folder`.
    """
    if not path or _is_local(path):
        model_folder(path)


def _is_local(path: str) -> bool:
    # what no hub id looks like is a mistyped folder
    return Path(path).expanduser().exists() or path.startswith((".", "~", os.sep)) or path.count("/") > 1


def numbers_by_dtype(folder: Path) -> Counter[str]:
    """How many numbers a model's files hold of each dtype, as safetensors names it (F32, BF16), read from their headers."""
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (no mapping: it has no iterator)
                piece = weights.get_slice(key)
                numbers[piece.get_dtype()] += math.prod(piece.get_shape())
    return numbers


def load_model(config: ModelConfig) -> tuple[Any, Any]:
    """Load model and tokenizer, in eval mode, with `sdpa` attention where it has one, else `eager`.

    Returns:
        (PreTrainedModel or, with an adapter, PeftModel, and its tokenizer). The base has the dtype that `resolve_dtype`
        gives, an adapter float32. The model's generation config keeps only its end, begin and padding ids.

    Raises:
        ConfigError: the path is wrong, or the folder holds what cannot be loaded (remote code, unknown architecture).
        CheckpointError: the weights are damaged or incomplete, or the adapter is missing or does not fit the model.
        EnvironmentProblem: a library or the device is missing.
    """
    torch = require_library("torch")
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where Triton launches, and graphs are recorded
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which PEFT imports, warns that it guesses
    with stage("loading the model"):
        return _loaded(config, device)


def _loaded(config: ModelConfig, device: "torch.device") -> tuple[Any, Any]:
    """As `load_model`."""
    torch, transformers = require_library("torch"), require_library("transformers")
    safetensors = require_library("safetensors")
    if is_shown():
        transformers.utils.logging.disable_progress_bar()
    folder = model_folder(config.path)
    if config.adapter is not None:
        check_adapter(config.adapter)  # before weights are read
        named = adapter_settings(config.adapter).get("base_model_name_or_path")
        check_base(adapter_folder(config.adapter), named, folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=_remote_code_allowed)
        load = partial(
            transformers.AutoModelForCausalLM.from_pretrained,
            folder,
            dtype=resolve_dtype(config.dtype, device),
            trust_remote_code=_remote_code_allowed,
            use_safetensors=True,  # a pickle is never opened
            output_loading_info=True,
        )
        try:
            model, loaded = load(attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, loaded = load(attn_implementation="eager")  # scores with a soft-cap, for instance
        model.to(device)
        setattr(model, FOLDER, folder)
    except torch.OutOfMemoryError:  # a RuntimeError, but the folder is not to blame
        raise
    except ImportError as error:
        raise EnvironmentProblem(f"model.path: {config.path} needs a missing library ({first_line(error)})") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"model.path: the weights in {folder} are damaged ({first_line(error)}); fetch or convert the model again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _load_problem(config.path, error) from error
    if loaded["missing_keys"]:  # transformers warns and fills them with random numbers
        missing = sorted(loaded["missing_keys"])
        raise CheckpointError(
            f"model.path: {config.path} lacks {len(missing)} weight(s) of its architecture, the first {missing[0]}; "
            "fetch the whole model"
        )
    if len(tokenizer) > num_embeddings(model):
        raise ConfigError(
            f"model.path: the tokenizer in {config.path} has {len(tokenizer)} tokens, but the model embeds "
            f"{num_embeddings(model)}; they do not belong together"
        )
    # sampling settings that a model recommends are dropped: a repetition penalty would change greedy decoding too
    stock = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stock.eos_token_id, bos_token_id=stock.bos_token_id, pad_token_id=stock.pad_token_id
    )
    if config.adapter is not None:
        model = load_adapter(model, config.adapter)
    choose_threads(model)
    return model.eval(), tokenizer


def check_forest_adapter(config: ModelConfig, *reasons_against: Callable[[Mapping[str, Any]], str | None]) -> None:
    """Refuse, before anything is loaded, an adapter whose output head a forest cannot be computed with.

    Args:
        config: its `adapter` is set.
        reasons_against: other reasons, of `adapter_kinds`, asked first.

    Raises as `model_folder` and `check_adapter`.
    """
    if config.adapter is None:
        raise ValueError("config.adapter is not set")
    check_adapter(config.adapter, *reasons_against, reason_against_head)
    try:
        base = require_library("transformers").AutoConfig.from_pretrained(model_folder(config.path))
    except (OSError, ValueError, KeyError):
        return  # loading says why
    if getattr(base.get_text_config(decoder=True), "tie_word_embeddings", False) or base.tie_word_embeddings:
        check_adapter(config.adapter, reason_against_tied_tokens)


def num_embeddings(model: Any) -> int:
    """How many token ids a model embeds, whatever an adapter has put around its embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def model_hash(path: str | Path) -> str:
    """16 hex digits that name a model: SHA-256 over the names and contents of its config, weight and tokenizer files.

    Raises as `model_folder`.
    """
    folder = model_folder(str(path))
    names = {"config.json", "generation_config.json", *_TOKENIZER_FILES}
    files = [file for file in folder.iterdir() if file.name in names or file.suffix in (".safetensors", ".model")]
    return files_hash({file.name: file_digest(file) for file in files if file.is_file()})


def weights_hash(tensors: "Mapping[str, torch.Tensor]") -> str:
    """16 hex digits that name the weights of a model that came without files, by names, types and bytes."""
    torch = require_library("torch")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # as bytes, because numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


MAX_MERGE_PROMPTS = 16  # texts that are compared: a few thousand positions


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and KL(adapter || merged) per position in nats."""

    path: Path
    mean_kl: float
    max_kl: float
    num_positions: int


def merge(config: Config, target: Path, texts: Sequence[str], max_mean_kl: float) -> MergeResult:
    """Write `config.model.path` with `config.model.adapter` merged in to `target`.

    Args:
        config: section `model`. A dtype that it names is the dtype of the merged weights, `auto` keeps that of the base
            model's files.
        target: folder that must not hold a model yet.
        texts: prompts on which the two models are compared. The first 16 are used.
        max_mean_kl: limit on the mean divergence, in nats.

    Raises:
        ConfigError: no adapter is set, the target exists, or the base's files have no dtype that can be kept.
        CheckpointError: the merged model differs by more than the limit. Nothing is written.
    """
    import torch

    if config.model.adapter is None:
        raise ConfigError("model.adapter is not set; give the folder of the adapter to merge")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; choose a new folder for the merged model")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: the folder is not empty; choose another one for the merged model")
    named = config.model.dtype != "auto"
    # auto compares in float32, whatever the device would gain by: file and verdict are the same everywhere
    exact = config.model.model_copy(update={"dtype": "float32"})
    model, tokenizer = load_model(config.model if named else exact)
    batches = [tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in texts[:MAX_MERGE_PROMPTS]]
    expected = _log_probs(model, batches)
    compared = model.get_base_model().dtype
    written = compared if named else _dtype_of_files(model_folder(config.model.path))
    del model  # makes room for the second one
    model, _ = load_model(exact)
    # rounded to what is written, then compared in what base plus adapter were computed in: no cast up changes a bit
    merged = _cast(_cast(_merged(model, config.model.adapter), written), compared)
    divergences = torch.cat(
        [
            (left.exp() * (left - right)).sum(dim=-1).flatten()
            for left, right in zip(expected, _log_probs(merged, batches), strict=True)
        ]
    ).clamp_min(0)  # rounding may leave a divergence just below 0
    mean_kl, max_kl = float(divergences.mean()), float(divergences.max())
    if not mean_kl <= max_mean_kl:  # NaN is refused too
        raise CheckpointError(
            f"the merged model differs from base plus adapter by {mean_kl:.2e} nats a token on average, more than "
            f"{max_mean_kl:.2e}; merge in float32 (model.dtype=float32) or keep the adapter apart"
        )
    recommended = model_folder(config.model.path) / "generation_config.json"
    aside = aside_of(target)
    aside.mkdir(parents=True, exist_ok=True)
    with removed_on_error(aside):
        _cast(merged, written).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if recommended.is_file():  # loading keeps its ids only
            shutil.copyfile(recommended, aside / recommended.name)
        names = model_hash(config.model.path), adapter_hash(config.model.adapter), dtype_name(written)
        card = merged_card(config, *names, (mean_kl, max_kl, divergences.numel()))
        (aside / "README.md").write_text(card, encoding="utf-8")
        os.replace(aside, target)  # which may be there and empty
    return MergeResult(target, mean_kl, max_kl, divergences.numel())


def _merged(model: Any, path: str) -> Any:
    """The base with the adapter in its weights. Raises ConfigError where PEFT cannot, CheckpointError for NaN."""
    import torch
    from peft.tuners.lora.layer import LoraLayer

    base = model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    inner, outer = (getattr(each, "base_layer", each) for each in (embeddings, head))
    # an update of one of them alone must not reach the other
    if getattr(inner, "weight", inner) is getattr(outer, "weight", None) and any(
        isinstance(each, LoraLayer) for each in (embeddings, head)
    ):
        outer.weight = torch.nn.Parameter(outer.weight.detach().clone(), requires_grad=False)
    try:
        merged = model.merge_and_unload()
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"model.adapter: {path} cannot be merged ({first_line(error)}); keep the adapter apart"
        ) from error
    for name, parameter in merged.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"model.adapter: {name} has NaN or infinity in it after merging {path}; the adapter or the base is damaged"
            )
    return merged


def _download(path: str) -> Path:
    if _is_local(path):
        raise ConfigError(f"model.path: there is no folder {path}; check the path")
    hub = require_library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(path, allow_patterns=list(_HUB_PATTERNS), ignore_patterns=list(_HUB_IGNORED)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: '{path}' is no folder here and cannot be read from the Hugging Face hub "
            f"({first_line(error)}); check the name, or download it while online"
        ) from error


def _load_problem(path: str, error: Exception) -> Exception:
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"model.path: {path} needs Python code that comes with the model, which is not run; use a model whose "
            "architecture transformers implements, or, if you have read that code, cpo-fast --trust-remote-code"
        )
    if "for this kind of AutoModel" in str(error):
        return ConfigError(
            f"model.path: transformers has no causal language model for {path} ({_class_name(error)}): a multimodal model, "
            "say, whose text part stands apart; save that part as a text model of its own, and set model.path to it"
        )
    return ConfigError(f"model.path: {path} cannot be loaded ({first_line(error)}); check the folder's files")


def _class_name(error: Exception) -> str:
    found = re.search(r"configuration class <class '[\w.]*?(\w+)'>", str(error))
    return found[1] if found else first_line(error)


def _dtype_of_files(folder: Path) -> "torch.dtype":
    """The dtype that most numbers of a model's files have. ConfigError where a sum cannot be rounded to it."""
    import torch

    numbers = numbers_by_dtype(folder)
    name = max(numbers, key=lambda each: numbers[each])
    # a sum of anything else (quantised weights) would not be the sum
    writable = {SAFETENSORS_NAMES[dtype]: getattr(torch, dtype) for dtype in ("float32", "bfloat16", "float16")}
    if name not in writable:
        raise ConfigError(
            f"model.path: the weights in {folder} are {name}, which a merged model cannot keep; name the dtype to write "
            "(model.dtype=float32 or bfloat16)"
        )
    dtype: torch.dtype = writable[name]
    return dtype


def _cast(model: Any, dtype: "torch.dtype") -> Any:
    for parameter in model.parameters():  # buffers stay as loading made them: rotary frequencies are float32
        parameter.data = parameter.data.to(dtype)
    return model


def _log_probs(model: Any, batches: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
    import torch

    with torch.inference_mode():
        return [torch.log_softmax(model(ids).logits.double(), dim=-1) for ids in batches]
