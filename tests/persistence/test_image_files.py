"""Image adapters in one file: kohya-ss, LyCORIS and diffusers.

The names were compared with diffusers' own conversion, for every module of Stable Diffusion and SDXL, in
tests/full/test_image_names.py. Here a few of them are written by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.keymaps import pytorch
from jaxadapt.persistence.formats import Wanted, image_files
from tests.support import fuzz_image_files

P = "base_model.model."
Arrays = dict[str, np.ndarray[Any, Any]]

# (kohya-ss' name, model and module of diffusers), from files of each program.
KNOWN = (
    ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
     "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
     "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"),
    ("lora_unet_up_blocks_1_resnets_2_time_emb_proj", "unet.up_blocks.1.resnets.2.time_emb_proj"),
    ("lora_te_text_model_encoder_layers_11_self_attn_q_proj",
     "text_encoder.text_model.encoder.layers.11.self_attn.q_proj"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc2", "text_encoder.text_model.encoder.layers.0.mlp.fc2"),
    ("lora_te_encoder_layers_0_mlp_fc2", "text_encoder.encoder.layers.0.mlp.fc2"),  # with transformers 5
)  # fmt: skip
KNOWN_XL = (
    ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
     "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"),
    ("lora_unet_input_blocks_8_1_proj_in", "unet.down_blocks.2.attentions.1.proj_in"),
    ("lora_unet_middle_block_1_transformer_blocks_9_ff_net_2",
     "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
    ("lora_unet_output_blocks_5_2_conv", "unet.up_blocks.1.upsamplers.0.conv"),
    ("lora_unet_output_blocks_3_0_skip_connection", "unet.up_blocks.1.resnets.0.conv_shortcut"),
    ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
    ("lora_te1_text_model_encoder_layers_3_self_attn_v_proj",
     "text_encoder.text_model.encoder.layers.3.self_attn.v_proj"),
    ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"),
)  # fmt: skip


def kohya(names: Any, ranks: tuple[int, ...] = (2, 3), dtype: str = "float16") -> Arrays:
    """A file of kohya-ss; modules with "conv", "op" and "skip" in the name are convolutions."""
    rng, out = np.random.default_rng(0), Arrays()
    for number, (name, _) in enumerate(names):
        window = (3, 3) if name.endswith(("conv", "_op")) else (1, 1) if name.endswith("connection") else ()
        r, ones = ranks[number % len(ranks)], (1,) * len(window)
        out[f"{name}.lora_down.weight"] = (0.1 * rng.standard_normal((r, 8, *window))).astype(dtype)
        out[f"{name}.lora_up.weight"] = (0.1 * rng.standard_normal((6, r, *ones))).astype(dtype)
        out[f"{name}.alpha"] = np.asarray(1.5 + number % 2, dtype)
    return out


def equal(one: Path, other: Arrays) -> bool:
    found = load_file(one)
    return found.keys() == other.keys() and all(
        found[k].dtype == x.dtype and found[k].tobytes() == x.tobytes() for k, x in other.items()
    )


def run(*args: object) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize("names", [KNOWN, KNOWN_XL], ids=["SD", "SDXL"])
def test_a_file_of_kohya_becomes_pefts_folders_and_again_the_file(names: Any, tmp_path: Path):
    file, tensors = tmp_path / "style.safetensors", kohya(names)
    save_file(tensors, file, {"ss_network_dim": "2"})
    read = jaxadapt.read(file)
    for number, (name, module) in enumerate(names):
        for end, peft in (("down", "A"), ("up", "B")):
            key = f"{P}{module}.lora_{peft}.weight"
            np.testing.assert_array_equal(read.tensors[key], tensors[f"{name}.lora_{end}.weight"])
        assert read.config.scale_of(module) == (1.5 + number % 2) / (2, 3)[number % 2]
    assert run("convert", file, tmp_path / "peft").exit_code == 0
    folders = {path.name for path in (tmp_path / "peft").iterdir()}
    assert folders == {module.partition(".")[0] for _, module in names}
    unet = jaxadapt.read(tmp_path / "peft" / "unet")
    assert set(unet.tensors) == {k.replace(f"{P}unet.", P) for k in read.tensors if f"{P}unet." in k}
    assert all(f.severity == "note" for f in jaxadapt.verify(tmp_path / "peft" / "unet"))
    result = run("convert", tmp_path / "peft", tmp_path / "back.safetensors", "--format", "kohya-ss")
    assert result.exit_code == 0, result.output
    assert equal(tmp_path / "back.safetensors", tensors)
    assert run("convert", file, tmp_path / "same.safetensors").exit_code == 0
    assert equal(tmp_path / "same.safetensors", tensors)
    with safe_open(tmp_path / "same.safetensors", "np") as same:
        assert same.metadata() == {"ss_network_dim": "2"}


def test_the_flattened_names_of_all_modules_differ():
    for model, patterns in pytorch.MODULES.items():
        names = [name for pattern in patterns for name in pytorch.expand(pattern)]
        flat = {name.replace(".", "_") for name in names}
        assert len(flat) == len(names), model
    assert len(pytorch.sdxl_names()) == len(set(pytorch.sdxl_names().values()))
    assert set(pytorch.sdxl_names()) <= set(pytorch.dotted_names("unet").values())


OLD_DIFFUSERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight":
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.up.weight":
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_k_lora.down.weight":
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_A.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight":
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
    "unet.conv_in.lora.down.weight": "unet.conv_in.lora_A.weight",
    "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight":
        "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight",
}  # fmt: skip


def test_the_names_of_diffusers():
    found = image_files.find_layout(OLD_DIFFUSERS)
    assert found is not None
    assert found.keys == {P + peft: key for key, peft in OLD_DIFFUSERS.items()}
    assert image_files.find_layout([*OLD_DIFFUSERS, "epoch"]) is None


def test_a_file_of_diffusers_keeps_its_names(tmp_path: Path):
    rng = np.random.default_rng(1)
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"{module}.to_q.lora_A.weight": rng.standard_normal((4, 8)).astype("float32"),
        f"{module}.to_q.lora_B.weight": rng.standard_normal((8, 4)).astype("float32"),
        f"{module}.to_k.lora.down.weight": rng.standard_normal((4, 8)).astype("float32"),
        f"{module}.to_k.lora.up.weight": rng.standard_normal((8, 4)).astype("float32"),
        f"{module}.to_k.alpha": np.asarray(2, "float32"),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    config = jaxadapt.read_config(tmp_path / "a.safetensors")
    assert {m: config.scale_of(m) for m in config.get("target_modules")} == {
        f"{module}.to_q": 1, f"{module}.to_k": 0.5
    }  # fmt: skip
    converted = run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert converted.exit_code == 0, converted.output
    assert equal(tmp_path / "b.safetensors", tensors)


RECORDED = Path(__file__).parent / "recorded_diffusers.safetensors"
"""Written by diffusers 0.42.1 with PEFT 0.21.2: `save_pipeline` of tests/full/test_image_names.py."""
SCALES = {  # of PEFT's layers in the pipeline that was saved
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k": 8 / 4,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 5 / 3,  # rank_pattern and alpha_pattern
    "text_encoder.encoder.layers.0.self_attn.q_proj": 6 / 2**0.5,  # rsLoRA
}


def header(path: Path) -> Any:
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("lora_adapter_metadata", "null"))


def test_the_ranks_and_alphas_in_the_header_of_diffusers_are_read(tmp_path: Path):
    config = jaxadapt.read_config(RECORDED)
    assert {m: config.scale_of(m) for m in SCALES} == pytest.approx(SCALES, rel=1e-15)
    assert {f.severity for f in jaxadapt.verify(RECORDED)} == {"note"}
    assert run("convert", RECORDED, tmp_path / "k.safetensors", "--format", "kohya-ss").exit_code == 0
    kohya_file = load_file(tmp_path / "k.safetensors")
    names = image_files.kohya_keys(SCALES)
    found = {m: kohya_file[f"{n}.alpha"] / len(kohya_file[f"{n}.lora_down.weight"]) for m, n in names.items()}
    assert found == pytest.approx(SCALES, rel=1e-15)


@pytest.mark.peft
def test_an_alpha_unlike_the_rank_is_written_into_the_header_of_diffusers(tmp_path: Path):
    """PEFT gets the header's fields from diffusers: `LoraConfig(**fields)`."""
    import peft

    names = (KNOWN[0], KNOWN[1], KNOWN[4])
    save_file(kohya(names), tmp_path / "k.safetensors")
    result = run("convert", tmp_path / "k.safetensors", tmp_path / "d.safetensors", "--format", "diffusers")
    assert result.exit_code == 0, result.output
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in load_file(tmp_path / "d.safetensors"))
    scales = {module: (1.5 + number % 2) / (2, 3)[number % 2] for number, (_, module) in enumerate(names)}
    for model in ("unet", "text_encoder"):
        own = {name.removeprefix(f"{model}."): s for name, s in scales.items() if name.startswith(f"{model}.")}
        fields = {
            key.removeprefix(f"{model}."): value
            for key, value in header(tmp_path / "d.safetensors").items() if key.startswith(f"{model}.")
        }  # fmt: skip
        tree = _module_tree([*own])
        peft.inject_adapter_in_model(peft.LoraConfig(**fields), tree)
        assert {name: tree.get_submodule(name).scaling["default"] for name in own} == own


