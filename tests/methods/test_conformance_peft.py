"""PEFT's files of every registered method, both ways, on a tiny Llama: knows no method by name.

A method's `examples` are the configurations. PEFT's own model gives the tensors, the outputs and the gradients.
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
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, methods
from jaxadapt.adapters import selection, sites
from jaxadapt.adapters.adapter import tensor_entries
from jaxadapt.core import paths
from jaxadapt.demo.llama import LinenLlama, to_linen, to_nnx
from tests.support.configs import class_of

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.save_and_load import get_peft_model_state_dict

from tests.methods.test_conformance import NET, config_of
from tests.support.twins import llama

pytestmark = pytest.mark.peft
IDS = np.random.default_rng(0).integers(1, 30, (2, 5))
TARGETS = ["q_proj", "v_proj", "down_proj"]


# {type: the tolerance of its gradients, times the largest value of the tensor}. All others reach 5e-6 and have 1e-5.
GRADIENTS = {
    "DELORA": 5e-5,  # reaches 1e-5: λ's gradient is one number, 1,000 times smaller than others, whose terms cancel
    "PEANUT": 5e-5,  # 5e-6: the gradients of its inner layers are 10,000 times smaller than others
    "OSF": 3e-4,  # 6e-5: both libraries decompose the weight, and gradients are projected off its singular vectors
}


def assert_close(got: Any, want: np.ndarray) -> None:
    """Compare within 1e-5 of the largest value: products of float32 are in another order than PyTorch's."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())


def cases() -> list[Any]:
    return [
        pytest.param(name, i, id=f"{name}-{i}")
        for name in sorted(methods.METHODS)
        if methods.METHODS[name].scope != "model"  # prompts: tests/reference/test_prompts.py
        for i in range(len(methods.METHODS[name].examples))
    ]


@functools.cache
def torch_base() -> Any:
    return llama.torch_llama(layers=2, width=16, inner=24, heads=2, kv_heads=1)


def fields_of(peft_type: str, i: int) -> dict[str, Any]:
    return {"target_modules": TARGETS, **methods.METHODS[peft_type].examples[i]}


@functools.cache
def peft_model(peft_type: str, i: int) -> Any:
    """PEFT's model with random values near those of a new adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM", **copy.deepcopy(fields_of(peft_type, i)))
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(torch_base()), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def peft_results(peft_type: str, i: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """PEFT's logits, and its gradients of their sum of squares by key."""
    model = peft_model(peft_type, i)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of sparse tensors
        logits = model(torch.from_numpy(IDS)).logits
    (logits**2).mean().backward()
    state = dict(get_peft_model_state_dict(model))
    # A shared parameter has several names.
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    grads = {}
    for key in state:
        plain = key.removeprefix("base_model.model.").removesuffix(".weight")
        for name, parameter in trained.items():
            if name.replace(".default", "").removesuffix(".weight").endswith(plain):
                grads[key] = parameter.grad.numpy()
    return logits.detach().numpy(), grads


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    model = peft_model(request.getfixturevalue("peft_type"), request.getfixturevalue("i"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path / "peft"))
    return tmp_path / "peft"


def nnx_model(**options: Any) -> Any:
    return to_nnx(llama.config_of(torch_base(), **options), llama.weights_of(torch_base()))


