"""Adapters re-laid between families and libraries, files alone."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.configs import matching
from jaxadapt.export.conversion import TreeOptions, convert, convert_format, rename_files
from jaxadapt.models import LoraTree
from tests.keymaps.families import specimen_arrays, specimens
from tests.keymaps.families.specimens import values
from tests.models.foreign import real
from tests.models.foreign.cases import flat
from tests.support import small


def recorded_tree(name: str) -> dict[str, np.ndarray]:
    """The LoRA leaves of a recorded model, as its users would save them."""
    return {path: values(path, shape) for path, shape in real.recorded(name)["lora"].items()}


def peft_folder(name: str, folder):
    """A PEFT adapter of the specimen whose As all differ."""
    specimen_arrays.write_adapter(real.specimen(name), specimens.recorded(name)["leaves"], folder)
    return folder


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_a_tree_becomes_a_folder_as_save_writes_it(tmp_path):
    tree = recorded_tree("maxtext-qwen3-scan0")
    save_file(tree, tmp_path / "lora.safetensors")
    found = run("convert", tmp_path / "lora.safetensors", tmp_path / "out", "--from", "maxtext:qwen3/scan0",
                "--lora-alpha", "6", "--json")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert json.loads(found.output) == {
        "path": str(tmp_path / "out"), "tensors": 2 * 7 * 3, "dialect": None, "rank": 3, "lora_alpha": 6.0
    }  # fmt: skip
    jaxadapt.save(LoraTree(tree, lora_alpha=6.0), tmp_path / "saved", keymap="maxtext:qwen3/scan0")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("name", ["maxtext-qwen3-scan0", "maxtext-llama3.1-scan1", "maxtext-llama3.1"])
def test_there_and_back_between_families(name, tmp_path):
    """MaxText → PEFT → Tunix → PEFT → MaxText: the same bits, but for the factor of MaxText's queries."""
    tree, table = recorded_tree(name), real.specimen(name).table
    save_file(tree, tmp_path / "a.safetensors")
    size = real.specimen(name).options["head_dim"]
    sizes = {"h": size, "c": size // 2}
    if "llama3.1" in name:  # its heads are interleaved, so their size must be known
        with pytest.raises(jaxadapt.KeyMapError, match="their sizes are not known"):
            convert(tmp_path / "a.safetensors", tmp_path / "b", TreeOptions(from_keymap=table, lora_alpha=6))
    convert(tmp_path / "a.safetensors", tmp_path / "b", TreeOptions(from_keymap=table, lora_alpha=6, sizes=sizes))
    tunix = "tunix:qwen3" if "qwen3" in name else "tunix:llama3"
    done = convert(tmp_path / "b", tmp_path / "c.safetensors", TreeOptions(to_keymap=tunix, sizes={"h": size}))
    assert (done.dialect, done.rank, done.lora_alpha) == ("qwix", 3, 6)
    there = load_file(tmp_path / "c.safetensors")
    assert there["layers.0.attn.o_proj.w_lora_a"].shape == (4, size, 3)
    assert there["layers.2.attn.k_proj.w_lora_b"].shape == (3, 2, size)
    convert(tmp_path / "c.safetensors", tmp_path / "d", TreeOptions(from_keymap=tunix))  # the file says its alpha
    done = convert(tmp_path / "d", tmp_path / "e.safetensors", TreeOptions(to_keymap=table, sizes=sizes))
    assert done.dialect == "qwix"
    back = load_file(tmp_path / "e.safetensors")
    assert set(back) == set(tree)
    for path, x in tree.items():
        if "llama" in name and "query.kernel_lora_b" in path:
            np.testing.assert_allclose(back[path], x, rtol=3e-7)
        else:
            np.testing.assert_array_equal(back[path], x)


def test_an_adapter_of_one_layer_has_all_places_of_its_block(tmp_path):
    """MaxText's stacked Gemma 4: two layers of the file are places 1 and 3 of block 1, and its axis is five long."""
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[7, 9])
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": values(f"{layer}.{side}", shape)
        for layer in (7, 9)
        for side, shape in (("A", (2, 16)), ("B", (24, 2)))
    }
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "peft")
    table, file = "maxtext:gemma4-blocks/scan1", tmp_path / "tree.safetensors"
    convert(tmp_path / "peft", file, TreeOptions(to_keymap=table, sizes={"h": 6}))
    tree = load_file(file)
    assert {x.shape for x in tree.values()} == {(16, 2, 5, 2), (2, 2, 5, 24)}
    a = next(x for path, x in tree.items() if path.endswith("_a"))
    for place, layer in ((1, 7), (3, 9)):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
        np.testing.assert_array_equal(a[:, 1, place], tensors[key].T)
    assert not a[:, 0].any()
    assert not a[:, 1, [0, 2, 4]].any()
    save_file({path: np.ascontiguousarray(x[:, :, :4]) for path, x in tree.items()}, file)
    with pytest.raises(jaxadapt.KeyMapError, match="expected A"):  # four places are no block of Gemma 4
        convert(file, tmp_path / "back", TreeOptions(from_keymap=table, lora_alpha=6, sizes={"h": 6}))