def _module_tree(names: list[str], size: int = 8) -> Any:
    import torch

    tree = torch.nn.Module()
    for name in names:
        module = tree
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        module.add_module(last, torch.nn.Linear(size, size))
    return tree


def test_a_new_rank_is_also_one_in_the_header_of_diffusers(tmp_path: Path):
    assert run("resize", RECORDED, "--rank", 1, "--out", tmp_path / "1.safetensors").exit_code == 0
    found = header(tmp_path / "1.safetensors")
    assert (found["unet.r"], found["unet.rank_pattern"], found["text_encoder.r"]) == (1, {}, 1)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ("[", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"unet.r": 3}', r"conv_in: rank 3 in the header, 2 in its tensors"),
        ('{"unet.r": 2, "unet.lora_alpha": 4}', r"conv_in: alpha 4 in the header, 3 in its tensor"),
        ('{"unet.r": -2}', "unet: LoraConfig: r: expected"),
    ],
)
def test_a_header_of_diffusers_that_contradicts_the_tensors_is_refused(fields: str, what: str, tmp_path: Path):
    tensors: Arrays = {
        "unet.conv_in.lora_A.weight": np.ones((2, 4), "f4"), "unet.conv_in.lora_B.weight": np.ones((8, 2), "f4"),
        "unet.conv_in.alpha": np.asarray(3, "f4"),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": fields})
    with pytest.raises(jaxadapt.AdapterError, match=what) as error:
        jaxadapt.read(tmp_path / "a.safetensors")
    if "without metadata (safetensors' load_file and save_file)" in str(error.value):
        save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
        assert jaxadapt.read_config(tmp_path / "a.safetensors").scale_of("unet.conv_in") == 1.5


def test_a_setting_of_one_module_is_not_that_of_modules_whose_names_end_alike(tmp_path: Path):
    """PEFT tries a pattern at the end of each name; "^" binds it to the whole one."""
    tensors = {
        f"transformer.{name}.lora_{side}.weight": np.ones((2, 2), "f4")
        for name in ("proj_out", "blocks.0.proj_out", "blocks.1.proj_out") for side in "AB"
    } | {"transformer.proj_out.alpha": np.asarray(1, "f4")}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "peft").exit_code == 0
    config = jaxadapt.read_config(tmp_path / "peft" / "transformer")
    assert [config.scale_of(name) for name in ("proj_out", "blocks.0.proj_out")] == [0.5, 1]