@pytest.mark.parametrize(("peft_type", "i"), cases())
def test_pefts_file_gives_pefts_logits_and_gradients(peft_type: str, i: int, folder: Any):
    """In Linen; the next test is in NNX."""
    want, want_grads = peft_results(peft_type, i)
    base = to_linen(llama.config_of(torch_base()), llama.weights_of(torch_base()))
    adapter = jaxadapt.extract(jaxadapt.load(folder, base))
    module = jaxadapt.adapt(LinenLlama(llama.config_of(torch_base())), adapter.config)

    def loss(params: Any) -> Any:
        tree = jaxadapt.Adapter(adapter.config, params, adapter.keymap)
        logits = module.apply({**base, **tree.collection}, jnp.asarray(IDS))
        return (logits**2).mean(), logits

    floats = {p: x for p, x in adapter.flat().items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {p: x for p, x in adapter.flat().items() if p not in floats}
    grad = jax.grad(lambda f: loss(paths.unflatten({**f, **rest})), has_aux=True)
    grads, logits = jax.jit(grad)(floats)
    assert_close(logits, want)
    changed = jaxadapt.Adapter(adapter.config, paths.unflatten({**grads, **rest}), adapter.keymap)
    check_gradients(jaxadapt.to_peft({**base, **changed.collection}), want_grads, peft_type)


@pytest.mark.parametrize(("peft_type", "i"), [case for case in cases() if case.values[1]])
def test_every_further_example_gives_pefts_logits(peft_type: str, i: int, folder: Any):
    """Without gradients and compilation, so that CI runs every example; the tests around it run the first of each."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of sparse tensors
        want = peft_model(peft_type, i)(torch.from_numpy(IDS)).logits.numpy()
    assert_close(jaxadapt.load(folder, nnx_model())(jnp.asarray(IDS)), want)


@pytest.mark.parametrize(("peft_type", "i"), cases())
def test_the_variables_of_an_nnx_model_have_pefts_gradients(peft_type: str, i: int, folder: Any):
    """Those that an optimizer sees; and PEFT's logits."""
    want, want_grads = peft_results(peft_type, i)
    model = jaxadapt.load(folder, nnx_model())
    adapter = jaxadapt.extract(model)

    def nnx_loss(model: Any) -> Any:
        logits = model(jnp.asarray(IDS))
        return (logits**2).mean(), logits

    gradient = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam), has_aux=True)
    state, logits = nnx.jit(gradient)(model)
    assert_close(logits, want)
    assert len(nnx.to_flat_state(state)) == sum(t.trained for t in tensors_of(adapter))
    nnx.update(model, state)
    check_gradients(jaxadapt.to_peft(model), want_grads, peft_type)


def check_gradients(found: Any, want: dict[str, np.ndarray], peft_type: str) -> None:
    """Compare the gradients of every tensor of a file, also with the base, which shows if a head is tied."""
    assert want
    for key, value in want.items():
        limit = GRADIENTS.get(peft_type, 1e-5) * abs(value).max()
        np.testing.assert_allclose(found.tensors[key], value, rtol=0, atol=limit, err_msg=key)


def tensors_of(adapter: Any) -> Any:
    return [t for t, _ in tensor_entries(sites.sites_of(adapter))]


@pytest.mark.parametrize("scan_axis", [0, 1])
@pytest.mark.parametrize(("peft_type", "i"), cases())
def test_scanned_layers_give_pefts_logits(peft_type: str, i: int, scan_axis: int, folder: Any):
    want, _ = peft_results(peft_type, i)
    config = llama.config_of(torch_base(), scan=True, scan_axis=scan_axis)
    model = jaxadapt.load(folder, nnx_model(scan=True, scan_axis=scan_axis))
    assert_close(model(jnp.asarray(IDS)), want)
    base = to_linen(config, llama.weights_of(torch_base()))
    variables = jaxadapt.load(folder, base)
    adapter = jaxadapt.extract(variables)
    module = jaxadapt.adapt(LinenLlama(config), adapter.config)
    assert_close(module.apply(variables, jnp.asarray(IDS)), want)
    again = jaxadapt.to_peft(variables)
    file = jaxadapt.read(folder)
    assert {k: v.shape for k, v in again.tensors.items()} == {k: v.shape for k, v in file.tensors.items()}
    for key, value in file.tensors.items():
        np.testing.assert_array_equal(again.tensors[key], value)