def test_the_same_tree_as_load_fills(tmp_path):
    """gemma's shared As side by side, from a PEFT folder: what `load` puts into a model of that rank."""
    name = "gemma-gemma3"
    folder = peft_folder(name, tmp_path / "peft")
    with pytest.raises(jaxadapt.MismatchError, match=r"several tensors of the file.*"):
        convert(folder, tmp_path / "x.safetensors", TreeOptions(to_keymap="gemma:gemma3", sizes={"h": 6}))
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.warns(UserWarning, match="rounded once"):
        done = convert(
            folder,
            tmp_path / "x.safetensors",
            TreeOptions(to_keymap="gemma:gemma3", sizes={"h": 6}, on_shared="concat"),
        )
    assert (done.rank, done.lora_alpha) == (6, 6)
    target = {
        path: np.zeros([6 if size == 3 and i in (0, len(shape) - 1) else size for i, size in enumerate(shape)], "f4")
        for path, shape in real.recorded(name)["lora"].items()
    }
    with pytest.warns(UserWarning, match="rounded once"):
        expected = jaxadapt.load(folder, LoraTree(target, on_shared="concat"), keymap="gemma:gemma3")
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(expected)
    for path, x in flat(expected).items():
        np.testing.assert_array_equal(found[path], x)


def test_the_target_may_be_told_by_a_file(tmp_path):
    """Queries, keys and values in one leaf, or not: only the target's own shapes tell."""
    folder = peft_folder("gemma-gemma3-mha", tmp_path / "peft")
    with pytest.raises(jaxadapt.KeyMapError, match=r"matches layer_0.attn.kv_einsum.w, layer_0.attn.qkv_einsum.w"):
        convert(
            folder,
            tmp_path / "x.safetensors",
            TreeOptions(to_keymap="gemma:gemma3", sizes={"h": 6}, on_shared="concat"),
        )
    leaves = specimens.recorded("gemma-gemma3-mha")["leaves"]
    like = tmp_path / "base.safetensors"
    save_file({path.replace(".", "/"): np.zeros(shape, "f4") for path, shape in leaves.items()}, like)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a command says them
        found = run(
            "convert",
            folder,
            tmp_path / "x.safetensors",
            "--to",
            "gemma:gemma3",
            "--like",
            like,
            "--on-shared",
            "concat",
        )
    assert found.exit_code == 0, found.output
    assert "rank 9" in found.output
    assert "rounded once" in found.output
    assert load_file(tmp_path / "x.safetensors")["layer_0.attn.qkv_einsum._LoRAEinsum_0.lora.b"].shape == (9, 3, 4, 6)


