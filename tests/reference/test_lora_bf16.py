"""The matrix of layers and variants under bfloat16: as near to what float32 gives as PEFT itself is.

Base and inputs are bfloat16 on both sides, adapters float32 as PEFT makes them. What float32 gives is PEFT's output for
the same file on the same numbers.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from tests.reference.test_lora_matrix import CASES, EVERY, Case, Ours, in_torch, torch_net
from tests.support import peft_harness as harness
from tests.support.twins import trees

pytestmark = pytest.mark.peft

UNIT = 2.0**-8  # the rounding of bfloat16, relative: half its spacing
# One of each layer and variant; all cases with JAXADAPT_EVERY_TWIN.
AGAIN = "rslora save_layers bias_all lora_bias_and_bias dora_rslora tokens_of conv1d_stride conv2d_1x1".split()
AGAIN.append("conv1d_bias")
CHOSEN = [case for case in CASES if EVERY or case.name not in AGAIN]
SIDES = [(case, *(("nnx", None), ("linen", 0 if case.scans else None))[i % 2]) for i, case in enumerate(CHOSEN)]


def narrow(net: Any) -> Any:
    return copy.deepcopy(net).to(torch.bfloat16)


def weighted(y: Any) -> Any:
    """One number of an output, of which every entry has another share."""
    return (y.float() * torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).sum()


def run(model: Any, x: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output, and the gradients by their names in a file."""
    y = model(x)
    weighted(y).backward()
    names = {n.replace(".default", "").replace("modules_to_save.", ""): p for n, p in model.named_parameters()}
    names = {n.removesuffix(".weight") if n.endswith("magnitude_vector.weight") else n: p for n, p in names.items()}
    found = {n: p.grad.float().numpy() for n, p in names.items() if p.requires_grad and p.grad is not None}
    return y.detach().float().numpy(), found


def as_near(found: Any, theirs: Any, truth: Any, what: str, roundings: int = 2) -> None:
    """No further from float32 than three times PEFT, and some roundings of the largest; sums run in another order."""
    found, theirs = (np.asarray(x, "float32") for x in (found, theirs))
    allowed = 3 * abs(theirs - truth).max() + roundings * UNIT * abs(truth).max()
    np.testing.assert_allclose(found, truth, rtol=0, atol=allowed, err_msg=what)


def on_narrow_base(case: Case, api: str, scan: int | None) -> Ours:
    ours = Ours(case, api, scan)
    ours.base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ours.base)
    ours.x = ours.x.astype(jnp.bfloat16) if jnp.issubdtype(ours.x.dtype, jnp.floating) else ours.x
    if api == "nnx":
        leaves = ours.net.leaves(api, scan, torch_net(ours.net))
        trees.fill(ours.model, {path: jnp.asarray(x, jnp.bfloat16) for path, x in leaves.items()})
    else:
        ours.variables = {"params": ours.base}
    return ours


@functools.cache
def their_adapter(case: Case) -> Any:
    model = peft.get_peft_model(narrow(torch_net(case.net)), peft.LoraConfig(**copy.deepcopy(case.fields))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_((0.1 if "lora_magnitude" in name else 0.3) * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore")  # PEFT's advice on what a test does on purpose
@pytest.mark.parametrize(("case", "api", "scan"), SIDES, ids=[f"{case.name}-{api}" for case, api, _ in SIDES])
def test_bfloat16_is_as_near_to_float32_as_pefts(case, api, scan, tmp_path):
    model = their_adapter(case)
    harness.save(model, tmp_path / "theirs")
    x = torch.from_numpy(case.net.input())
    theirs, their_slopes = run(model, x.to(torch.bfloat16) if x.is_floating_point() else x)
    wide = narrow(torch_net(case.net)).float()
    exact = peft.PeftModel.from_pretrained(wide, str(tmp_path / "theirs"), is_trainable=True).eval()
    rounded = x.to(torch.bfloat16).float() if x.is_floating_point() else x
    truth, slopes = run(exact, rounded)
    ours = on_narrow_base(case, api, scan)
    ours.load(tmp_path / "theirs")
    y = ours.output()
    if not case.net.emb:  # nnx.Embed gives the dtype that it was made with
        assert y.dtype == jnp.bfloat16
    as_near(y, theirs, truth, "output")
    found = ours.gradients().tensors
    for key, slope in slopes.items():
        if key in found:
            # The gradient of the base's own bias is the sum over all rows: XLA rounds each addition, torch the last.
            rows = y.size // y.shape[-1] if key.endswith("base_layer.bias") else 2
            as_near(found[key], their_slopes[key], slope, key, rows)
    assert slopes.keys() & found.keys()
    jaxadapt.save(ours.tree, tmp_path / "ours")
    assert harness.specs(jaxadapt_tensors(tmp_path / "ours")) == harness.specs(jaxadapt_tensors(tmp_path / "theirs"))
    if case.merges:
        sums = in_torch(ours.table, jaxadapt.merge(ours.base, jaxadapt.extract(ours.tree)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = exact.merge_and_unload().state_dict()
        for key, value in sums.items():  # the float32 sum, rounded once
            want = merged[key].numpy()
            np.testing.assert_allclose(value.astype("float32"), want, rtol=UNIT + 1e-5, atol=1e-6, err_msg=key)


def jaxadapt_tensors(folder: Any) -> dict[str, Any]:
    return {key: np.asarray(x) for key, x in jaxadapt.read(folder).tensors.items()}
