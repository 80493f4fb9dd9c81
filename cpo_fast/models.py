"""Loading a causal language model, its tokenizer and an optional adapter; naming them by the hash of their files.

Every command loads models here, so that all of them see the same weights under the same rules: safetensors only (a
pickle is never opened), code shipped with a model runs only after `allow_remote_code` (the command-line flag), a weight
the files lack is an error instead of random numbers, and the sampling settings a model recommends are dropped (a
recommended repetition penalty would change greedy decoding as well as search). Everything that can go wrong becomes one
sentence with its remedy.

torch and transformers are imported inside the functions: this module is cheap to import. Quantised weights and
placement over several devices are left out.
"""

import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.config import ModelConfig
from cpo_fast.errors import CheckpointError, ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import torch

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
_READ_BYTES = 1 << 22  # a weight file is hashed in pieces: it need not fit into memory

_file_digests: dict[tuple[str, int, int], str] = {}


_remote_code_allowed = False


def allow_remote_code() -> None:
    """Let models of this process run the Python code in their folder; only the command-line flag calls this."""
    global _remote_code_allowed
    _remote_code_allowed = True


def resolve_device(name: str) -> "torch.device":
    """The torch device that `model.device` means.

    Args:
        name: `auto` (this process's CUDA device, by LOCAL_RANK or Slurm's SLURM_LOCALID under a launcher, if there is
            one, else cpu), or `cpu`, `cuda`, `cuda:N`.

    Raises:
        ConfigError: torch does not know such a device.
        EnvironmentProblem: torch is missing, or this machine has no such CUDA device.
    """
    torch = _require("torch")
    if name == "auto":
        name = f"cuda:{_local_rank(torch.cuda.device_count())}" if torch.cuda.is_available() else "cpu"
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


def _local_rank(num_devices: int) -> str:
    """This process's place on its node. Slurm may show each task one device only, whatever its place."""
    slurm = str(int(os.environ.get("SLURM_LOCALID", "0")) % max(1, num_devices))
    return os.environ.get("LOCAL_RANK", slurm)


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


def load_model(config: ModelConfig) -> tuple[Any, Any]:
    """Load model and tokenizer, in eval mode, with `sdpa` attention, on the configured device.

    Args:
        config: path, dtype, device and, if set, the adapter. The base takes `config.dtype`; adapter weights are fp32.

    Returns:
        (PreTrainedModel or, with an adapter, PeftModel; its tokenizer). The model's generation config keeps only its
        end, begin and padding ids.

    Raises:
        ConfigError: the path is wrong, or the folder holds what cannot be loaded (remote code, unknown architecture).
        CheckpointError: the weights are damaged or incomplete, or the adapter is missing or does not fit the model.
        EnvironmentProblem: a library or the device is missing.
    """
    torch, transformers = _require("torch"), _require("transformers")
    safetensors = _require("safetensors")
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where Triton launches, and graphs are recorded
    folder = model_folder(config.path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=_remote_code_allowed)
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=_remote_code_allowed,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        model.to(device)
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        raise EnvironmentProblem(f"model.path: {config.path} needs a missing library ({_first_line(error)})") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"model.path: the weights in {folder} are damaged ({_first_line(error)}); fetch or convert the model again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _load_problem(config.path, error) from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise CheckpointError(
            f"model.path: {config.path} lacks {len(missing)} weight(s) of its architecture, the first {missing[0]}; "
            "fetch the whole model"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ConfigError(
            f"model.path: the tokenizer in {config.path} has {len(tokenizer)} tokens, but the model embeds "
            f"{model.get_input_embeddings().num_embeddings}; they do not belong together"
        )
    stock = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stock.eos_token_id, bos_token_id=stock.bos_token_id, pad_token_id=stock.pad_token_id
    )
    if config.adapter is not None:
        model = _with_adapter(model, config.adapter)
    return model.eval(), tokenizer


