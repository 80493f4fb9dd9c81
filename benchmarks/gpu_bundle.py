"""What a machine with torch, Triton, Transformers and pytest lacks, as one folder of wheels that needs no network there.

`build` makes this project's wheel by its own build and fetches the others, at the versions of constraints.txt, for every
Python that the project is asked for. `install` puts what the machine lacks, or has older, into a folder, and sees to it
that the checkout's extension can be loaded: from the project's wheel where it was built for this Python from the same
sources, else compiled on the spot, for which the compiler and headers are there that Triton needs itself.

    python -m benchmarks.gpu_bundle build build/gpu-bundle
    python -m benchmarks.gpu_bundle install build/gpu-bundle TARGET
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 40 * 10**6
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12)), "manylinux2014_x86_64")
CARRIED = (  # by what needs them
    "peft", "accelerate", "psutil",  # the training step; LoRA while searching
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection",  # configurations
    "trl", "datasets", "dill", "multiprocess", "xxhash",  # the peer; its data library, where pyarrow and pandas are there
    "liger-kernel", "cut-cross-entropy",  # peers of the log-prob op
    "click", "rich", "markdown-it-py", "mdurl",  # the command line
    "einops", "hjson", "msgpack", "ninja", "py-cpuinfo",  # DeepSpeed, which is built here: it is published as source
    "nanobind",  # the extension, where it is compiled on the spot
)  # fmt: skip
BUILT = ("deepspeed",)
EXTENSION_FOLDER = ROOT / "kernels" / "cpo_kernels"
MANIFEST = "bundle.json"
LOADED_SUFFIXES = tuple(EXTENSION_SUFFIXES[:-1])  # of this very Python and of the stable ABI; the last is a bare ".so"


def pins() -> dict[str, str]:
    """Versions of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def sources_hash() -> str:
    """SHA-256 of the extension's sources."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(folder: Path) -> None:
    """Fill an empty folder.

    Raises:
        SystemExit: the bundle is larger than MAX_BYTES; it is left as it is.
        subprocess.CalledProcessError: pip failed.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    wheel = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder))
    subprocess.run([*wheel, str(ROOT)], check=True)
    versions = pins()
    # without its compiled ops DeepSpeed is Python alone; what it needs of them it compiles when asked
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    subprocess.run([*wheel, *(f"{name}=={versions[name]}" for name in BUILT)], check=True, env=environment)
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    download += ["--implementation", "cp", *(f"--platform={platform}" for platform in PLATFORMS)]
    wanted = [f"{name}=={versions[canonical(name)]}" for name in CARRIED]
    for python in PYTHONS:
        subprocess.run([*download, f"--python-version={python}", *wanted], check=True)
    manifest = {"sources": sources_hash(), "pythons": PYTHONS, "python_of_wheel": sysconfig.get_config_var("SOABI")}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sizes = sorted(((path.stat().st_size, path.name) for path in folder.iterdir()), reverse=True)
    total = sum(size for size, _ in sizes)
    listed = "\n".join(f"{size / 1e6:8.2f} MB  {name}" for size, name in sizes)
    sys.stdout.write(f"{listed}\n{total / 1e6:8.2f} MB  in all, at most {MAX_BYTES / 1e6:.0f}\n")
    if total > MAX_BYTES:
        sys.exit(f"the bundle has {total / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} were meant to be carried")


def install(folder: Path, target: Path) -> None:
    """Install what is missing into `target`, and make the checkout's extension loadable.

    Raises:
        SystemExit: the extension cannot be had.
    """
    wheels = {canonical(path.name.split("-")[0]): path.name.split("-")[1] for path in sorted(folder.glob("*.whl"))}
    wanted = [f"{name}=={version}" for name, version in wheels.items() if name != "cpo-fast" and _lacks(name, version)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    pip += ["--disable-pip-version-check", "--root-user-action=ignore", "--find-links", str(folder)]
    pip += ["--target", str(target)]
    if wanted and subprocess.run([*pip, *wanted]).returncode:
        for one in wanted:  # what has no wheel for this Python keeps nothing else back
            if subprocess.run([*pip, one]).returncode:
                sys.stdout.write(f"could not be installed: {one}\n")
    sys.stdout.write(f"installed into {target}: {', '.join(wanted) or 'nothing, all is there'}\n")
    if loads_extension():
        return
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for wheel in folder.glob("cpo_fast-*.whl") if manifest["sources"] == sources_hash() else ():
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("cpo_kernels/_csrc") and name.endswith(LOADED_SUFFIXES):
                    (EXTENSION_FOLDER / Path(name).name).write_bytes(archive.read(name))
    if not loads_extension():
        compile_extension(target)
    if not loads_extension():
        sys.exit("the extension csrc/ can neither be loaded from the bundle's wheel nor compiled here")


def _lacks(name: str, version: str) -> bool:
    """Whether this machine has no such distribution, or an older one."""
    try:
        present = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return _numbers(present) < _numbers(version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def loads_extension() -> bool:
    """Whether the checkout has its extension, newer than its sources, and a new process can load it."""
    code = (
        "import sys, importlib.machinery as m, importlib.util as u\n"
        "loader = m.ExtensionFileLoader('_csrc', sys.argv[1])\n"
        "loader.exec_module(u.module_from_spec(u.spec_from_loader('_csrc', loader)))"
    )
    paths = [EXTENSION_FOLDER / f"_csrc{suffix}" for suffix in LOADED_SUFFIXES]
    path = next((path for path in paths if path.exists()), paths[0])
    newest = max(source.stat().st_mtime for source in (ROOT / "csrc").iterdir())
    current = path.exists() and path.stat().st_mtime >= newest
    return current and subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def compile_extension(installed: Path) -> None:
    """Compile csrc/ with nanobind's sources, from `installed` or from this Python's packages, into the checkout."""
    code = "import nanobind; print(nanobind.include_dir())"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((found for found in map(shutil.which, filter(None, names)) if found), None)
    if compiler is None or answer.returncode:
        sys.stdout.write("the extension cannot be compiled: no C++ compiler, or nanobind is missing\n")
        return
    nanobind = Path(answer.stdout.strip())
    includes = [sysconfig.get_path("include"), nanobind, nanobind.parent / "ext" / "robin_map" / "include"]
    files = [*sorted((ROOT / "csrc").glob("*.cpp")), nanobind.parent / "src" / "nb_combined.cpp"]
    output = EXTENSION_FOLDER / f"_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-DNDEBUG"]
    flags += ["-DCPO_SET=baseline", "-pthread"]  # attention on a CPU for one instruction set: here it only has to work
    command = [compiler, *flags, *(f"-I{path}" for path in includes), *map(str, files), "-o", str(output)]
    status = subprocess.run(command).returncode
    sys.stdout.write(f"compiled the extension: {'done' if status == 0 else f'exit code {status}'}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Build or install."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "install"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path, help="of the bundle")
        if name == "install":
            command.add_argument("target", type=Path, help="folder that the packages go to")
    arguments = parser.parse_args(argv)
    if arguments.command == "build":
        build(arguments.folder)
    else:
        install(arguments.folder, arguments.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
