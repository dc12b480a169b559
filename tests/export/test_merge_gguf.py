"""Merged models in GGUF, beside PEFT's merged weights: names, row order, layouts and types read back independently."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt.arrays.tensor_source import as_source
from jaxadapt.cli import main
from jaxadapt.export import merge_files
from jaxadapt.persistence import fingerprint

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")
from tests.export.test_adapter_export import FAMILIES, NAMES, adapted, model_of, rotated_pairs  # noqa: E402

pytestmark = pytest.mark.peft

NORMS = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma2": {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    "gpt2": {"ln_1": "attn_norm", "ln_2": "ffn_norm"},
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "transformer.wte": "token_embd",
       "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}


def named(family: str, model) -> dict[str, np.ndarray]:
    """The tensors of a model as llama.cpp's converter names and stores them."""
    architecture = FAMILIES[family][0]
    out = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, _, end = key.rpartition(".")
        x = value.numpy()
        if module in TOP:
            name = TOP[module]
        else:
            layer, _, inner = module.partition(".layers." if ".layers." in module else ".h.")[2].partition(".")
            name = f"blk.{layer}.{(NAMES | NORMS[architecture])[inner]}"
        kind = name.rpartition(".")[2]
        if architecture == "llama" and kind in HEADS:  # the inverse of `rotated_pairs`, by the place of each row
            order = rotated_pairs(np.arange(len(x))[:, None], HEADS[kind])[:, 0]
            x = x[np.argsort(order)]
        if architecture == "gpt2" and inner_is_linear(module):
            x = x.T
        if architecture.startswith("gemma") and "norm" in module:
            x = x + np.float32(1)
        out[f"{name}.{end}"] = np.ascontiguousarray(x)
    return out


def inner_is_linear(module: str) -> bool:
    return module.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")


def write_base(family: str, model, path, change=lambda writer: None) -> None:
    architecture = FAMILIES[family][0]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(4 if family == "gpt2" else 2)
    writer.add_name("tiny")
    change(writer)
    writer.add_token_list(["a", "b"])
    for name, x in named(family, model).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merge_into_another_base_warns(family, tmp_path):
    model, other = model_of(family), model_of(family)
    weights = {key: x.numpy() for key, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    adapted(model_of(family), FAMILIES[family][1], fan_in_fan_out=family == "gpt2").save_pretrained(tmp_path / "plain")
    tensors = jaxadapt.read(tmp_path / "plain")
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors.tensors}
    base = fingerprint.of_file(as_source(weights), {f"{module}.weight": f"{module}.weight" for module in modules})
    jaxadapt.write(dataclasses.replace(tensors, fingerprint=base), tmp_path / "in")
    for name, each in (("right", model), ("wrong", other)):
        write_base(family, each, tmp_path / f"{name}.gguf")
    merge_files.merge_gguf(tmp_path / "right.gguf", tmp_path / "in", tmp_path / "out.gguf", dtype="q8_0")
    with pytest.warns(UserWarning, match="was trained on another base"):
        merge_files.merge_gguf(tmp_path / "wrong.gguf", tmp_path / "in", tmp_path / "out.gguf", dtype="q8_0")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_merged_file_holds_pefts_merged_weights(family, tmp_path):
    write_base(family, model_of(family), tmp_path / "base.gguf")
    targets = FAMILIES[family][1]
    norms = {"modules_to_save": ["input_layernorm"]} if family == "gemma2" else {}
    options = {"fan_in_fan_out": True} if family == "gpt2" else {"use_dora": True, **norms}
    wrapped = adapted(model_of(family), targets, use_rslora=True, **options)
    wrapped.save_pretrained(tmp_path / "in")
    count = merge_files.merge_gguf(tmp_path / "base.gguf", tmp_path / "in", tmp_path / "out.gguf")
    want = named(family, wrapped.merge_and_unload())
    got = read(tmp_path / "out.gguf")
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=2e-6, err_msg=name)  # float32 sums in another order
    base = read(tmp_path / "base.gguf")
    assert sum(not np.array_equal(base[name], got[name]) for name in base) == count
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]


@pytest.mark.parametrize(("dtype", "kinds", "rtol"), [
    ("float16", {"F16", "F32"}, 2**-11), ("bfloat16", {"BF16", "F32"}, 2**-8), ("q8_0", {"F16", "F32"}, 2**-11),
])  # fmt: skip
def test_types(dtype, kinds, rtol, tmp_path):
    """Rounded once; rows of 16 and 20 do not divide into blocks of 32, so they are float16 in q8_0."""
    write_base("llama", model_of("llama"), tmp_path / "base.gguf")
    wrapped = adapted(model_of("llama"), ["q_proj"])
    wrapped.save_pretrained(tmp_path / "in")
    merge_files.merge_gguf(tmp_path / "base.gguf", tmp_path / "in", tmp_path / "out.gguf", dtype=dtype)
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors} == kinds
    for name, x in named("llama", wrapped.merge_and_unload()).items():
        np.testing.assert_allclose(read(tmp_path / "out.gguf")[name], x, rtol=rtol, atol=1e-7, err_msg=name)