def model_hash(path: str | Path) -> str:
    """16 hex digits that name a model: SHA-256 over the names and contents of its config, weight and tokenizer files.

    A copy in another folder has the same hash; one changed bit in a weight has another. File digests are kept in
    memory by path, size and modification time, so that a second call reads nothing.

    Raises:
        ConfigError: as `model_folder`.
    """
    folder = model_folder(str(path))
    names = {"config.json", "generation_config.json", *_TOKENIZER_FILES}
    files = [
        file for file in folder.iterdir() if file.is_file() and (file.name in names or _holds_weights_or_pieces(file))
    ]
    return _combined_hash({file.name: _file_digest(file) for file in files})


def adapter_hash(path: str | Path | None) -> str:
    """16 hex digits that name a PEFT adapter by its weights and settings; the empty string when there is none.

    The base model's path inside adapter_config.json does not count: the same adapter trained elsewhere is the same.

    Raises:
        CheckpointError: the folder is not a PEFT adapter in safetensors.
    """
    if path is None:
        return ""
    folder = _adapter_folder(str(path))
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json cannot be read ({_first_line(error)})") from None
    settings.pop("base_model_name_or_path", None)
    canonical = json.dumps(settings, sort_keys=True).encode()
    return _combined_hash(
        {
            "adapter_config.json": hashlib.sha256(canonical).hexdigest(),
            "adapter_model.safetensors": _file_digest(folder / "adapter_model.safetensors"),
        }
    )


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"cannot import {module} ({_first_line(error)}); install it with: pip install 'cpo-fast[train]'"
        ) from None


def _download(path: str) -> Path:
    """The local snapshot of hub id `path`; ConfigError when it is neither cached nor reachable, or is no hub id."""
    if path.startswith((".", "~", os.sep)) or path.count("/") > 1:
        raise ConfigError(f"model.path: there is no folder {path}; check the path")
    hub = _require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(path, allow_patterns=list(_HUB_PATTERNS), ignore_patterns=list(_HUB_IGNORED)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: '{path}' is no folder here and cannot be read from the Hugging Face hub "
            f"({_first_line(error)}); check the name, or download it while online"
        ) from error


def _load_problem(path: str, error: Exception) -> Exception:
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"model.path: {path} needs Python code that comes with the model, which is not run; use a model whose "
            "architecture transformers implements, or, if you have read that code, cpo-fast --trust-remote-code"
        )
    if "scaled_dot_product_attention" in str(error):
        architecture = _first_line(error).partition(" ")[0]
        return ConfigError(
            f"model.path: {path}: transformers has no sdpa attention for {architecture} (its attention is not a standard "
            "one: soft-capped scores, for instance), and every command computes with it; use another model"
        )
    return ConfigError(f"model.path: {path} cannot be loaded ({_first_line(error)}); check the folder's files")


def _adapter_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"model.adapter: there is no folder {path}; give the folder that training wrote")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"model.adapter: {path} holds no {name}; give a PEFT adapter saved as safetensors")
    return folder


def _with_adapter(model: Any, path: str) -> Any:
    """Wrap `model` by the adapter in folder `path`, refusing one whose weights are not exactly the ones needed."""
    peft, safetensors, torch = _require("peft"), _require("safetensors"), _require("torch")
    folder = _adapter_folder(path)
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder))
        with safetensors.safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
    except torch.OutOfMemoryError:
        raise
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"model.adapter: the weights in {path} are damaged ({_first_line(error)})") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"model.adapter: {path} does not fit the model ({_first_line(error)}); it was trained on another one"
        ) from error
    needed = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    # PEFT only warns here, and an adapter that is half applied looks like one that learnt nothing
    astray = sorted((needed - saved) | {key for key in saved - needed if "lora_" in key})
    if astray:
        raise CheckpointError(
            f"model.adapter: {len(astray)} weight(s) in {path} do not fit the model, the first {astray[0]}; "
            "the adapter was trained on another model"
        )
    return wrapped


def _holds_weights_or_pieces(file: Path) -> bool:
    return file.suffix in (".safetensors", ".model")


def _file_digest(file: Path) -> str:
    status = file.stat()
    key = (str(file.resolve()), status.st_mtime_ns, status.st_size)
    if key not in _file_digests:
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            for piece in iter(lambda: stream.read(_READ_BYTES), b""):
                digest.update(piece)
        _file_digests[key] = digest.hexdigest()
    return _file_digests[key]


def _combined_hash(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:240].rstrip(".")
