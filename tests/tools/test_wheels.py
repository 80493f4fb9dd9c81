"""What is installed: one version, the packages' files and no others in a wheel, a source archive that builds."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import cpo_fast
from cpo_fast.cli import cli
from tools import wheels

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = Path(importlib.metadata.distribution("click").locate_file("")).resolve()


def built(kind: str, folder: Path) -> Path:
    """An archive of this checkout, made by the build system with the compiler that is here."""
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    command = [sys.executable, "-c", wheels.BUILD.format(kind), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def rewritten(wheel: Path, folder: Path, changed: dict[str, bytes | None], name: str | None = None) -> Path:
    """The wheel with members replaced, added, or (None) left out."""
    path = folder / (name or wheel.name)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(path, "w") as new:
        for member in {*old.namelist(), *changed}:
            content = changed[member] if member in changed else old.read(member)
            if content is not None:
                new.writestr(member, content)
    return path


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    entries = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert entries[0] == cpo_fast.__version__
    assert CliRunner().invoke(cli, ["--version"]).output.split()[-1] == cpo_fast.__version__


def test_a_wheel_holds_the_tracked_files_of_the_packages_and_one_extension(wheel: Path) -> None:
    """The tags and the machine too; no tests, no benchmarks, nothing that git does not know."""
    assert wheels.faults(wheel, cpo_fast.__version__) == []
    assert {"cpo_fast/demo/reasoner/base-0/model.safetensors", "cpo_kernels/__init__.py"} <= wheels.package_files()


def test_a_wheel_says_its_version_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"cpo_fast-{cpo_fast.__version__}.dist-info"
        assert f"\nVersion: {cpo_fast.__version__}\n" in archive.read(f"{info}/METADATA").decode()
        assert "cpo-fast=cpo_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode().replace(" ", "")
        assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_what_is_wrong_with_a_wheel_is_named(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = (name for name in archive.namelist() if name.endswith(".so"))
        other = bytearray(archive.read(extension))
    other[18:20] = b"\xb7\x00"  # aarch64 in ELF's header
    changed = {"cpo_fast/tree.py": None, "tests/test_tree.py": b"", extension: bytes(other)}
    found = wheels.faults(rewritten(wheel, tmp_path, changed), cpo_fast.__version__)
    assert f"{wheel.name}: cpo_fast/tree.py is tracked and not in the wheel" in found
    assert f"{wheel.name}: tests/test_tree.py is in the wheel and not tracked" in found
    assert f"{wheel.name}: its extension is for aarch64" in found
    renamed = wheel.name.replace("linux_", "manylinux_2_28_")
    (sentence,) = wheels.faults(rewritten(wheel, tmp_path, {}, renamed), cpo_fast.__version__)
    assert "expected the tags" in sentence
    (sentence,) = wheels.faults(rewritten(wheel, tmp_path, {extension: None}), cpo_fast.__version__)
    assert "expected one compiled extension" in sentence
    (sentence,) = wheels.faults(wheel, "9.9.9")
    assert "its version is not 9.9.9" in sentence


def test_the_source_archive_holds_what_a_build_needs(tmp_path: Path) -> None:
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    packages = {name.replace("cpo_kernels/", "kernels/cpo_kernels/", 1) for name in wheels.package_files()}
    assert sources | packages | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"} <= names
    assert [name for name in names if name.endswith(".so") or name.startswith((".venv", "build/", "runs/"))] == []


@pytest.mark.soak
@pytest.mark.parametrize("made_from", ["checkout", "source archive"])
def test_the_demonstration_runs_from_a_wheel_where_there_is_no_compiler(made_from: str, tmp_path: Path) -> None:
    """In a new environment and an empty folder, outside the checkout; the other packages are those of this environment."""
    folder, empty, environment = tmp_path / "built", tmp_path / "empty", tmp_path / "environment"
    empty.mkdir()
    folder.mkdir()
    if made_from == "checkout":
        built("wheel", folder)
    else:
        (tmp_path / "sdist").mkdir()
        archive = built("sdist", tmp_path / "sdist")
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, archive]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run([str(word) for word in pip], env=os.environ | {"PATH": path}, check=True, cwd=empty)
    (wheel,) = folder.iterdir()
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    bare = {"PATH": str(environment / "bin"), "HOME": str(empty), "CC": "false", "CXX": "false", "HF_HUB_OFFLINE": "1"}
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{DEPENDENCIES}\n")  # their own .pth files are not read
    for name in ("cc", "c++", "gcc", "cmake", "ninja"):
        assert shutil.which(name, path=bare["PATH"]) is None
    install = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", wheel]
    subprocess.run([str(word) for word in install], env=bare, cwd=empty, check=True)
    where = [str(python), "-c", "import cpo_fast, cpo_kernels._csrc as c; print(cpo_fast.__file__); print(c.__file__)"]
    for line in subprocess.run(where, env=bare, cwd=empty, check=True, capture_output=True, text=True).stdout.split():
        assert line.startswith(str(site_packages))
    demo = [str(environment / "bin" / "cpo-fast"), "demo"]
    done = subprocess.run(demo, env=bare, cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right" in done.stdout
