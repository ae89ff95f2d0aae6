# The one definition of every command; README, CONTRIBUTING and CI call these.

set shell := ["bash", "-euo", "pipefail", "-c"]

venv := justfile_directory() / ".venv"
extras := "--extra hf --extra demo --extra test --group dev"
wheel_env := justfile_directory() / "target/wheel-env"

export VIRTUAL_ENV := venv
export PATH := venv / "bin:" + env("PATH")

# List the commands
[private]
default:
    @{{ just_executable() }} --list --unsorted

# Everything that Python needs, into .venv: torch, transformers, the demo weights, the tools (a second when done)
setup:
    test -x "{{ venv }}/bin/python" || uv venv "{{ venv }}"
    uv pip install -r pyproject.toml {{ extras }}

# Build the Rust core and install the package from this folder into .venv
dev: setup
    maturin develop --uv --release

# Install, then run the main job on real weights: a 1,735-token prompt, every format beside the unquantized cache
demo *OPTIONS="": dev
    kvarn generate --model demo --compare --ladder --prompt-file examples/prompt.txt {{ OPTIONS }}

# Install, then run every test
check: test test-py

# Rust tests (names pick some)
test *NAMES="":
    cargo test -- {{ NAMES }}

# Python tests (pytest's options)
test-py *OPTIONS="": dev
    pytest {{ OPTIONS }}

# Formatting, clippy, rustdoc, ruff, types, stubs: no warnings
lint: dev
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    cargo clippy --all-targets --features python -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
    ruff check
    ruff format --check
    pyright
    python -m mypy.stubtest kvarn_rs._core --mypy-config-file pyproject.toml

# Format everything in place
fmt: setup
    cargo fmt
    ruff check --fix
    ruff format

# Rewrite the golden files from the code as it is; a change of bytes raises FORMAT_VERSION first
gen:
    KVARN_BLESS=1 cargo test --test '*golden*'

# Every causal language model of transformers, tiny, on a KvarnCache: writes docs/models.md (NAMES print some; --jobs N)
models *OPTIONS="": dev
    PYTHONPATH=tests/python python -m model_classes {{ OPTIONS }}

# Decode attention against torch on this machine (options of `kvarn bench attend`)
bench *OPTIONS="": dev
    kvarn bench attend {{ OPTIONS }}

# Paging, planning, sealing and attention in Rust (criterion's options and names)
bench-rust *OPTIONS="":
    cargo bench --bench paging --bench plan --bench seal --bench attend -- {{ OPTIONS }}

# Fuzz a target of fuzz/ from its corpus (libFuzzer's options; a nightly toolchain, cargo-fuzz). New finds go to target/fuzz
fuzz TARGET *OPTIONS="-max_total_time=60":
    mkdir -p target/fuzz/{{ TARGET }}
    RAYON_NUM_THREADS=1 cargo +nightly fuzz run {{ TARGET }} target/fuzz/{{ TARGET }} fuzz/corpus/{{ TARGET }} -- -max_len=8192 {{ OPTIONS }}

# Rust's own tests of everything but the kernels under Miri (a nightly toolchain with it)
miri *NAMES="archive:: format:: paging:: plan:: quant::":
    PROPTEST_CASES=8 MIRIFLAGS="-Zmiri-disable-isolation" cargo +nightly miri test --lib -- {{ NAMES }}

# What Miri cannot run, kernels and files, under the address sanitizer (a nightly toolchain)
asan *OPTIONS="--lib --test backend_parity --test sealing --test sealing_model --test cache_file --test cache_errors":
    RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --target x86_64-unknown-linux-gnu --target-dir target/asan {{ OPTIONS }}

# The release wheel, installed into an empty environment and started there: no torch, no numpy
wheel: setup
    rm -rf target/wheels
    maturin build --release --strip --out target/wheels
    uv venv --clear --quiet "{{ wheel_env }}"
    uv pip install --quiet --python "{{ wheel_env }}/bin/python" target/wheels/*.whl
    cd target && "{{ wheel_env }}/bin/python" -I ../tests/wheel_smoke.py
    cd target && "{{ wheel_env }}/bin/kvarn" --version
    cd target && "{{ wheel_env }}/bin/kvarn" doctor --json
    ls -l target/wheels

# All that a change must pass
all: lint check wheel

# What CI runs, from a clone with nothing installed
ci:
    bash .ci/run

# Remove what was built; .venv stays
clean:
    cargo clean
    rm -f python/kvarn_rs/*.so
