"""The installed package: light imports, types, the command and the version."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import kvarn_rs


def test_importing_the_package_imports_no_heavy_one() -> None:
    code = "import sys, kvarn_rs; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "kvarn_rs" in names
    assert not {"torch", "numpy", "transformers", "vllm", "rich"} & set(names)


def test_the_version_is_the_distribution_s() -> None:
    assert kvarn_rs.__version__ == importlib.metadata.version("kvarn-rs")


def test_every_public_name_is_there() -> None:
    assert {"PagedKvCache", "Step", "FORMATS", "__version__", "KvarnError", "OutOfBlocksError"} <= set(kvarn_rs.__all__)
    missing = [name for name in kvarn_rs.__all__ if not hasattr(kvarn_rs, name)]
    assert not missing


def test_the_command_is_installed() -> None:
    entries = importlib.metadata.entry_points(group="console_scripts", name="kvarn")
    assert [entry.value for entry in entries] == ["kvarn_rs.cli:main"]
    script = Path(sys.executable).with_name("kvarn")
    shown = subprocess.run([script, "--version"], check=True, capture_output=True, text=True).stdout
    assert kvarn_rs.__version__ in shown


def test_type_checkers_find_the_types() -> None:
    package = Path(kvarn_rs.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()