def test_a_folder_that_is_no_model_of_a_pipeline_is_not_written_as_one_file(tmp_path: Path):
    """Neither program would find a name in it."""
    tensors = {f"{P}model.layers.0.q_proj.lora_{side}.weight": np.ones((2, 2), "f4") for side in "AB"}
    folder = tmp_path / "transformer"
    config = jaxadapt.LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), folder)
    refused = run("convert", folder, tmp_path / "a.safetensors", "--format", "diffusers")
    assert "convert the folder above it" in " ".join(refused.output.split())
    for style in ("diffusers", "kohya-ss"):
        assert run("convert", tmp_path, tmp_path / "a.safetensors", "--format", style).exit_code == 0
        read = jaxadapt.read_config(tmp_path / "a.safetensors")
        assert read.scale_of(read.get("target_modules")[0]) == pytest.approx(8 / 2**0.5)
    shutil.copytree(folder, tmp_path / "stranger")
    refused = run("convert", tmp_path, tmp_path / "b.safetensors", "--format", "diffusers")
    assert "stranger.model.layers.0.q_proj" in refused.output
    assert "transformer.model.layers.0.q_proj" not in refused.output  # this one has a name


def lycoris() -> dict[str, Arrays]:
    """Files of LyCORIS, by method."""
    rng, name = np.random.default_rng(2), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

    def draw(**shapes: tuple[int, ...]) -> Arrays:
        return {f"{name}.{k}": rng.standard_normal(s).astype("float32") for k, s in shapes.items()}

    alpha = {f"{name}.alpha": np.asarray(1, "float32")}
    return {
        "LOHA": draw(hada_w1_a=(8, 2), hada_w1_b=(2, 12), hada_w2_a=(8, 2), hada_w2_b=(2, 12)) | alpha,
        "LOKR": draw(lokr_w1=(2, 3), lokr_w2_a=(4, 1), lokr_w2_b=(1, 4)) | alpha,
        "LoKr in sizes": draw(lokr_w1=(4, 3), lokr_w2_a=(2, 1), lokr_w2_b=(1, 4)) | alpha,
        "OFT or BOFT": draw(oft_blocks=(4, 2, 2)) | alpha,
        "GLoRA": draw(**{"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (8, 2), "b2.weight": (2, 8)}) | alpha,
        "full": draw(diff=(8, 8), diff_b=(8,)),
        "IA3": draw(weight=(8,)) | {f"{name}.on_input": np.asarray(1)},
        "LoCon with a middle tensor": draw(
            **{"lora_down.weight": (2, 8), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (8, 2)}
        ),
    }


def _lycoris_change(method: str, t: Arrays) -> np.ndarray[Any, Any]:
    """ΔW as LyCORIS computes it."""
    x = {key.rpartition(".")[2]: value.astype(np.float64) for key, value in t.items()}
    if method == "LOHA":
        return x["alpha"] / 2 * (x["hada_w1_a"] @ x["hada_w1_b"]) * (x["hada_w2_a"] @ x["hada_w2_b"])
    return x["alpha"] / 1 * np.kron(x["lokr_w1"], x["lokr_w2_a"] @ x["lokr_w2_b"])


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
def test_lycoris_is_pefts_method(method: str, tmp_path: Path):
    tensors = lycoris()[method]
    save_file(tensors, tmp_path / "a.safetensors")
    assert jaxadapt.read_config(tmp_path / "a.safetensors").peft_type == method
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "peft").exit_code == 0
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = jaxadapt.read(tmp_path / "peft" / "unet")
    table = jaxadapt.KeyMap("one", (jaxadapt.Weight("q.kernel", f"{module}.weight", "i o -> o i"),))
    base = {"q": {"kernel": np.zeros((12, 8), "float32")}}
    merged = jaxadapt.merge(base, jaxadapt.from_peft(adapter, base, keymap=table))
    np.testing.assert_allclose(merged["q"]["kernel"].T, _lycoris_change(method, tensors), rtol=1e-5, atol=1e-6)
    result = run("convert", tmp_path / "peft", tmp_path / "b.safetensors", "--format", "kohya-ss")
    assert result.exit_code == 0, result.output
    assert equal(tmp_path / "b.safetensors", tensors)
    refused = run("convert", tmp_path / "peft", tmp_path / "c.safetensors", "--format", "diffusers")
    assert "kohya-ss has names for LoRA, LoHa and LoKr (--format kohya-ss)" in " ".join(refused.output.split())


def test_dora(tmp_path: Path):
    """kohya-ss has one magnitude for each output in (out, 1), and PEFT in (out,)."""
    tensors = kohya(KNOWN[:1], ranks=(2,)) | {f"{KNOWN[0][0]}.dora_scale": np.arange(6, dtype="float16")[:, None]}
    save_file(tensors, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "peft").exit_code == 0
    adapter = jaxadapt.read(tmp_path / "peft" / "unet")
    assert adapter.config.get("use_dora")
    module = KNOWN[0][1].removeprefix("unet.")
    np.testing.assert_array_equal(adapter.tensors[f"{P}{module}.lora_magnitude_vector"], np.arange(6))
    assert run("convert", tmp_path / "peft", tmp_path / "b.safetensors", "--format", "kohya-ss").exit_code == 0
    assert equal(tmp_path / "b.safetensors", tensors)


@pytest.mark.peft
def test_lokr_that_decomposes_both_where_a_matrix_is_large_is_pefts(tmp_path: Path):
    """With `decompose_both`, LyCORIS and PEFT keep w1 whole where the rank is at least half of its size."""
    import peft
    import torch

    tensors: Arrays = {}
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    sizes = {"q": {"lokr_w1": (2, 2), "lokr_w2": (2, 2)}, "k": {
        "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}}  # fmt: skip
    for name, shapes in sizes.items():
        flat = f"lora_unet_{layer.replace('.', '_')}_to_{name}"
        tensors |= {f"{flat}.{end}": np.ones(shape, "float32") for end, shape in shapes.items()}
        tensors[f"{flat}.alpha"] = np.asarray(2, "float32")
    save_file(tensors, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "peft").exit_code == 0
    ours = jaxadapt.read(tmp_path / "peft" / "unet")
    tree = _module_tree([f"{layer}.to_q"], 4)
    tree.get_submodule(layer).add_module("to_k", torch.nn.Linear(16, 16))
    model = peft.get_peft_model(tree, peft.PeftConfig.from_pretrained(str(tmp_path / "peft" / "unet")))
    theirs = peft.get_peft_model_state_dict(model)
    assert {key: x.shape for key, x in ours.tensors.items()} == {key: tuple(x.shape) for key, x in theirs.items()}


PASSING = [name for name in lycoris() if name not in ("LOHA", "LOKR")]


@pytest.mark.parametrize("kind", PASSING)
def test_what_peft_has_no_method_for_passes_through(kind: str, tmp_path: Path):
    tensors = lycoris()[kind]
    save_file(tensors, tmp_path / "a.safetensors")
    verified = run("verify", tmp_path / "a.safetensors")
    assert verified.exit_code == 0, verified.output
    assert f"(LyCORIS' {kind}" in " ".join(verified.output.split())
    extracted = run("extract", tmp_path / "a.safetensors", "--out", tmp_path / "peft")
    assert "the file is one image adapter" in " ".join(extracted.output.split())
    assert jaxadapt.read_config(tmp_path / "a.safetensors").peft_type == "LYCORIS"
    converted = run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert converted.exit_code == 0, converted.output
    assert equal(tmp_path / "b.safetensors", tensors)
    refused = run("convert", tmp_path / "a.safetensors", tmp_path / "peft")
    assert refused.exit_code == 1
    assert f"(LyCORIS' {kind}" in " ".join(refused.output.split())
    assert "only pass through; write one file" in " ".join(refused.output.split())
    assert run("inspect", tmp_path / "a.safetensors").exit_code == 0


def test_modules_of_an_unknown_model_stay_flattened(tmp_path: Path):
    tensors = kohya([("lora_unet_double_blocks_0_img_attn_proj", ""), ("lora_unet_single_blocks_1_linear1", "")])
    save_file(tensors, tmp_path / "flux.safetensors")
    (found,) = [f for f in jaxadapt.verify(tmp_path / "flux.safetensors") if f.code == "image-file"]
    assert len(found.subjects) == 2
    assert run("resize", tmp_path / "flux.safetensors", "--rank", 4, "--out", tmp_path / "4.safetensors").exit_code == 0
    before, after = tensors, load_file(tmp_path / "4.safetensors")
    assert before.keys() == after.keys()
    for name in ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_1_linear1"):
        change = [
            float(t[f"{name}.alpha"]) / len(t[f"{name}.lora_down.weight"])
            * t[f"{name}.lora_up.weight"].astype("f4") @ t[f"{name}.lora_down.weight"].astype("f4")
            for t in (before, after)
        ]  # fmt: skip
        np.testing.assert_allclose(*change, rtol=5e-3, atol=5e-3)  # B times the scale, rounded once to float16
    refused = run("convert", tmp_path / "flux.safetensors", tmp_path / "peft")
    assert "names jaxadapt does not know" in refused.output
    assert run("convert", tmp_path / "flux.safetensors", tmp_path / "same.safetensors").exit_code == 0
    assert equal(tmp_path / "same.safetensors", tensors)


def test_every_command_takes_them(tmp_path: Path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = kohya(KNOWN, ranks=(2,), dtype="float32")
    save_file(tensors, file)
    save_file({k: x if k.endswith("alpha") else 2 * x for k, x in tensors.items()}, other)
    info = json.loads(run("inspect", file, "--json").output)
    assert info["config"]["r"] == 2
    assert len(info["tensors"]) == 2 * len(KNOWN)
    verified = run("verify", file, "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.output)["error"] == 0
    found = json.loads(run("diff", file, other, "--json").output)
    assert found["totals"]
    combined = run("combine", file, other, "--weights", "1,0.5", "--method", "cat", "--out", tmp_path / "c.safetensors")
    assert combined.exit_code == 0, combined.output
    both = load_file(tmp_path / "c.safetensors")
    assert both.keys() == tensors.keys()
    for name, _ in KNOWN:
        ours, theirs = (
            float(t[f"{name}.alpha"]) / len(t[f"{name}.lora_down.weight"])
            * t[f"{name}.lora_up.weight"] @ t[f"{name}.lora_down.weight"] for t in (both, tensors)
        )  # fmt: skip
        np.testing.assert_allclose(ours, (1 + 0.5 * 4) * theirs, rtol=1e-5, atol=1e-5)
    cast = run("convert", file, tmp_path / "half.safetensors", "--dtype", "float16")
    assert cast.exit_code == 0, cast.output
    assert {x.dtype.name for x in load_file(tmp_path / "half.safetensors").values()} == {"float16"}


def test_a_file_without_alphas_stays_one(tmp_path: Path):
    tensors = {key: x for key, x in kohya(KNOWN).items() if not key.endswith("alpha")}
    save_file(tensors, tmp_path / "a.safetensors")
    converted = run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert converted.exit_code == 0, converted.output
    assert equal(tmp_path / "b.safetensors", tensors)
    refused = run("export", tmp_path / "a.safetensors", "--out", tmp_path / "out")
    assert (refused.exit_code, "writes PEFT's folder for each" in " ".join(refused.output.split())) == (1, True)


def test_a_rank_that_only_the_configuration_states_is_refused(tmp_path: Path):
    """It is in PEFT's scale, and the file's scale follows from the tensors."""
    save_file(kohya(KNOWN, ranks=(2,)), tmp_path / "a.safetensors")
    held = jaxadapt.read(tmp_path / "a.safetensors")
    wrong = jaxadapt.PeftTensors(held.config.replace(r=4), held.tensors)
    with pytest.raises(jaxadapt.MismatchError, match=r"to_out\.0: 4, the tensor is \[2, 8\]"):
        image_files.write_file(wrong, tmp_path / "b.safetensors", Wanted("kohya-ss"), lambda *_: None)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("style", ["kohya-ss", "diffusers"])
def test_a_method_that_image_programs_do_not_know_is_refused(style: str, tmp_path: Path):
    """Its file would hold no configuration, and nothing could read it."""
    config = jaxadapt.IA3Config(target_modules=["q"], feedforward_modules=[])
    file = {"base_model.model.unet.q.ia3_l": np.ones((6, 1), "f4")}
    jaxadapt.write(jaxadapt.PeftTensors(config, file), tmp_path / "ia3")
    target = tmp_path / "new.safetensors"
    found = CliRunner().invoke(main, ["convert", str(tmp_path / "ia3"), str(target), "--format", style])
    assert found.exit_code == 1
    assert f"cannot write one file of {style}, which has no name for:" in found.stderr
    assert not target.exists()


def test_a_damaged_file_is_refused_by_name(tmp_path: Path):
    tensors = kohya(KNOWN[:1]) | {f"{KNOWN[0][0]}.alpha": np.ones(2, "float16")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(jaxadapt.FormatError, match="alpha: expected one finite number, found 2 values"):
        jaxadapt.read(tmp_path / "a.safetensors")
    save_file({"w": np.ones(3)}, tmp_path / "b.safetensors")
    with (
        pytest.raises(jaxadapt.FormatError, match="expected the keys of an image adapter"),
        image_files.open_file(tmp_path / "b.safetensors"),
    ):
        pass


def test_random_files_are_refused_or_written_back():
    """20,000 of them here, in two seconds; a million by hand (tests/full/README.md)."""
    found = fuzz_image_files.main(20_000)
    assert found.keys() == {"no image adapter", "refused", "LYCORIS", "LORA", "LOHA", "LOKR"}
    assert min(found.values()) > 50
