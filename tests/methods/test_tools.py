"""Everything around a method, for each in `METHODS`: this file names none.

A new adapter, optimizer roles, files, cards, `inspect`, norms, offline merges and checkpoints, with one configuration.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt import AdapterError, AttachError, ConfigError, KeyMap, KeyMapError, Weight, optim
from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import tensor_entries
from jaxadapt.adapters.sites import sites_of
from jaxadapt.analysis.changes import measure_of
from jaxadapt.cli import main
from jaxadapt.configs import matching
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.demo import finetune, llama
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.export import merge_files
from jaxadapt.keymaps import pytorch
from jaxadapt.methods import METHODS, describe_methods
from tests.full import methods_table
from tests.support.configs import class_of

IN, OUT = 8, 16
X = np.random.default_rng(5).standard_normal((4, IN)).astype("float32")
TYPES = [peft_type for peft_type in sorted(METHODS) if METHODS[peft_type].scope == "site"]


class Net(nnx.Module):
    """8 -> 16 -> 8."""

    def __init__(self) -> None:
        self.q, self.up = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), nnx.Linear(OUT, IN, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.up(jnp.tanh(self.q(x)))


def keymap_of(peft_type: str) -> KeyMap | str:
    """A keymap with the order of PyTorch's modules where the method needs it."""
    weights = (Weight("{path}.kernel", "{path}.weight", "i o -> o i"), Weight("{path}.bias", "{path}.bias", "o -> o"))
    return KeyMap("net", weights, order=("q", "up")) if METHODS[peft_type].ordered else "auto"


def network(peft_type: str) -> Any:
    """A network with an adapter whose trained tensors are not those of a new one."""
    config = class_of(peft_type)(target_modules=["q", "up"], **METHODS[peft_type].examples[0])
    model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(2), keymap=keymap_of(peft_type))
    adapter, random = jaxadapt.extract(model), np.random.default_rng(3)
    trained = {t.name for t, _ in tensor_entries(sites.sites_of(adapter)) if t.trained}
    values = {
        path: x + 0.2 * random.standard_normal(x.shape).astype(x.dtype) if path.rpartition(".")[2] in trained else x
        for path, x in adapter.flat().items()
    }
    jaxadapt.inject(model, jaxadapt.Adapter(adapter.config, paths.unflatten(values), adapter.keymap))
    return model