@pytest.mark.parametrize(("peft_type", "i"), cases())
def test_peft_opens_our_files(peft_type: str, i: int, tmp_path: Any):
    config = class_of(peft_type)(task_type="CAUSAL_LM", **fields_of(peft_type, i))
    model = jaxadapt.adapt(nnx_model(), config, rngs=nnx.Rngs(0))
    adapter = jaxadapt.extract(model)
    rng = np.random.default_rng(3)
    trained = {t.name for t in tensors_of(adapter) if t.trained}
    values = {
        path: x + 0.2 * rng.standard_normal(x.shape).astype("f4") if path.rpartition(".")[2] in trained else x
        for path, x in adapter.flat().items()
    }
    jaxadapt.inject(model, jaxadapt.Adapter(adapter.config, paths.unflatten(values), adapter.keymap))
    jaxadapt.save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="(?s).*missing adapter keys")
        theirs = PeftModel.from_pretrained(copy.deepcopy(torch_base()), str(tmp_path / "ours")).eval()
        theirs.save_pretrained(str(tmp_path / "again"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs(torch.from_numpy(IDS)).logits.numpy()
    assert_close(model(jnp.asarray(IDS)), want)
    ours, again = jaxadapt.read(tmp_path / "ours"), jaxadapt.read(tmp_path / "again")
    assert {k: (v.shape, v.dtype) for k, v in ours.tensors.items()} == {
        k: (v.shape, v.dtype) for k, v in again.tensors.items()
    }
    written, back = (jaxadapt.read_config(tmp_path / name) for name in ("ours", "again"))
    for key, value in back.to_dict().items():
        if key not in ("base_model_name_or_path", "auto_mapping", "peft_version"):
            assert written.to_dict()[key] == value or key == "target_modules", key


def redundant(sites_of_it: Any) -> list[tuple[Any, Any]]:
    """The tensors that a file may lack, with their entries."""
    pairs = [(t, e) for site in sites_of_it for t, e in zip(site.tensors, site.entries, strict=True)]
    pairs += [(each.tensor, each.entry) for each in sites_of_it.shared]
    return [(tensor, entry) for tensor, entry in pairs if tensor.optional and tensor.in_file]


# The methods of which PEFT cannot apply several adapters to a layer at once, and why.
ALONE = {
    "ADALORA": "supports only 1 trainable adapter",
    "C3A": "is invalid for input of size",  # its layer gives the second adapter the output of the first
    "LN_TUNING": "does not allow inference with more than one adapter",
    "TRAINABLE_TOKENS": "Token indices of adapter other are already defined",
}
# Each adapter computes its change from the base weight, which a merge of the other one changes; BEFT needs biases.
UNMERGED = dict.fromkeys(("HIRA", "PEANUT", "DEFT"), "cannot merge several active adapters") | {"BEFT": "have none"}
FIRST_ONLY = {"OSF"}  # PEFT silently applies the first one; here each changes what the one before it gives


@pytest.mark.parametrize(("peft_type", "i"), cases())
def test_several_active_adapters_give_pefts_logits(peft_type: str, i: int, tmp_path: Any):
    model = copy.deepcopy(peft_model(peft_type, i))
    trained = {n.replace(".default", ".other") for n, p in model.named_parameters() if p.requires_grad}

    def both() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
            model.add_adapter("other", kind(task_type="CAUSAL_LM", **copy.deepcopy(fields_of(peft_type, i))))
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in trained and parameter.is_floating_point():
                        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            model.base_model.set_adapter(["default", "other"])
            logits = model(torch.from_numpy(IDS)).logits.detach().numpy()
            model.save_pretrained(str(tmp_path))
        return logits

    if peft_type in ALONE:
        with pytest.raises((RuntimeError, ValueError), match=ALONE[peft_type]):
            both()
        return
    want = both()
    if peft_type in FIRST_ONLY:
        np.testing.assert_array_equal(want, peft_results(peft_type, i)[0])
        return
    ours = jaxadapt.load(tmp_path, nnx_model())
    jaxadapt.load(tmp_path / "other", ours, name="other")
    jaxadapt.activate(ours, ("default", "other"))
    assert_close(ours(jnp.asarray(IDS)), want)
    assert not np.allclose(want, peft_results(peft_type, i)[0], atol=1e-4)
    if peft_type in UNMERGED:
        with pytest.raises(AttachError, match=UNMERGED[peft_type]):
            jaxadapt.merge(ours)
    else:
        assert_close(jaxadapt.merge(ours)(jnp.asarray(IDS)), want)


def cases_with_redundant_tensors() -> list[Any]:
    shapes = {"q.kernel": (8, 16), "up.kernel": (16, 8)}
    return [
        case
        for case in cases()
        if methods.METHODS[case.values[0]].scope == "site"
        and redundant(selection.select_sites(config_of(*case.values, ("q", "up")), NET, shapes))
    ]


@pytest.mark.parametrize(("peft_type", "i"), cases_with_redundant_tensors())
def test_redundant_tensors_may_be_missing(peft_type: str, i: int, folder: Any):
    """PEFT writes them, and warns where they are missing."""
    file, whole = jaxadapt.read(folder), jaxadapt.load(folder, nnx_model())
    found = sites.sites_of(jaxadapt.extract(whole))
    keys = {key for _, entry in redundant(found) for key in entry.keys} & file.tensors.keys()
    assert keys
    rest = {key: x for key, x in file.tensors.items() if key not in keys}
    jaxadapt.write(jaxadapt.PeftTensors(file.config, rest), folder.with_name("less"))
    less = jaxadapt.extract(jaxadapt.load(folder.with_name("less"), nnx_model())).flat()
    for path, x in jaxadapt.extract(whole).flat().items():
        # Norms and singular vectors are computed again, by another library.
        np.testing.assert_allclose(less[path], x, rtol=1e-5, atol=1e-6, err_msg=path)