@pytest.mark.parametrize("name", ["keras-llama", "keras-gemma3"])
def test_heads_that_have_an_a_each(name, tmp_path):
    """keras → PEFT, each head's rank beside the others' → keras: the same bits, at the rank that they had."""
    tree, table, sizes = recorded_tree(name), real.specimen(name).table, {"h": 4 if "llama" in name else 6}
    save_file(tree, tmp_path / "a.safetensors")
    leaves = specimens.recorded(name)["leaves"]
    save_file({path: np.zeros(shape, "f4") for path, shape in leaves.items()}, tmp_path / "base.safetensors")
    like = {"like": tmp_path / "base.safetensors"}
    with pytest.raises(jaxadapt.MismatchError, match="one A for all heads"):
        convert(tmp_path / "a.safetensors", tmp_path / "b", TreeOptions(from_keymap=table, lora_alpha=6, **like))
    convert(
        tmp_path / "a.safetensors",
        tmp_path / "b",
        TreeOptions(from_keymap=table, lora_alpha=6, on_shared="concat", **like),
    )
    done = convert(tmp_path / "b", tmp_path / "c.safetensors", TreeOptions(to_keymap=table, sizes=sizes))
    assert (done.dialect, done.rank, done.lora_alpha) == ("keras", 3, 6)
    back = load_file(tmp_path / "c.safetensors")
    assert set(back) == set(tree)
    for path, x in tree.items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)
    with pytest.raises(jaxadapt.MismatchError, match="one B for all heads"):
        convert(
            peft_folder(name, tmp_path / "d"), tmp_path / "e.safetensors", TreeOptions(to_keymap=table, sizes=sizes)
        )
    done = convert(
        tmp_path / "d", tmp_path / "e.safetensors", TreeOptions(to_keymap=table, sizes=sizes, on_shared="concat")
    )
    assert (done.rank, load_file(tmp_path / "e.safetensors").keys()) == (12, tree.keys())