@pytest.mark.parametrize("peft_type", TYPES)
def test_everything_around_a_method(peft_type: str, tmp_path: Path):
    model, method = network(peft_type), METHODS[peft_type]
    adapter, want = jaxadapt.extract(model), np.asarray(model(X))
    # Initializing with `start` is initializing with `adapt`.
    options: dict[str, Any] = {"rngs": nnx.Rngs(2), "keymap": keymap_of(peft_type)}
    started = jaxadapt.initializers.start(Net(), adapter.config, key=jax.random.key(2), **options)
    fresh = jaxadapt.extract(jaxadapt.adapt(Net(), adapter.config, **options))
    assert all(started.adapter.flat()[path].shape == x.shape for path, x in fresh.flat().items())
    assert started.base(X).shape == want.shape
    # Combining is PEFT's: of plain LoRA, and of vectors.
    if method.sums:
        assert jaxadapt.combine([adapter, adapter], [0.5, 0.5], method="linear").flat().keys() == adapter.flat().keys()
    elif peft_type != "LORA":
        with pytest.raises(ConfigError, match=f"peft_type is {peft_type}"):
            jaxadapt.combine([adapter, adapter], [0.5, 0.5])
    else:
        assert jaxadapt.combine([adapter, adapter], [0.5, 0.5]).flat().keys() == adapter.flat().keys()
    # The optimizer: what has no role decays like LoRA's matrices, frozen tensors do not.
    roles, decays = (
        jax.tree.leaves(f(nnx.state(model, jaxadapt.AdapterParam))) for f in (optim.roles, optim.decay_mask)
    )
    assert len(roles) == len(decays)
    assert not any(decay for role, decay in zip(roles, decays, strict=True) if role in ("vector", "frozen", "bias"))
    # The file, its card, and what inspect says of it.
    folder = tmp_path / "adapter"
    jaxadapt.save(model, folder)
    tensors = jaxadapt.read(folder)
    named = pytorch.adapted_shapes({key: tuple(x.shape) for key, x in tensors.tensors.items()})
    if any("q" in key.split(".") for key in tensors.tensors):  # else all its tensors are those of the whole adapter
        assert named.keys() == {"q", "up"}
        prefix = FACTS[peft_type].tensor_prefix or f"{peft_type.lower()}_"
        assert all(name.startswith(prefix) for names in named.values() for name in names)
    card = (folder / "README.md").read_text()
    assert f"| method | {peft_type} |" in card
    assert all(f"| {name} |" in card for name in adapter.config.shown_fields())
    run = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(main, ["inspect", str(folder), "--norms", "--json"])
    if measure_of(adapter.config)[0] is None:
        assert run.exit_code == 1
        assert f"cannot compute norms for {peft_type}" in run.output
    else:
        assert run.exit_code == 0, run.output
        norms = json.loads(run.output)["norms"]
        assert len(norms["modules"]) in (0, 2)
        assert len(norms["modules"]) + len({name.rpartition(".")[0] or name for name in norms["left_out"]}) >= 1
    # A merge of files equals a merge in memory, or both are refused.
    base = tmp_path / "base"
    base.mkdir()
    plain = Net()
    weights = {f"{m}.weight": np.asarray(getattr(plain, m).kernel[...]).T.copy() for m in ("q", "up")}
    weights |= {f"{m}.bias": np.asarray(getattr(plain, m).bias[...]) for m in ("q", "up")}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    if any(tensor.from_base and not tensor.in_file for site in sites_of(adapter) for tensor in site.tensors):
        with pytest.raises(AttachError, match="start from the values of the base weights"):  # one tensor in memory
            merge_files.merge_folder(base, folder, tmp_path / "merged")
        np.testing.assert_allclose(jaxadapt.merge(network(peft_type))(X), want, rtol=1e-4, atol=1e-5)
    elif method.ordered:
        with pytest.raises(KeyMapError, match="depends on the order of PyTorch's modules"):  # files are not ordered
            merge_files.merge_folder(base, folder, tmp_path / "merged")
        np.testing.assert_allclose(jaxadapt.merge(network(peft_type))(X), want, rtol=1e-4, atol=1e-5)
    elif FACTS[adapter.config.peft_type].merges:
        merge_files.merge_folder(base, folder, tmp_path / "merged")
        merged, inside = load_file(tmp_path / "merged" / "model.safetensors"), jaxadapt.merge(network(peft_type))
        for name in ("q", "up"):
            layer = getattr(inside, name)
            # The same formula, in NumPy's or JAX's order of operations.
            np.testing.assert_allclose(merged[f"{name}.weight"].T, layer.kernel[...], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(merged[f"{name}.bias"], layer.bias[...], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(inside(X), want, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(AttachError, match="merge"):
            jaxadapt.merge(network(peft_type))
        with pytest.raises(AdapterError):
            merge_files.merge_folder(base, folder, tmp_path / "merged")
    # Checkpoints.
    with jaxadapt.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, model)
    fresh = jaxadapt.adapt(Net(), adapter.config, rngs=nnx.Rngs(9), keymap=keymap_of(peft_type))
    jaxadapt.CheckpointManager(tmp_path / "run").restore(fresh)
    np.testing.assert_array_equal(fresh(X), want)


def test_every_method_is_listed_with_its_facts():
    found = {info.peft_type: info for info in describe_methods()}
    assert set(METHODS) <= found.keys()
    assert not matching.passing_types().keys() & found.keys()
    for peft_type, info in found.items():
        assert info.summary
        assert info.facts.learning_rate > 0
        if info.source:
            assert METHODS[peft_type].rows == info.facts.rows
        json.dumps(info.to_dict())


@pytest.mark.peft
def test_the_list_has_all_types_of_peft():
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    package = Path(pytest.importorskip("peft").__file__).parent
    known = {getattr(peft_type, "value", peft_type) for peft_type in mapping}
    assert known <= {*matching.PEFT_TYPES}
    for info in describe_methods():
        assert not info.source or (package.parent / info.source).is_dir(), info.source


@pytest.mark.parametrize("method", finetune.method_names())
def test_the_demo_adapts_the_shapes_of_smollm2(method: str):
    """One layer, without values; tests/full/test_demo_methods.py trains."""
    config = finetune.adapter_config(method)
    layers = getattr(config, "adapter_layers", 1)
    layer = LlamaConfig(
        vocab_size=64, hidden_size=576, intermediate_size=1536, num_layers=layers, num_heads=9, num_kv_heads=3,
        head_dim=64, rope_theta=1e5,
    )  # fmt: skip
    assert (config.peft_type, config.task_type) == (method.upper(), "CAUSAL_LM")
    module: Any = jaxadapt.adapt(llama.LinenLlama(layer), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of block sizes that do not divide
        variables = jax.eval_shape(module.init, jax.random.key(0), finetune.TOKENS)
    adapter = jaxadapt.extract(variables)
    assert adapter.flat()
    trains = FACTS[config.peft_type].trains
    if not trains.startswith("all tensors of"):
        held = {path.rpartition(".")[2] for path in adapter.flat()}
        tensors = {t.name: t.trained for t, _ in tensor_entries(sites.sites_of(adapter))}
        assert {*trains.split(", ")} == {n.rpartition(":")[2] for n in held if tensors[n]}


def test_the_table_of_the_page_follows_the_results(tmp_path: Path):
    one, two = TYPES[:2]
    name = "test_nnx_and_linen_agree_and_merging_equals_applying"
    cases = f'<testcase name="{name}[{one}-0]"/><testcase name="{name}[{one}-1]"/>'
    cases += f'<testcase name="{name}[{two}-0]"/><testcase name="{name}[{two}-1]"><failure/></testcase>'
    cases += f'<testcase name="test_eight_devices[{one}-0]"><skipped/></testcase><testcase name="test_other[{one}-0]"/>'
    (tmp_path / "run.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    results = methods_table.read_results([tmp_path / "run.xml"])
    columns = list(methods_table.COLUMNS)
    rows = methods_table.table(results, {}, {}).split("\n")
    lines = {row.strip("| ").partition(" |")[0].strip("[").partition("]")[0]: row for row in rows}
    cells = {name: [cell.strip() for cell in lines[name].strip("|").split("|")] for name in (one, two)}
    assert [cells[name][3 + columns.index("NNX, Linen, merge")] for name in (one, two)] == ["yes", "no"]
    assert [cells[name][3 + columns.index("8 devices")] for name in (one, two)] == ["", ""]


def test_every_column_of_the_table_has_tests():
    text = "".join((methods_table.ROOT / suite).read_text() for suite in methods_table.SUITES)
    for tests in methods_table.COLUMNS.values():
        assert all(f"def test_{test}" in text for test in tests)