def test_q8_0_and_a_head_of_its_own(tmp_path):
    """The adapter changes the head only, which the base ties to its embedding: the merged file gets `output.weight`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         pad_token_id=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    write_base("llama", model, tmp_path / "base.gguf")
    adapter_config = jaxadapt.LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"])
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype("float32") for shape in ((2, 32), (24, 2)))
    keys = [f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"]
    jaxadapt.write(jaxadapt.PeftTensors(adapter_config, dict(zip(keys, (a, b), strict=True))), tmp_path / "in")
    run = CliRunner().invoke(main, ["merge", str(tmp_path / "base.gguf"), str(tmp_path / "in"), "--out",
                                    str(tmp_path / "out.gguf"), "--dtype", "q8_0", "--json"])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["changed"] == 1
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {t.tensor_type.name for t in tensors.values()} == {"Q8_0", "F32"}
    table = model.model.embed_tokens.weight.detach().numpy()
    for name, want in (("output.weight", table + b @ a), ("token_embd.weight", table)):
        got = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        # A block of 32 values has one scale in float16, its largest value / 127: half a step, and 127 · 2^-11 of one.
        blocks = want.reshape(-1, 32)
        assert (np.abs(got - want).reshape(-1, 32) <= np.abs(blocks).max(1, keepdims=True) / 127 * 0.563).all()


def test_another_alignment_of_the_tensors(tmp_path):
    """A reader takes it from a field, which the merged file keeps."""
    write_base("llama", model_of("llama"), tmp_path / "base.gguf", lambda writer: writer.add_custom_alignment(128))
    wrapped = adapted(model_of("llama"), ["q_proj"])
    wrapped.save_pretrained(tmp_path / "in")
    merge_files.merge_gguf(tmp_path / "base.gguf", tmp_path / "in", tmp_path / "out.gguf")
    assert all(t.data_offset % 128 == 0 for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors)
    got = read(tmp_path / "out.gguf")
    for name, x in named("llama", wrapped.merge_and_unload()).items():
        np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=2e-6, err_msg=name)  # float32 sums in another order


def test_fields_that_contradict_the_tensors_are_refused(tmp_path):
    adapted(model_of("llama"), ["q_proj"]).save_pretrained(tmp_path / "in")
    for change, message in (
        (lambda writer: writer.add_uint16("split.count", 3), r"one of the 3 files of a model; join them first"),
        (lambda writer: writer.add_array("llama.attention.head_count_kv", [2, 1]), r"head_count_kv=\[2, 1\]"),
        (
            lambda writer: writer.add_head_count(0),
            r"positive integer for each field, found llama.attention.head_count=0",
        ),
        (lambda writer: writer.add_head_count(3), r"other heads than the tensors have"),
    ):
        write_base("llama", model_of("llama"), tmp_path / "base.gguf", change)
        with pytest.raises(jaxadapt.FormatError, match=message):
            merge_files.merge_gguf(tmp_path / "base.gguf", tmp_path / "in", tmp_path / "out.gguf")
    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_tensor("output_norm.weight", np.zeros(2, "float32"))
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    with pytest.raises(jaxadapt.FormatError, match="expected the matrices of a model, found none"):
        merge_files.merge_gguf(tmp_path / "none.gguf", tmp_path / "in", tmp_path / "out.gguf")


def test_a_damaged_count_is_refused(tmp_path):
    """The package gguf would read an array of 2**60 numbers one by one."""
    write_base("llama", model_of("llama"), tmp_path / "base.gguf", lambda writer: writer.add_array("x", [7] * 5))
    good = (tmp_path / "base.gguf").read_bytes()
    array = struct.pack("<Q1sIIQ", 1, b"x", 9, 5, 5)
    assert array in good
    bad = good.replace(array, struct.pack("<Q1sIIQ", 1, b"x", 9, 5, 1 << 60))
    for data in (
        bad,
        good[:8] + struct.pack("<Q", 1 << 60) + good[16:],
        good[:16] + b"\xff" * 8 + good[24:],
        good[:20],
        good[:24] + struct.pack("<Q1sII", 1, b"x", 4, 5) * 2 + struct.pack("<Q", 1 << 60),  # before the rest is read
    ):
        (tmp_path / "bad.gguf").write_bytes(data)
        says = "twice 'x'" if len(data) == 66 else ""
        with pytest.raises(jaxadapt.FormatError, match=rf"bad\.gguf: expected a GGUF file.*{says}"):
            merge_files.merge_gguf(tmp_path / "bad.gguf", tmp_path / "in", tmp_path / "out.gguf")


def test_refusals(tmp_path):
    write_base("llama", model_of("llama"), tmp_path / "base.gguf")
    adapted(model_of("llama"), ["q_proj"]).save_pretrained(tmp_path / "in")
    for out, message in (("base.gguf", "this is the base model"), ("folder", "a file name ending in .gguf")):
        with pytest.raises(jaxadapt.FileError, match=message):
            merge_files.merge_gguf(tmp_path / "base.gguf", tmp_path / "in", tmp_path / out)
    model_of("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(jaxadapt.FileError, match="written only for a base that is one"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "in", tmp_path / "out.gguf")
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(jaxadapt.FormatError, match="expected a GGUF file"):
        merge_files.merge_gguf(tmp_path / "no.gguf", tmp_path / "in", tmp_path / "out.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("x.weight", np.zeros((2, 2), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(jaxadapt.ConfigError, match="cannot write GGUF for the architecture 'mamba'; expected one of"):
        merge_files.merge_gguf(tmp_path / "other.gguf", tmp_path / "in", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
