"""The bundle for a machine without a network: what is installed from it, and how the extension is had there."""

import json
import os
import sysconfig
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_bundle
from benchmarks.gpu_bundle import BUILT, CARRIED, MANIFEST, canonical, install, pins, sources_hash
from cpo_kernels import _csrc

EXTENSION = f"_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    tag = "py3-none-any"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    contents = files | {path: text.encode() for path, text in texts.items()}
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        for path, content in contents.items():
            archive.writestr(path, content)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the extension of a checkout goes that has none yet."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setattr(gpu_bundle, "EXTENSION_FOLDER", folder)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    make_wheel(folder, "carried_for_a_test", "1.0", {"carried_for_a_test.py": b"x = 1\n"})
    make_wheel(folder, "numpy", "0.1", {"numpy.py": b"old = True\n"})
    make_wheel(folder, "cpo_fast", "0.1.0", {f"cpo_kernels/{EXTENSION}": Path(_csrc.__file__).read_bytes()})
    (folder / MANIFEST).write_text(json.dumps({"sources": sources_hash()}))
    return folder


def test_what_is_missing_is_installed_and_what_is_newer_stays(bundle: Path, checkout: Path, tmp_path: Path) -> None:
    (checkout / EXTENSION).write_bytes(b"of earlier sources")
    os.utime(checkout / EXTENSION, (0, 0))
    install(bundle, tmp_path / "target")
    installed = {path.name for path in (tmp_path / "target").iterdir()}
    assert "carried_for_a_test.py" in installed
    assert "numpy.py" not in installed
    assert (checkout / EXTENSION).read_bytes() == Path(_csrc.__file__).read_bytes()


def test_a_wheel_of_other_sources_is_not_used_and_the_extension_is_compiled(
    bundle: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / MANIFEST).write_text(json.dumps({"sources": "others"}))
    compiler = tmp_path / "compiler"  # notes what it is asked for, and gives what was compiled before
    compiler.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\nfor last; do :; done\ncp {_csrc.__file__} "$last"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    install(bundle, tmp_path / "target")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [Path(word).name for word in asked if word.endswith(".cpp")] == [
        "attention.cpp", "bindings.cpp", "forest.cpp", "schedule.cpp", "tree_attention.cpp", "tree_decode.cpp",
        "nb_combined.cpp",
    ]  # fmt: skip
    assert all(Path(word.removeprefix("-I")).is_dir() for word in asked if word.startswith("-I"))
    assert f"-I{sysconfig.get_path('include')}" in asked
    assert (checkout / EXTENSION).exists()


def test_an_extension_that_can_be_had_in_no_way_is_an_error(
    bundle: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / MANIFEST).write_text(json.dumps({"sources": "others"}))
    (checkout / EXTENSION).write_bytes(b"not an extension")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SystemExit, match="neither be loaded from the bundle's wheel nor compiled"):
        install(bundle, tmp_path / "target")


def test_everything_that_is_carried_is_pinned() -> None:
    assert {canonical(name) for name in (*CARRIED, *BUILT)} <= pins().keys()
