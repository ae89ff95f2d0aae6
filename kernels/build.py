# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "nvidia-cuda-nvrtc-cu12==12.0.140",
#     "nvidia-cuda-runtime-cu12==12.0.146",
#     "rich==14.2.0",
#     "zstandard==0.25.0",
# ]
# ///
"""Compiles kernels/*.cu with NVRTC, without a GPU, nvcc or a host compiler: `just kernels` runs this file with uv.

Writes prebuilt/MODULE.TARGET.zst, a cubin or PTX for each target, and manifest.json: the hashes of all sources and
results, and what each kernel takes. Modules whose sources have not changed are left as they are. NVRTC 12.0 writes PTX
of ISA 8.0, which drivers from R525 on take, and cubins that all drivers of CUDA 12 and 13 take.
"""

import argparse
import ctypes
import hashlib
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

KERNELS = Path(__file__).parent
PREBUILT = KERNELS / "prebuilt"
MANIFEST = KERNELS / "manifest.json"
COMPILER = "NVRTC 12.0.140, headers 12.0.146"
CUBINS = ["sm_80", "sm_86", "sm_89", "sm_90"]
PTX = ["compute_80", "compute_90"]
OPTIONS = ["--std=c++17"]
# Assertions only: compiled, and not shipped.
CHECKS = {"layout_check"}
PROCESSES = 2

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def sources(path: Path) -> set[Path]:
    """The file and the files of this folder that it includes."""
    found, todo = set(), [path]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in INCLUDE.findall(file.read_text()):
            candidates = [folder / name for folder in (file.parent, KERNELS)]
            todo += [candidate.resolve() for candidate in candidates if candidate.exists()][:1]
    return found


def digest(data: bytes) -> str:
    """The hash of sources and results."""
    return hashlib.sha256(data).hexdigest()


