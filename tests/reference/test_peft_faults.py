"""What PEFT 0.21.2 itself gets wrong, what is decided here for each, and the test that shows it.

`FAULTS` names them all; the tests below are those that had no better place. Where PEFT runs here they show its fault
too: the day it is mended they fail, and the decision can be thought over.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from jaxadapt import Weight
from tests.reference import test_tied
from tests.support import peft_harness as harness
from tests.support.twins import llama, trees
from tests.support.twins.tiny import Net
from tests.system import test_faults

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore::UserWarning")]  # PEFT's advice

HERE = "reference/test_peft_faults.py"
FAULTS: dict[str, tuple[str, ...]] = {
    # Followed: a file that PEFT trained means what PEFT computed in training.
    "nn.MultiheadAttention: out_proj's product counts twice (huggingface/peft#3774)": (
        "reference/test_attention.py::test_the_output_projection_counts_twice_as_in_peft",
    ),
    # Followed, with a warning, since the merge gives other outputs; a merge here is refused.
    "OFT on a convolution: the fresh adapter changes the output, its merge does not": (
        f"{HERE}::test_oft_and_boft_are_kept_and_compute_pefts_layer",
        "methods/test_rotations.py::test_oft_on_a_convolution_with_a_window_computes_pefts_layer",
    ),
    # The file is what was trained, whatever its configuration says.
    "BOFT: the butterfly factor becomes 1 on machines without the CUDA extension": (
        f"{HERE}::test_oft_and_boft_are_kept_and_compute_pefts_layer",
    ),
    # Refused: there is no formula to follow.
    "DoRA on a grouped convolution: the norm mixes the weights of several groups": (
        f"{HERE}::test_dora_of_a_grouped_convolution_is_refused",
    ),
    # Forward as in PEFT; the merge is what the forward computes, or is refused.
    "a tied table of tokens is adapted: merge and forward differ, or the merge adds it twice": (
        "reference/test_tied.py::test_a_tied_adapter_merges_into_both",
        "reference/test_tied.py::test_a_copy_for_the_lookup_alone_merges_into_nothing",
        f"{HERE}::test_a_tied_tables_own_adapter_merges_only_where_the_model_stays_the_same",
    ),
    # Forward as in PEFT; the merge is into layers of their own.
    "layer_replication: the merge puts all repetitions into the weight that they share": (
        "reference/test_fields.py::test_a_merge_of_repeated_layers_is_right_here",
    ),
    # A takes the base layer's own dilation and padding, so that forward and merge agree; PEFT crashes on the one, and
    # with the other computes something in training that its own merge does not.
    "LoRA on a convolution: dilation crashes, padding_mode is ignored": (
        f"{HERE}::test_a_dilated_convolution_computes_its_merge",
        f"{HERE}::test_a_padding_mode_is_the_layers_own",
    ),
    # Read where they repeat the others, and never written.
    'bias="all" writes the biases of modules_to_save three times, two under names of the wrapper': (
        f"{HERE}::test_biases_that_peft_writes_thrice_are_read_once",
    ),
    # One file is two rotations, as in PEFT.
    "OFT: use_cayley_neumann true and false rotate in opposite directions": (
        "methods/test_rotations.py::test_the_two_settings_of_oft_turn_in_opposite_directions",
    ),
    # Here the changes add, as in PEFT's merge.
    "C3A: a second active adapter gets the output of the first as its input": (
        "methods/test_c3a.py::test_two_adapters_add_their_changes",
    ),
    # What PEFT left passes through; a file without tensors is refused.
    "XLORA: the classifier's layers are dropped where their numbers are names of adapters": (
        "methods/test_passing.py::test_xlora_keeps_one_layer_of_its_classifier_or_none",
    ),
    # Here each expert has its own scale, α/√r.
    "a file of single experts with use_rslora: the change of gate and up is √2 times too large": (
        "reference/test_per_expert.py::test_rslora_where_the_rank_is_doubled",
        "reference/test_per_expert.py::test_peft_changes_the_scale_of_rslora",
    ),
    # Refused, since the random numbers of a loader are not those of the writer.
    "RANDLORA without saved bases: the bases depend on the machine that loads them": (
        "methods/test_shared_tensors.py::test_randlora_without_saved_bases_is_refused",
    ),
    # Names are no part of keys here.
    "an adapter that is called like a module: saving another one drops tensors": (
        f"{HERE}::test_an_adapter_may_be_called_like_a_module",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_that_is_named_is_there(fault: str):
    test_faults.check(FAULTS[fault])


@functools.cache
def torch_net(net: Net) -> Any:
    return net.torch().eval()


def output(model: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(np.asarray(wanted)).max())


def differ(x: np.ndarray, y: np.ndarray) -> None:
    assert abs(x - y).max() > 1e-2 * abs(x).max()


# ---- OFT, BOFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["OFT", "BOFT"])
def test_oft_and_boft_are_kept_and_compute_pefts_layer(kind, tmp_path):
    """PEFT's convolution with OFT moves patches; its BOFT trains one factor of two where CUDA is missing."""
    net = Net("conv", ndim=2) if kind == "OFT" else Net()
    if kind == "OFT":
        model = peft.get_peft_model(net.torch(), peft.OFTConfig(target_modules=["conv"], oft_block_size=4)).eval()
        plain = output(torch_net(net), net.input())
        differ(output(model, net.input()), plain)
        close(output(copy.deepcopy(model).merge_and_unload(), net.input()), plain)
    else:
        config = peft.BOFTConfig(target_modules=["lin"], boft_block_size=4, boft_n_butterfly_factor=2)
        model = peft.get_peft_model(net.torch(), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    want = output(model, net.input())
    differ(want, output(torch_net(net), net.input()))
    if kind == "OFT":
        differ(output(copy.deepcopy(model).merge_and_unload(), net.input()), want)
    harness.save(model, tmp_path / "peft")
    read = jaxadapt.read(tmp_path / "peft")
    if kind == "BOFT" and not torch.cuda.is_available():  # the file says one thing, and holds another
        assert read.config.get("boft_n_butterfly_factor") == 2
        assert read.tensors["base_model.model.layers.0.lin.boft_R"].shape[0] == 1
    jaxadapt.write(read, tmp_path / "again")
    assert (tmp_path / "again/adapter_config.json").read_bytes() == (tmp_path / "peft/adapter_config.json").read_bytes()
    before, after = (harness.read_tensors(tmp_path / name) for name in ("peft", "again"))
    assert before.keys() == after.keys()
    for key, x in before.items():
        np.testing.assert_array_equal(after[key], x)
    target = {"params": trees.nest(net.leaves("linen", None, torch_net(net)))}
    variables = jaxadapt.load(tmp_path / "peft", target, keymap=net.table("linen"))
    module = jaxadapt.adapt(net.linen(), jaxadapt.read_config(tmp_path / "peft"), keymap=net.table("linen"))
    close(np.asarray(module.apply(variables, net.ours(net.input()))), want)


# ---- convolutions ----------------------------------------------------------------------------------------


def test_dora_of_a_grouped_convolution_is_refused(tmp_path):
    """PEFT reshapes A so that channels of several groups meet; what its norm is of is no weight of the layer."""
    net = Net("conv", groups=2)
    fields = {"r": 2, "target_modules": ["conv"], "use_dora": True}
    harness.save(harness.make_peft(torch_net(net), peft.LoraConfig(**fields)), tmp_path)
    model, table = net.nnx(torch_net(net)), net.table()
    before = nnx.graphdef(model)
    says = "use_dora is not supported on a grouped convolution, where PEFT's norm mixes the weights of several groups"
    for ask in (
        lambda: jaxadapt.load(tmp_path, model, keymap=table),
        lambda: jaxadapt.adapt(model, jaxadapt.LoraConfig(**fields), rngs=nnx.Rngs(0), keymap=table),
    ):
        with pytest.raises(jaxadapt.ConfigError, match=says):
            ask()
    assert nnx.graphdef(model) == before


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_dilated_convolution_computes_its_merge(api, tmp_path):
    """PEFT saves such a file and merges it; only its forward pass cannot be run."""
    net = Net("conv", dilation=2, padding=2)
    wrapped = harness.make_peft(torch_net(net), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv"]))
    with pytest.raises(RuntimeError, match="size of tensor"):
        output(wrapped, net.input())
    harness.save(wrapped, tmp_path)
    want = output(copy.deepcopy(wrapped).merge_and_unload(), net.input())
    differ(want, output(torch_net(net), net.input()))
    x = net.ours(net.input())
    if api == "nnx":
        close(jaxadapt.load(tmp_path, net.nnx(torch_net(net)), keymap=net.table())(x), want)
        return
    table = net.table("linen")
    variables = {"params": trees.nest(net.leaves("linen", None, torch_net(net)))}
    variables = jaxadapt.load(tmp_path, variables, keymap=table)
    module = jaxadapt.adapt(net.linen(), jaxadapt.extract(variables).config, keymap=table)
    close(module.apply(variables, x), want)


PADDED = jaxadapt.KeyMap("padded", (Weight("conv.kernel", "conv.weight", "w i o -> o i w", kind="conv"),))


@pytest.mark.parametrize("mode", ["circular", "reflect"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_padding_mode_is_the_layers_own(api, mode, tmp_path):
    """PEFT pads A's input with zeros whatever the base does, so that its own merge computes something else: the merge
    is what a weight W + s·B·A means, and what is computed here."""
    torch.manual_seed(0)
    base = torch.nn.Sequential()
    base.add_module("conv", torch.nn.Conv1d(4, 6, 3, padding=1, padding_mode=mode, bias=False))
    wrapped = harness.make_peft(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv"]))
    harness.save(wrapped, tmp_path)
    x = np.random.RandomState(0).standard_normal((2, 4, 5)).astype("float32")
    want = output(copy.deepcopy(wrapped).merge_and_unload(), x)
    differ(output(wrapped, x), want)
    kernel, x = base.conv.weight.detach().numpy().transpose(2, 1, 0), np.moveaxis(x, 1, 2)

    if api == "nnx":

        class Model(nnx.Module):
            def __init__(self) -> None:
                self.conv = nnx.Conv(4, 6, (3,), padding=mode.upper(), use_bias=False, rngs=nnx.Rngs(0))

            def __call__(self, x: Any) -> Any:
                return self.conv(x)

        model = Model()
        model.conv.kernel[...] = jnp.asarray(kernel)
        found = jaxadapt.load(tmp_path, model, keymap=PADDED)(jnp.asarray(x))
    else:

        class Module(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Conv(6, (3,), padding=mode.upper(), use_bias=False, name="conv")(x)

        variables = jaxadapt.load(tmp_path, {"params": {"conv": {"kernel": jnp.asarray(kernel)}}}, keymap=PADDED)
        module = jaxadapt.adapt(Module(), jaxadapt.extract(variables).config, keymap=PADDED)
        found = module.apply(variables, jnp.asarray(x))
    close(np.moveaxis(np.asarray(found), 2, 1), want)


# ---- tied embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apart_table", "apart_tokens", "both", "tokens"])
def test_a_tied_tables_own_adapter_merges_only_where_the_model_stays_the_same(name, tmp_path):
    """Without ensure_weight_tying LoRA is for the lookup alone: PEFT's merge changes the head too, ours is refused."""
    model, want = test_tied.theirs(name)
    harness.save(model, tmp_path)
    module, params = llama.twin_of(test_tied.base(), "linen")
    adapter = jaxadapt.extract(jaxadapt.load(tmp_path, params))
    if name == "apart_table":
        differ(harness.logits(copy.deepcopy(model).merge_and_unload(), test_tied.IDS), want)
        with pytest.raises(jaxadapt.AttachError, match="changes the lookup of tokens only"):
            jaxadapt.merge(params["params"], adapter)
    else:
        close(module.apply({"params": jaxadapt.merge(params["params"], adapter)}, test_tied.IDS), want)


# ---- bias="all" -----------------------------------------------------------------------------------------


def test_biases_that_peft_writes_thrice_are_read_once(tmp_path):
    net = Net()
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["lin"], "bias": "all", "modules_to_save": ["head"]}
    wrapped = harness.make_peft(torch_net(net), peft.LoraConfig(**fields))
    with torch.no_grad():
        wrapped.base_model.model.head.modules_to_save["default"].bias += 1
    harness.save(wrapped, tmp_path)
    more = {f"base_model.model.head.{inside}.bias" for inside in ("modules_to_save", "original_module")}
    assert more < set(harness.read_tensors(tmp_path))
    model = jaxadapt.load(tmp_path, net.nnx(torch_net(net)), keymap=net.table())
    close(model(net.ours(net.input())), output(wrapped, net.input()))
    jaxadapt.save(model, tmp_path / "again")
    assert not more & set(harness.read_tensors(tmp_path / "again"))
    # one that says something else is no repetition
    read = jaxadapt.read(tmp_path)
    key = "base_model.model.head.modules_to_save.bias"
    odd = jaxadapt.PeftTensors(read.config, {**read.tensors, key: np.asarray(read.tensors[key]) + 1})
    with pytest.raises(jaxadapt.MismatchError, match="one repeats the other, and they differ"):
        jaxadapt.from_peft(odd, net.nnx(torch_net(net)), keymap=net.table())


# ---- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_an_adapter_may_be_called_like_a_module(api, tmp_path):
    """PEFT looks for names inside keys: with a second adapter called "lin", the first is saved without any tensor."""
    net, config = Net(), {"r": 2, "target_modules": ["lin"]}
    wrapped = harness.make_peft(torch_net(net), peft.LoraConfig(**config))
    alone = harness.save(wrapped, tmp_path / "alone")
    wrapped.add_adapter("lin", peft.LoraConfig(**config))
    assert harness.read_tensors(harness.save(wrapped, tmp_path / "peft")) == {}

    names = ("default", "lin", "layers", "lora_A")
    if api == "nnx":
        tree: Any = net.nnx(torch_net(net))
        for i, name in enumerate(names):
            jaxadapt.adapt(tree, jaxadapt.LoraConfig(**config), rngs=nnx.Rngs(i), name=name, keymap=net.table())
    else:
        base = trees.nest(net.leaves("linen", None, torch_net(net)))
        tree = {"params": base, "lora": {}}
        for i, name in enumerate(names):
            adapter = jaxadapt.init(
                base, jaxadapt.LoraConfig(**config), key=jax.random.key(i), keymap=net.table("linen")
            )
            tree["lora"] |= adapter.named(name)["lora"]
    seen = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jaxadapt.save(tree, tmp_path / api, name=name)
        folder = tmp_path / api if name == "default" else tmp_path / api / name  # as PEFT lays them out
        saved = harness.read_tensors(folder)
        assert harness.specs(saved) == harness.specs(harness.read_tensors(alone))
        seen.append(saved["base_model.model.layers.0.lin.lora_A.weight"].tobytes())
    assert len(set(seen)) == len(names)