def test_another_spelling(tmp_path):
    folder = peft_folder("gemma-gemma3", tmp_path / "peft")
    convert(folder, tmp_path / "vl", TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/vl"))
    old, new = jaxadapt.read(folder).tensors, jaxadapt.read(tmp_path / "vl").tensors
    assert {key.replace("model.language_model.", "model.") for key in new} == set(old)
    assert all("language_model" in key for key in new)


def test_another_spelling_renames_the_modules_of_the_configuration(tmp_path):
    held = jaxadapt.read(peft_folder("gemma-gemma3", tmp_path / "peft"))
    module = next(iter(held.tensors)).removeprefix("base_model.model.").rpartition(".lora_")[0]
    config = held.config.replace(alpha_pattern={module: 20}, exclude_modules=["model.vision_tower.q_proj"])
    jaxadapt.write(dataclasses.replace(held, config=config), tmp_path / "named")
    convert(tmp_path / "named", tmp_path / "vl", TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/vl"))
    new = jaxadapt.read(tmp_path / "vl")
    name = module.replace("model.", "model.language_model.", 1)
    assert (dict(new.config.alpha_pattern), new.config.scale_of(name)) == ({name: 20}, 20 / config.r)
    assert not [found for found in jaxadapt.verify(tmp_path / "vl") if found.severity == "error"]


@pytest.mark.parametrize("excluded", [["model.layers.1.self_attn.q_proj"], r"model\.layers\.1\..*", ["lm_head"]])
def test_another_spelling_adapts_no_module_that_was_excluded(excluded, tmp_path):
    module = "model.layers.0.self_attn.q_proj"
    pair = {f"base_model.model.{module}.lora_{side}.weight": np.ones((4, 4), "float32") for side in "AB"}
    config = jaxadapt.LoraConfig(r=4, target_modules=["q_proj"], exclude_modules=excluded)
    jaxadapt.write(jaxadapt.PeftTensors(config, pair), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/vl"))
    new = jaxadapt.read_config(tmp_path / "b")
    names = [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert [matching.is_target(new, name) for name in names] == [True, excluded == ["lm_head"]]


def test_another_spelling_that_is_refused_names_rename(tmp_path):
    names = TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/vl")
    module = "base_model.model.model.layers.0.self_attn.k_proj"
    pair = {f"{module}.lora_{side}.weight": np.ones((4, 4), "float32") for side in "AB"}
    head = {"base_model.model.lm_head.weight": np.ones((4, 4), "float32")}
    config = jaxadapt.LoraConfig(r=4, target_modules=["k_proj"], modules_to_save=["lm_head"])
    jaxadapt.write(jaxadapt.PeftTensors(config, pair | head), tmp_path / "head")
    vector = {f"{module}.ia3_l": np.ones((4, 1), "float32")}
    ia3 = jaxadapt.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    jaxadapt.write(jaxadapt.PeftTensors(ia3, vector), tmp_path / "ia3")
    for name, says in (("head", "lm_head\n`jaxadapt rename`"), ("ia3", "cannot convert IA3 to other names: only LoRA")):
        with pytest.raises(jaxadapt.AdapterError, match="jaxadapt rename") as caught:
            convert(tmp_path / name, tmp_path / "out", names)
        assert says in str(caught.value)
        rename_files(tmp_path / name, tmp_path / f"{name}-vl", old="model.", new="model.language_model.")


def test_another_spelling_renames_as_rename_does(tmp_path):
    """DoRA's magnitudes, an adapted embedding and a module that was trained in full."""
    module, square = "base_model.model.model.layers.0.self_attn.q_proj", np.ones((4, 4), "float32")
    arrays = {f"{module}.lora_{side}.weight": square for side in "AB"}
    arrays |= {f"base_model.model.model.embed_tokens.lora_embedding_{side}": square for side in "AB"}
    arrays |= {f"{module}.lora_magnitude_vector": square[0], "base_model.model.model.norm.weight": square[0]}
    arrays |= {"base_model.model.model.embed_tokens.lora_magnitude_vector": square[0]}
    config = jaxadapt.LoraConfig(
        r=4, target_modules=["q_proj", "model.embed_tokens"], alpha_pattern={"^model.layers.*": 3}, use_dora=True,
        modules_to_save=["norm"], inference_mode=True,
    )  # fmt: skip
    jaxadapt.write(jaxadapt.PeftTensors(config, arrays), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/vl"))
    rename_files(tmp_path / "a", tmp_path / "c", old="model.", new="model.language_model.")
    names = {key.replace(".model.model.", ".model.model.language_model.") for key in arrays}
    assert set(jaxadapt.read(tmp_path / "b").tensors) == names
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


def test_a_pattern_of_any_method_is_renamed_with_its_module(tmp_path):
    """FOURIERFT's numbers decide which values count."""
    config = jaxadapt.FourierFTConfig(target_modules=["q"], n_frequency=2, n_frequency_pattern={"a.q": 3})
    spectra = {f"base_model.model.{m}.q.fourierft_spectrum": np.ones(n, "float32") for m, n in (("a", 3), ("b", 2))}
    jaxadapt.write(jaxadapt.PeftTensors(config, spectra), tmp_path / "old")
    rename_files(tmp_path / "old", tmp_path / "new", old="a.", new="c.")
    base = {name: {"q": {"kernel": np.ones((4, 4), "float32")}} for name in "bc"}
    assert jaxadapt.from_peft(jaxadapt.read(tmp_path / "new"), base).config.n_frequency_pattern == {"c.q": 3}


def test_another_spelling_loses_no_module_that_was_saved(tmp_path):
    key, copied = "base_model.model.model.layers.0", np.ones((4, 4), "float32")
    arrays = {f"{key}.self_attn.q_proj.lora_{side}.weight": copied for side in "AB"}
    arrays |= {f"{key}.mlp.{name}_proj.weight": copied for name in ("gate", "up", "down")}
    config = jaxadapt.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["model.layers.0.mlp"])
    jaxadapt.write(jaxadapt.PeftTensors(config, arrays), tmp_path / "a")
    names = TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/bare")
    with pytest.raises(jaxadapt.MismatchError, match=r"by their new names:\n  layers\.0\.mlp"):
        convert(tmp_path / "a", tmp_path / "b", names)
    convert(tmp_path / "a", tmp_path / "vl", TreeOptions(from_keymap="gemma:gemma3", to_keymap="gemma:gemma3/vl"))
    kept = jaxadapt.read(tmp_path / "vl").tensors
    assert {name.replace("language_model.", "") for name in kept} == set(arrays)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "a target tree needs its family"),
        ({"to_keymap": "llama"}, "is ambiguous: pass --dialect"),
        ({"to_keymap": "tunix:qwen3"}, "the size of axis '.'.*--axis .="),
        ({"to_keymap": "tunix:qwen3", "sizes": {"h": 5}}, "must multiply to"),
        ({"to_keymap": "tunix:qwen3", "dialect": "quix"}, "there is no dialect 'quix'"),
        ({"to_keymap": "bert"}, "is ambiguous: pass --dialect"),
        ({"to_keymap": "bert", "dialect": "qwix"}, "no entry matches"),
    ],
)
def test_what_cannot_be_is_refused(options, what, tmp_path):
    folder = peft_folder("gemma-gemma3", tmp_path / "peft")
    with pytest.raises(jaxadapt.AdapterError, match=what):
        convert(folder, tmp_path / "x.safetensors", TreeOptions(**options))
    assert not (tmp_path / "x.safetensors").exists()


def test_sources_that_are_none(tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(jaxadapt.FileError, match=r"of a known dialect \(qwix, .*openpi\), found no such name"):
        convert(tmp_path / "a.safetensors", tmp_path / "out")
    save_file(recorded_tree("maxtext-qwen3-scan0"), tmp_path / "b.safetensors")
    with pytest.raises(jaxadapt.ConfigError, match="stores no alpha"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", TreeOptions(from_keymap="maxtext:qwen3/scan0"))
    assert not (tmp_path / "out").exists()


def test_orbax_to_a_folder_and_back(tmp_path):
    """From a model's layout, and to one that any model loads."""
    config = jaxadapt.LoraConfig(r=2, lora_alpha=4, target_modules=["q", "embed"], init_lora_weights=False)
    base = {"q": {"kernel": np.zeros((4, 6), "f4")}, "embed": {"embedding": np.zeros((5, 4), "f4")}}
    table = jaxadapt.KeyMap("two", (
        jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),
        jaxadapt.Weight("embed.embedding", "embed.weight", "v d -> v d", kind="embedding"),
    ))  # fmt: skip
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=table)
    jaxadapt.save(adapter, tmp_path / "orbax", format="orbax")
    jaxadapt.save(adapter, tmp_path / "saved")
    assert run("convert", tmp_path / "orbax", tmp_path / "out").exit_code == 0
    assert run("convert", tmp_path / "saved", tmp_path / "again", "--format", "orbax").exit_code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    loaded = jaxadapt.extract(jaxadapt.load(tmp_path / "again", {"params": base}, keymap=table))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, adapter.params)
    assert not (tmp_path / "again" / "adapter_config.json").exists()
    info = json.loads(run("inspect", tmp_path / "again", "--json").output)
    assert info["parameters"] == 2 * (4 + 6 + 5 + 4)
    assert (
        "a folder as the target for bin and orbax"
        in run("convert", tmp_path / "saved", tmp_path / "x.safetensors", "--to", "llama", "--format", "orbax").output
    )


