"""`kvarn doctor`: checks the installation and reports what this machine supports.

JSON: ``{"version", "simd_level", "threads", "formats": [str], "cuda": {"found", "driver_version", "devices": [{"name",
"compute_capability", "memory_bytes"}], "reason"}, "packages": {NAME: {"version", "supported", "in_range"}},
"vllm_plugin": {"found", "entry_point", "reason"}, "vllm_run": {"status": "passed" | "failed" | "skipped", "detail"},
"demo": {"found", "reason"}, "self_test": {"status": "passed" | "failed" | "skipped", "detail"}, "ok"}``

`version` and `in_range` are null for packages that are not installed, `supported` and `in_range` for packages that this
release has no requirement for. `reason` is null on success. `vllm_run` is what `--vllm` runs, in a process of its own:
vLLM on a tiny random model, with kvarn's formats and with its own cache. `ok` is false, and the exit code 1, if the
self-test or this run failed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

from ..errors import ConfigError
from ..vllm import TESTED_VERSIONS, is_tested
from .console import Console, add_output_options
from .demo import find_weights
from .sizes import format_bytes

_PACKAGES = ("numpy", "torch", "transformers", "vllm")
# Of a run of vLLM, which takes 30 to 40 seconds of CPU time.
RUN_TIMEOUT_S = 600
# Largest error of attention on the cache against attention on the decoded cache, relative to the largest output.
SELF_TEST_TOLERANCE = 2e-3
# Largest error of V, by format. Rows of normally distributed values have a range of 5 to 8, quantized in 255 or in 15
# steps; with 15, V is rotated too, so that the errors of a row add up.
ROUNDING_LIMITS = {"int8": 0.1, "int4": 0.8}


def add_parser(commands: Any) -> None:
    """Adds `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="check the installation",
        description="Report version, SIMD level, CUDA driver, packages and demo weights, and run a self-test of "
        "attention.",
    )
    parser.add_argument(
        "--vllm", action="store_true", help="also run a tiny random model in vLLM with kvarn's formats (a minute)"
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    from .. import FORMATS, __version__, _core

    with console.progress("checking"):
        self_test = attention_self_test()
        report: dict[str, Any] = {
            "version": __version__,
            "simd_level": _core.simd_level(),
            "threads": _core.num_threads(),
            "formats": list(FORMATS),
            "cuda": cuda_driver(),
            "packages": {name: package(name) for name in _PACKAGES},
            "vllm_plugin": vllm_plugin(),
            "vllm_run": run_vllm() if arguments.vllm else {"status": "skipped", "detail": "run it with --vllm"},
            "demo": demo_weights(),
            "self_test": self_test,
        }
        report["ok"] = "failed" not in (self_test["status"], report["vllm_run"]["status"])
    console.result(report)
    _print(report, console)
    return 0 if report["ok"] else 1


def cuda_driver() -> dict[str, Any]:
    """The CUDA driver's version and devices, from the driver's library; or the reason why there are none."""
    found: dict[str, Any] = {"found": False, "driver_version": None, "devices": [], "reason": None}
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return {**found, "reason": " ".join(str(error).split())}
    if code := driver.cuInit(0):
        return {**found, "reason": f"cuInit failed with {_cuda_error(driver, code)}"}
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    found.update(found=True, driver_version=f"{number.value // 1000}.{number.value % 1000 // 10}")
    driver.cuDeviceGetCount(ctypes.byref(number))
    found["devices"] = [_cuda_device(driver, ordinal) for ordinal in range(number.value)]
    return found


def _cuda_error(driver: Any, code: int) -> str:
    name = ctypes.c_char_p()
    if driver.cuGetErrorName(code, ctypes.byref(name)) or name.value is None:
        return f"code {code}"
    return f"{name.value.decode()} ({code})"


def _cuda_device(driver: Any, ordinal: int) -> dict[str, Any]:
    device, number, name, memory = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    return {
        "name": name.value.decode(errors="replace"),
        "compute_capability": ".".join(capability),
        "memory_bytes": memory.value,
    }


def package(name: str) -> dict[str, Any]:
    """A package's version, and whether this release supports it."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if name == "vllm":
        supported = ", ".join(f"{release}.x" for release in TESTED_VERSIONS)
        return {"version": version, "supported": supported, "in_range": None if version is None else is_tested(version)}
    supported = supported_range(name)
    in_range = within(version, supported) if version is not None and supported is not None else None
    return {"version": version, "supported": supported, "in_range": in_range}


def vllm_plugin() -> dict[str, Any]:
    """Whether vLLM would find the plugin: the entry point is installed, names what there is, and is not left out."""
    found = [point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "kvarn"]
    if not found:
        reason = "no entry point: install kvarn-rs with pip, in the environment of vLLM"
        return {"found": False, "entry_point": None, "reason": reason}
    try:
        found[0].load()
    except Exception as error:  # whatever is wrong with it
        return {"found": False, "entry_point": found[0].value, "reason": f"{found[0].value}: {error}"}
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and found[0].name not in chosen.split(","):
        reason = f"VLLM_PLUGINS is {chosen!r}: it must name {found[0].name!r}, or be unset"
        return {"found": False, "entry_point": found[0].value, "reason": reason}
    return {"found": True, "entry_point": found[0].value, "reason": None}


def run_vllm() -> dict[str, str]:
    """Runs vLLM of this environment with kvarn's formats, and compares the distribution of a token with vLLM's own."""
    from ..vllm.check import MOST_DIVERGENCE

    found = package("vllm")
    if found["version"] is None:
        return {"status": "failed", "detail": "vllm is not installed in the environment of this command"}
    if not found["in_range"]:
        detail = f"vLLM {found['version']} is not a tested release ({found['supported']}): the plugin is disabled in it"
        return {"status": "failed", "detail": detail}
    plugin = vllm_plugin()
    if not plugin["found"]:
        return {"status": "failed", "detail": plugin["reason"]}
    command = [sys.executable, "-m", "kvarn_rs.vllm.check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "detail": f"vLLM did not end within {RUN_TIMEOUT_S} seconds"}
    result = _result_in(done.stdout)
    if result is None:
        said = (done.stderr.split("\n\n")[-1].splitlines() or [""])[-1]
        return {"status": "failed", "detail": f"vLLM ended with code {done.returncode}: {said}"}
    if result["error"] is not None:
        return {"status": "failed", "detail": " ".join(result["error"].split())}
    passed = all(result["divergence"][name] <= most for name, most in MOST_DIVERGENCE.items())
    figures = ", ".join(
        f"{name} {result['divergence'][name]:.1e} (at most {most:.0e})" for name, most in MOST_DIVERGENCE.items()
    )
    detail = f"vLLM {result['version']}: KL divergence from its own cache: {figures}"
    return {"status": "passed" if passed else "failed", "detail": detail}


def _result_in(stdout: str) -> dict[str, Any] | None:
    """The last line that is what `kvarn_rs.vllm.check` prints: what vLLM logs as it ends may come after it."""
    for line in reversed(stdout.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "divergence" in found:
            return found
    return None


def supported_range(name: str) -> str | None:
    """The version range of a package in this distribution's extras, such as `>=5.16,<6`."""
    try:
        requirements = importlib.metadata.requires("kvarn-rs") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)\s*\(?([<>=!~][^;)]*)?", requirement)
        if match and match[1].lower() == name and match[2]:
            return match[2].strip()
    return None


def within(version: str, specifier: str) -> bool:
    """Whether a version satisfies a list of `>=`, `>`, `<=`, `<` bounds. Suffixes such as `rc1` are ignored."""
    found = _numbers(version)
    for bound in specifier.split(","):
        match = re.fullmatch(r"\s*(>=|>|<=|<)\s*([0-9.]+)\s*", bound)
        if match is None:
            continue
        limit = _numbers(match[2])
        length = max(len(found), len(limit))
        left, right = (numbers + (0,) * (length - len(numbers)) for numbers in (found, limit))
        if not {">=": left >= right, ">": left > right, "<=": left <= right, "<": left < right}[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def demo_weights() -> dict[str, Any]:
    """Whether the demo model's weights are installed and intact."""
    try:
        find_weights()
    except ConfigError as error:
        return {"found": False, "reason": str(error)}
    return {"found": True, "reason": None}


def attention_self_test() -> dict[str, str]:
    """Compares attention over pages and tiles with softmax(q k') v on the decoded keys and values."""
    if importlib.util.find_spec("numpy") is None:
        return {"status": "skipped", "detail": "numpy is not installed"}
    passed, details = True, []
    for name, most_rounding in ROUNDING_LIMITS.items():
        error, rounding = _attention_error(name)
        passed &= error <= SELF_TEST_TOLERANCE and rounding <= most_rounding
        details.append(f"{name}: relative error {error:.1e}, largest rounding of V {rounding:.1e}")
    detail = f"{'; '.join(details)} (error at most {SELF_TEST_TOLERANCE:.0e})"
    return {"status": "passed" if passed else "failed", "detail": detail}


def _attention_error(name: str) -> tuple[float, float]:
    """The largest error of attention to 200 tokens, relative to the largest output, and the largest error of V."""
    import numpy as np

    from .. import PagedKvCache

    num_kv_heads, head_dim, num_tokens = 2, 64, 200
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, num_kv_heads, num_tokens, head_dim), dtype=np.float32)
    q = rng.standard_normal((1, 2 * num_kv_heads, 1, head_dim), dtype=np.float32)
    cache = PagedKvCache(num_layers=1, num_kv_heads=num_kv_heads, head_dim=head_dim, format=name)
    sequence = cache.new_sequence()
    with cache.begin_step([sequence], num_tokens - 1) as step:
        step.append(0, k[:, :, :-1], v[:, :, :-1])
    with cache.begin_step([sequence], 1) as step:  # seals the first block, in formats that seal
        step.append(0, k[:, :, -1:], v[:, :, -1:])
        out = np.asarray(step.attend(0, q, None, None))
    stored_k, stored_v = np.empty_like(k), np.empty_like(v)
    cache.dequantize(0, sequence, stored_k, stored_v)
    scores = q.reshape(num_kv_heads, 2, head_dim) @ stored_k[0].transpose(0, 2, 1) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ stored_v[0]
    error = np.abs(out.reshape(expected.shape) - expected).max() / np.abs(expected).max()
    return float(error), float(np.abs(stored_v - v).max())


def _print(report: dict[str, Any], console: Console) -> None:
    cuda, demo, test = report["cuda"], report["demo"], report["self_test"]
    rows = [
        ("kvarn-rs", report["version"], f"formats {', '.join(report['formats'])}"),
        ("CPU", report["simd_level"], f"{report['threads']} threads"),
    ]
    if cuda["found"]:
        count = len(cuda["devices"])
        rows.append(("CUDA driver", cuda["driver_version"], f"{count} devices; this release runs on the CPU"))
        rows += [
            ("", f"sm {device['compute_capability']}", f"{device['name']}, {format_bytes(device['memory_bytes'])}")
            for device in cuda["devices"]
        ]
    else:
        rows.append(("CUDA driver", "not found", f"{cuda['reason']}; this release runs on the CPU"))
    for name, found in report["packages"].items():
        if found["supported"] is None:
            remark = "optional"
        else:
            remark = f"supported: {found['supported']}"
            if found["in_range"] is False:
                remark += ": NOT IN THIS RANGE"
        rows.append((name, found["version"] or "not installed", remark))
    plugin = report["vllm_plugin"]
    rows.append(("vLLM plugin", "found" if plugin["found"] else "not found", plugin["reason"] or plugin["entry_point"]))
    rows.append(("vLLM run", report["vllm_run"]["status"], report["vllm_run"]["detail"]))
    rows.append(("demo weights", "found" if demo["found"] else "not found", demo["reason"] or ""))
    rows.append(("self-test", test["status"], test["detail"]))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row in rows:
        console.line(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip())