def compile_kernel(module: str, target: str) -> tuple[bytes, str]:
    """A module's cubin or PTX, and the compiler's log."""
    import nvidia  # a namespace of both wheels

    folder = Path(next(iter(nvidia.__path__)))
    nvrtc = ctypes.CDLL(str(folder / "cuda_nvrtc/lib/libnvrtc.so.12"))

    def call(name: str, *arguments: object) -> int:
        return getattr(nvrtc, name)(*arguments)

    def text(size: str, get: str) -> bytes:
        length = ctypes.c_size_t()
        call(size, program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        call(get, program, buffer)
        return buffer.raw

    program, source = ctypes.c_void_p(), (KERNELS / f"{module}.cu").read_bytes()
    call("nvrtcCreateProgram", ctypes.byref(program), source, f"{module}.cu".encode(), 0, None, None)
    options = [*OPTIONS, f"--gpu-architecture={target}", f"-I{KERNELS}", f"-I{folder / 'cuda_runtime/include'}"]
    if target in CUBINS:
        options.append("--ptxas-options=-v")
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = call("nvrtcCompileProgram", program, len(options), arguments)
    log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
    if failed:
        raise SystemExit(f"{module}.cu for {target}:\n{log}")
    if target in CUBINS:
        return text("nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
    return text("nvrtcGetPTXSize", "nvrtcGetPTX"), log


def usage(log: str) -> dict[str, list[int]]:
    """Of each kernel: registers, bytes of static shared memory, bytes spilled."""
    found = {}
    for entry in ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spilled = int(entry["stores"]) + int(entry["loads"])
        found[entry["name"]] = [int(entry["registers"]), int(shared[1]) if shared else 0, spilled]
    return found


def run(jobs: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[bytes, str]]:
    """Compiles modules for targets, the longest sources first."""
    from rich.progress import Progress

    done = {}
    jobs = sorted(jobs, key=lambda job: -sum(file.stat().st_size for file in sources(KERNELS / f"{job[0]}.cu")))
    with Progress(transient=not sys.stderr.isatty()) as progress, ProcessPoolExecutor(PROCESSES) as pool:
        bar = progress.add_task("compiling", total=len(jobs))
        futures = {pool.submit(compile_kernel, *job): job for job in jobs}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            progress.update(bar, advance=1, description=" ".join(futures[future]))
    return done


def build(everything: bool) -> None:
    """Compiles what has changed, or everything, and writes the results and the manifest."""
    import zstandard

    before = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    known = before.get("modules", {}) if before.get("compiler") == COMPILER else {}
    modules = {}
    for path in sorted(KERNELS.glob("*.cu")):
        files = {str(file.relative_to(KERNELS)): digest(file.read_bytes()) for file in sorted(sources(path))}
        modules[path.stem] = {"sources": files}
    changed = [
        name
        for name, module in modules.items()
        if everything or known.get(name, {}).get("sources") != module["sources"]
    ]
    jobs = [(name, target) for name in changed for target in (PTX[:1] if name in CHECKS else CUBINS + PTX)]
    built = run(jobs)
    PREBUILT.mkdir(exist_ok=True)
    for name, module in modules.items():
        if name in CHECKS:
            continue
        if name not in changed:
            modules[name] = known[name]
            continue
        module["results"] = {}
        kernels: dict[str, dict[str, list[int]]] = {}
        for target in CUBINS + PTX:
            data, log = built[name, target]
            packed = zstandard.ZstdCompressor(level=19).compress(data)
            (PREBUILT / f"{name}.{target}.zst").write_bytes(packed)
            module["results"][target] = digest(packed)
            for kernel, numbers in usage(log).items():
                kernels.setdefault(kernel, {})[target] = numbers
        module["kernels"] = kernels
    for path in PREBUILT.glob("*.zst"):
        if path.name.split(".")[0] not in modules:
            path.unlink()
    MANIFEST.write_text(render({"compiler": COMPILER, "options": OPTIONS, "modules": modules}))
    spilled = [kernel for module in modules.values() for kernel in spills(module.get("kernels", {}))]
    size = sum(path.stat().st_size for path in PREBUILT.glob("*.zst"))
    print(f"{len(jobs)} compilations, {size / 2**20:.2f} MiB in {PREBUILT}")
    if spilled:
        raise SystemExit("\n".join(spilled))


def spills(kernels: dict[str, dict[str, list[int]]]) -> list[str]:
    """The kernels that spill registers."""
    return [
        f"{name} spills {numbers[2]} bytes of registers on {target}"
        for name, targets in kernels.items()
        for target, numbers in targets.items()
        if numbers[2]
    ]


def render(manifest: dict) -> str:
    """JSON with a kernel a line: registers, bytes of shared memory and bytes spilled, by target."""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    return re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n"


def check(target: str) -> None:
    """Compiles all modules for one target: no spills, and no more registers than the manifest says."""
    manifest = json.loads(MANIFEST.read_text())["modules"]
    names = [path.stem for path in KERNELS.glob("*.cu")]
    wrong = [f"{name}.cu is not in the manifest: run `just kernels`" for name in names if name not in manifest]
    for (name, _), (_, log) in run([(name, target) for name in names if name in manifest]).items():
        known = manifest[name].get("kernels", {})
        for kernel, numbers in usage(log).items():
            wrong += spills({kernel: {target: numbers}})
            recorded = known.get(kernel, {}).get(target)
            if recorded is None:
                wrong.append(f"{kernel} is not in the manifest: run `just kernels`")
            elif numbers[0] > recorded[0]:
                wrong.append(f"{kernel} takes {numbers[0]} registers on {target}, {recorded[0]} by the manifest")
    if wrong:
        raise SystemExit("\n".join(wrong))


def main() -> None:
    """Builds, or with --check compares with what was built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="compile modules that have not changed, too")
    parser.add_argument(
        "--check", nargs="?", const="sm_90", choices=CUBINS, help="compile for one target, write nothing"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.check:
        check(arguments.check)
    else:
        build(arguments.all)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