ODD = {"q.w": np.ones((8, 6)), "q.w_lora_a": np.ones((8, 2)), "q.w_lora_b": np.ones((2, 6))}


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        ("peft x.safetensors", "--to tunix:qwen3"),
        ("peft new --to llama", r"--to needs a tree \(.safetensors\) as target"),
        ("peft new --on-shared concat", "--dialect and --on-shared need a tree"),
        ("peft new --axis h=2", "--like and --axis need a tree"),
        ("peft new --lora-alpha 2", "--lora-alpha is for a source tree"),
        ("peft x.safetensors --to tunix:gemma", r"of the target's shapes \(--like\)"),
        ("peft x.safetensors --to llama", "is ambiguous: pass --dialect"),
        ("peft x.safetensors --format orbax", "format: expected 'safetensors' for a tree, or a folder as the target"),
        (
            "tree.safetensors new --from maxtext:qwen3/scan0",
            r"for example jaxadapt.models.LoraTree\(tree, lora_alpha=16\)",
        ),
        ("odd.safetensors new --lora-alpha 2", "Pass the model's family as keymap="),
        (
            "peft x.safetensors --to gemma:gemma3 --like like.safetensors",
            r'pass\s+jaxadapt.models.LoraTree\(target,\s+on_shared="concat"\), which',
        ),
        (
            "heads.safetensors new --from keras:gemma3 --lora-alpha 6 --like like.safetensors",
            'LoraTree.tree, on_shared="concat"',
        ),
        ("pissa x.safetensors --to maxtext:qwen3", "convert it to a plain LoRA with the base it was trained on"),
    ],
)
def test_errors_on_the_command_line_name_the_way_out(words, way_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = peft_folder("gemma-gemma3", tmp_path / "peft")
    save_file(recorded_tree("maxtext-qwen3-scan0"), "tree.safetensors")
    save_file(recorded_tree("keras-gemma3"), "heads.safetensors")
    save_file(ODD, "odd.safetensors")
    leaves = {**specimens.recorded("gemma-gemma3")["leaves"], **specimens.recorded("keras-gemma3")["leaves"]}
    save_file({path: np.zeros(shape, "f4") for path, shape in leaves.items()}, "like.safetensors")
    held = jaxadapt.read(folder)
    jaxadapt.write(jaxadapt.PeftTensors(held.config.replace(init_lora_weights="pissa"), held.tensors), "pissa")
    result = CliRunner().invoke(main, ["convert", *words.split()])
    assert result.exit_code == 1
    assert re.search(way_out, result.output.strip()), result.output


@pytest.mark.filterwarnings("ignore:.*rounded once")
@pytest.mark.parametrize(
    ("words", "advised"),
    [
        ("tree.safetensors new --from maxtext:qwen3/scan0", "--lora-alpha 16"),
        ("peft x.safetensors --to gemma:gemma3 --like like.safetensors", "--on-shared concat"),
        ("heads.safetensors new --from keras:gemma3 --lora-alpha 6 --like like.safetensors", "--on-shared concat"),
    ],
)
def test_what_a_refusal_of_the_command_line_advises_works(words, advised, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft_folder("gemma-gemma3", tmp_path / "peft")
    save_file(recorded_tree("maxtext-qwen3-scan0"), "tree.safetensors")
    save_file(recorded_tree("keras-gemma3"), "heads.safetensors")
    leaves = {**specimens.recorded("gemma-gemma3")["leaves"], **specimens.recorded("keras-gemma3")["leaves"]}
    save_file({path: np.zeros(shape, "f4") for path, shape in leaves.items()}, "like.safetensors")
    refused = CliRunner().invoke(main, ["convert", *words.split()])
    option, value = advised.removeprefix("--").split()
    assert refused.exit_code == 1
    assert re.search(rf'(?i){option.replace("-", "_")}="?{value}', refused.output), refused.output
    done = CliRunner().invoke(main, ["convert", *words.split(), *advised.split()])
    assert done.exit_code == 0, done.output


def test_two_leaves_of_one_path_are_refused(tmp_path):
    """Where one would have taken the other's place."""
    tree = recorded_tree("maxtext-qwen3-scan0")
    path = next(iter(tree))
    last = path.rpartition(".")[2]
    twice = tree | {f"{path.removesuffix('.' + last)}/{last}": np.zeros_like(tree[path])}
    save_file(twice, tmp_path / "lora.safetensors")
    result = run("convert", tmp_path / "lora.safetensors", tmp_path / "out", "--lora-alpha", "6")
    assert result.exit_code == 1
    assert "two parameters have the same path" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["save", "write", "convert", "convert a file"])
def test_an_unknown_format_is_one_error(call: str, tmp_path: Path):
    tensors = jaxadapt.to_peft(small.adapter())
    jaxadapt.write(tensors, tmp_path / "peft")
    run = {
        "save": lambda: jaxadapt.save(small.adapter(), tmp_path / "out", format="pt"),
        "write": lambda: jaxadapt.write(tensors, tmp_path / "out", format="pt"),
        "convert": lambda: convert_format(tmp_path / "peft", tmp_path / "out", format="pt"),
        "convert a file": lambda: convert_format(tmp_path / "peft", tmp_path / "o.safetensors", format="pt"),
    }[call]
    with pytest.raises(jaxadapt.FileError, match=r"/o\S*: format: expected '\S+' or '.*, found 'pt'$"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
