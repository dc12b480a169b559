"""export_base and import_base against transformers: `from_pretrained` and `save_pretrained` of the real classes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch

import jaxadapt
from tests.keymaps.families import jax_side, specimen_arrays, torch_side
from tests.keymaps.families.specimens import BY_NAME, IDS, recorded
from tests.support.twins import trees

pytestmark = pytest.mark.peft

NAMES = [
    "flax-llama",
    "flax-gpt2",
    "gpt2-dense",
    "flax-bert",
    "flax-bert-bare",
    "flax-roberta-classifier",
    "tunix-qwen3-tied",
    "tunix-gemma3",
    "gemma-gemma3",
    "maxtext-llama3.1-scan1",
]


def shapes_of(specimen):
    return jax_side.side(specimen).shapes if jax_side.here(specimen) else recorded(specimen.name)["leaves"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_merged_model_and_we_read_its(name, tmp_path):
    """In shards of 2 kB both ways; the merged model's outputs are PEFT's."""
    specimen = BY_NAME[name]
    shapes = shapes_of(specimen)
    leaves = specimen_arrays.base_leaves(specimen, shapes)
    model = torch_side.base(name)

    model.save_pretrained(tmp_path / "torch", max_shard_size="2KB")
    assert (tmp_path / "torch" / "model.safetensors.index.json").exists()
    target = trees.nest({path: np.zeros(shape, "float32") for path, shape in shapes.items()})
    found = jaxadapt.export.import_base(tmp_path / "torch", target, keymap=specimen.keymap)
    flat = trees.nest(leaves)
    for x, y in zip(jax_leaves(found), jax_leaves(flat), strict=True):
        np.testing.assert_array_equal(x, y)

    torch_side.save(specimen, tmp_path / "adapter")
    adapter = jaxadapt.from_peft(jaxadapt.read(tmp_path / "adapter"), flat, keymap=specimen.keymap)
    together = jaxadapt.export.import_base(tmp_path / "torch", target, adapter, keymap=specimen.keymap)
    for x, y in zip(jax_leaves(together), jax_leaves(jaxadapt.merge(flat, adapter)), strict=True):
        np.testing.assert_array_equal(x, y)
    model.config.save_pretrained(tmp_path / "ours")
    jaxadapt.export.export_base(flat, tmp_path / "ours", adapter, keymap=specimen.keymap, max_shard_size=2000)
    merged, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        out = merged.eval()(torch.from_numpy(np.asarray(IDS, np.int64)))
    logits = (out.logits if "logits" in out else out.last_hidden_state).numpy()
    np.testing.assert_allclose(logits, torch_side.logits(name, adapter=True), rtol=0, atol=1e-4)


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_an_nnx_model_runs_on_what_it_imported(tmp_path):
    """Tunix's Qwen 3, abstract, filled from a folder of transformers': the same logits."""
    specimen = BY_NAME["tunix-qwen3-tied"]
    if not jax_side.here(specimen):
        pytest.skip("needs google-tunix, which is in the extra `test`")
    import jax
    from flax import nnx

    side = jax_side.side(specimen)
    torch_side.base(specimen.name).save_pretrained(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        abstract = nnx.eval_shape(lambda: side.make(specimen_arrays.base_leaves(specimen, side.shapes)))
        model = jaxadapt.export.import_base(tmp_path, abstract)
        assert model is abstract
        expected = torch_side.logits(specimen.name, adapter=False)
        np.testing.assert_allclose(side.logits(model), expected, rtol=0, atol=1e-4)


def test_an_old_bin_and_a_bare_model(tmp_path):
    """A BERT without its head, saved by torch itself, into a classifier: its own names lack the prefix."""
    bert = torch_side.base("flax-bert-bare")
    torch.save(bert.state_dict() | {"embeddings.position_ids": torch.arange(32)}, tmp_path / "pytorch_model.bin")
    shapes = recorded("flax-bert-classifier")["leaves"]
    target = trees.nest({path: np.full(shape, 7, "float32") for path, shape in shapes.items()})
    with pytest.warns(UserWarning, match=r"keep their values: classifier\.bias, classifier\.kernel"):
        found = jaxadapt.export.import_base(tmp_path, target, strict=False)
    np.testing.assert_array_equal(found["classifier"]["kernel"], 7)
    query = found["bert"]["encoder"]["layer"]["1"]["attention"]["self"]["query"]["kernel"]
    np.testing.assert_array_equal(query.T, bert.encoder.layer[1].attention.self.query.weight.detach().numpy())
    with pytest.raises(jaxadapt.MismatchError, match=r"missing from(.*\n)*.*classifier\.weight"):
        jaxadapt.export.import_base(tmp_path, target)
