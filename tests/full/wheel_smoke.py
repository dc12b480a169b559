"""What tests/full/wheels.py runs in each environment: training, files, merging and commands of an installed wheel.

python -P wheel_smoke.py README.md   (in an empty folder, where nothing of the repository is on the path)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jaxadapt

OPTIONAL = ("jaxadapt.demo", "jaxadapt.__main__")  # the first needs an extra, the second runs a command


def check_the_place() -> None:
    """The installed package is the only one on the path, and all its modules load."""
    site = Path(sysconfig.get_path("purelib"))
    assert Path(jaxadapt.__file__).parent == site / "jaxadapt", jaxadapt.__file__
    found = [entry for entry in sys.path if Path(entry, "jaxadapt").exists() and Path(entry) != site]
    assert found == [], found
    assert importlib.metadata.version("jaxadapt") == jaxadapt.__version__
    names = [module.name for module in pkgutil.walk_packages(jaxadapt.__path__, "jaxadapt.")]
    assert len(names) > 150
    for name in names:
        if not name.startswith(OPTIONAL):
            importlib.import_module(name)


def run_readme(page: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """README's programs for NNX and Linen, which train, save and load; return their variables."""
    nnx, linen, *_ = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    ran: list[dict[str, Any]] = []
    for name, code in (("nnx", nnx), ("linen", linen)):
        Path(name).mkdir()
        variables: dict[str, Any] = {}
        exec(compile(code.replace('"out/"', f'"{name}/"'), name, "exec"), variables)
        ran.append(variables)
    return ran[0], ran[1]


def check_the_file(folder: Path, base: dict[str, Any], x: Any, output: Any) -> None:
    """The file has PEFT's names and layout: the model's output follows from it by NumPy alone."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"

    def apply(name: str, value: np.ndarray) -> np.ndarray:
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{end}.weight") for end in "AB")
        low_rank = config["lora_alpha"] / config["r"] * (value @ a.T @ b.T)
        return value @ np.asarray(base[name]["kernel"]) + np.asarray(base[name]["bias"]) + low_rank

    want = apply("down", np.maximum(apply("up", np.asarray(x)), 0))
    assert not tensors, sorted(tensors)
    np.testing.assert_allclose(np.asarray(output), want, rtol=0, atol=1e-5)


def check_commands(folder: Path) -> None:
    """The installed command runs."""
    command = Path(sys.executable).with_name("jaxadapt")
    for arguments in (["--help"], ["inspect", str(folder), "--json"], ["verify", str(folder)], ["families"]):
        done = subprocess.run([str(command), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        if "--json" in arguments:
            assert json.loads(done.stdout)["config"]["peft_type"] == "LORA"


def main() -> None:
    """Run all checks, and print the versions."""
    check_the_place()
    nnx, linen = run_readme(Path(sys.argv[1]))
    plain = {
        name: {leaf: getattr(getattr(nnx["Net"](nnx["nnx"].Rngs(0)), name), leaf)[...] for leaf in ("kernel", "bias")}
        for name in ("up", "down")
    }
    x = nnx["x"]
    check_the_file(Path("nnx"), plain, x, nnx["model"](x))
    output = linen["module"].apply(linen["variables"], x)
    check_the_file(Path("linen"), linen["base"], x, output)
    # In another process of the same model, NNX's file adapts Linen's parameters.
    crossed = jaxadapt.load("nnx/", {"params": plain})
    np.testing.assert_allclose(linen["module"].apply(crossed, x), nnx["model"](x), rtol=0, atol=1e-6)
    merged = jaxadapt.merge(nnx["model"])
    np.testing.assert_allclose(merged(x), nnx["model"](x), rtol=0, atol=1e-5)
    assert not jnp.array_equal(merged(x), nnx["Net"](nnx["nnx"].Rngs(0))(x))
    check_commands(Path("nnx"))
    names = ("jax", "flax", "optax", "orbax-checkpoint", "safetensors", "huggingface_hub", "numpy", "click", "rich")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    assert jax.default_backend() == "cpu"


if __name__ == "__main__":
    main()
