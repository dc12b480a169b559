"""Exported adapters: PEFT computes the same from the plain form; GGUF and MLX hold the same matrices."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.export import export_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")
import transformers  # noqa: E402

pytestmark = pytest.mark.peft

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
X = torch.arange(12).reshape(2, 6)


def model_of(family: str, tied: bool = True):
    """A tiny model of transformers' own class, with random weights."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, vocab_size=24, bos_token_id=0,
                                         eos_token_id=0)  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "gpt_neox":
        config = transformers.GPTNeoXConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=64, rotary_pct=0.5,
                                            num_attention_heads=4, max_position_embeddings=32, vocab_size=24,
                                            bos_token_id=0, eos_token_id=0, hidden_act="gelu_new")  # fmt: skip
        return transformers.GPTNeoXForCausalLM(config).eval()
    classes = {
        "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
        "gemma3_text": "Gemma3", "phi3": "Phi3",
    }  # fmt: skip
    name = classes[family]
    config_name = "Gemma3TextConfig" if family == "gemma3_text" else f"{name}Config"
    # llama.cpp computes the scale of Gemma's attention from the size of a head.
    scalar = {"query_pre_attn_scalar": 4} if "gemma" in family else {}
    config = getattr(transformers, config_name)(**SIZES, tie_word_embeddings=tied, **scalar)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    return model


def train(wrapped, seed=1):
    """Change the trained parameters."""
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2


def adapted(model, targets=LINEAR, seed=1, **fields):
    """PEFT's model whose adapter does something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **fields})
    wrapped = peft.get_peft_model(model, config).eval()
    train(wrapped, seed)
    return wrapped


def logits(model):
    with torch.no_grad():
        return model(X).logits.numpy()


def read_back(base, folder):
    return logits(peft.PeftModel.from_pretrained(base, folder).eval())


BDLORA = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["up_proj"], "nblocks": 2}
CASES = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 2, "up_proj": 3}, "alpha_pattern": {"o_proj": 1.5, "k_proj": 5}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"q_proj": 2.5}},
    "a fraction": {"lora_alpha": 13.37},
    "an expression": {"targets": r".*\.1\.self_attn\.(q|o)_proj"},
    "layers": {"targets": ["q_proj", "up_proj"], "layers_to_transform": [1], "use_rslora": True},
    "MiCA": {"init_lora_weights": "mica"},
    "BD-LoRA": {"targets": ["q_proj", "up_proj"], "use_bdlora": BDLORA, "use_rslora": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of BD-LoRA
def test_peft_computes_the_same_from_the_plain_form(case, tmp_path):
    options = dict(CASES[case])
    wrapped = adapted(model_of("llama"), options.pop("targets", LINEAR), **options)
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "in")
    result = export_adapter(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == result.rank
    assert isinstance(config["lora_alpha"], int)
    fields = ("rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "use_bdlora", "exclude_modules")
    assert not any(config[name] for name in fields)
    assert isinstance(config["target_modules"], list)
    assert config["init_lora_weights"] is True
    base = logits(model_of("llama"))
    assert abs(want - base).max() > 0.01  # the adapter does something
    # float32: only the order of the multiplications differs
    np.testing.assert_allclose(read_back(model_of("llama"), tmp_path / "out"), want, atol=2e-5)


@pytest.mark.parametrize("how", ["base", "first"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_becomes_a_lora_of_the_original_base(init, how, tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "first")
    train(wrapped)
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "in")
    first = tmp_path / "first"
    # PEFT saves the configuration with the initialization that it had; only the values matter.
    jaxadapt.write(jaxadapt.PeftTensors(jaxadapt.read_config(tmp_path / "in"), jaxadapt.read(first).tensors), first)
    with pytest.raises(jaxadapt.ConfigError, match="this initialization changed the base of the adapter; pass the"):
        export_adapter(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = export_adapter(tmp_path / "in", tmp_path / "out", **{how: tmp_path / how})
    assert result.rank == 4
    # Two decompositions of one matrix, in torch and in numpy: 1e-6 relative for each.
    np.testing.assert_allclose(read_back(model_of("llama"), tmp_path / "out"), want, atol=1e-4)


@pytest.mark.parametrize("how", ["base", "first"])
def test_pissa_trained_in_16_bits_keeps_its_float32_start(how, tmp_path):
    """Rounding the start to 16 bits would change the largest singular values of the weight."""
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "first")
    # As PEFT's guide says, so that a load does not change the base once more.
    fields = json.loads((tmp_path / "first/adapter_config.json").read_text())
    (tmp_path / "first/adapter_config.json").write_text(json.dumps(fields | {"init_lora_weights": True}))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter + torch.randn_like(parameter) * 0.02).to(torch.bfloat16).float()
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "in")
    fields = json.loads((tmp_path / "in/adapter_config.json").read_text())
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(fields | {"init_lora_weights": "pissa"}))
    tensors = load_file(tmp_path / "in/adapter_model.safetensors")
    save_file({k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}, tmp_path / "in/adapter_model.safetensors")
    export_adapter(tmp_path / "in", tmp_path / "out", **{how: tmp_path / how})
    # Two decompositions of one matrix, in torch and in numpy: 1e-6 relative for each.
    np.testing.assert_allclose(read_back(model_of("llama"), tmp_path / "out"), want, atol=1e-4)
    if how == "first":
        arguments = [
            "undo-start",
            str(tmp_path / "in"),
            "--first",
            str(tmp_path / "first"),
            "--out",
            str(tmp_path / "undone"),
        ]
        run = CliRunner().invoke(main, arguments)
        assert run.exit_code == 0, run.output
        np.testing.assert_allclose(read_back(model_of("llama"), tmp_path / "undone"), want, atol=1e-4)
        with pytest.warns(UserWarning, match="in bfloat16 the result loses accuracy"):
            export_adapter(tmp_path / "in", tmp_path / "low", first=tmp_path / "first", dtype="bfloat16")


def test_a_lora_that_starts_by_itself_is_no_initial_adapter_of_pissa(tmp_path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    keys = [f"base_model.model.q.lora_{side}.weight" for side in "AB"]
    trained = {keys[0]: np.ones((2, 4), "float32"), keys[1]: np.ones((6, 2), "float32")}
    jaxadapt.write(jaxadapt.PeftTensors(config.replace(init_lora_weights="pissa"), trained), tmp_path / "in")
    jaxadapt.write(jaxadapt.PeftTensors(config, trained | {keys[1]: np.zeros((6, 2), "float32")}), tmp_path / "first")
    with pytest.raises(jaxadapt.MismatchError, match="with the same init_lora_weights"):
        export_adapter(tmp_path / "in", tmp_path / "out", first=tmp_path / "first")


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of backward hooks on what needs no gradient
def test_an_initialization_from_data_is_exported_with_its_first_adapter(init, tmp_path):
    """CorDA and LoRA-GA cannot be repeated from the base; `--first` names what PEFT saved before the training."""
    from peft.tuners.lora import corda, loraga
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    model = model_of("llama")
    fields = {"corda": {"corda_config": CordaConfig(corda_method="kpm")}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
                             **fields[init])  # fmt: skip
    if init == "corda":
        rows = torch.arange(24 * 4).reshape(16, 6) % 24
        corda.preprocess_corda(model, config, lambda: [model(row[None]) for row in rows])  # one each
    else:
        loraga.preprocess_loraga(model, config, lambda: model(X).logits.square().mean().backward())
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "first")
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.2
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "in")
    arguments = ["export", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 1
    assert "pass the initial adapter" in " ".join(run.output.split())
    run = CliRunner().invoke(main, [*arguments, "--first", str(tmp_path / "first"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["rank"] == 4
    got = read_back(model_of("llama"), tmp_path / "out")
    assert abs(want - logits(model_of("llama"))).max() > 0.01
    # PEFT took the start out of the base weights in float32, and the plain form takes it out of the adapter.
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_sixteen_bits_stay_exact(tmp_path):
    """B in bfloat16 times 1.5 would be rounded, so it becomes float32; times 2 it stays."""
    wrapped = adapted(model_of("llama"), ["q_proj", "o_proj"], alpha_pattern={"o_proj": 8})
    wrapped.save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in/adapter_model.safetensors")
    low = {key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}
    save_file(low, tmp_path / "in/adapter_model.safetensors")
    export_adapter(tmp_path / "in", tmp_path / "out")
    got = load_file(tmp_path / "out/adapter_model.safetensors")
    for key, x in low.items():
        scale = 1.0 if "lora_A" in key else 1.5 if "q_proj" in key else 2.0
        np.testing.assert_array_equal(got[key].astype("float64"), x.astype("float64") * scale)
        assert got[key].dtype == ("float32" if scale == 1.5 else ml_dtypes.bfloat16)
    export_adapter(tmp_path / "in", tmp_path / "low", dtype="float16")
    assert {x.dtype.name for x in load_file(tmp_path / "low/adapter_model.safetensors").values()} == {"float16"}


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    config = jaxadapt.LoraConfig(r=2, lora_alpha=20, target_modules=["q"])
    keys = [f"base_model.model.q.lora_{side}.weight" for side in "AB"]
    tensors = {keys[0]: np.ones((2, 4), "float32"), keys[1]: np.full((6, 2), 1e4, "float32")}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
    with pytest.raises(jaxadapt.MismatchError, match=r"12 finite values overflow float16, .*\n.*q\.lora_B\.weight: 12"):
        export_adapter(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_memory_is_exported_as_its_file(tmp_path):
    from tests.support import small

    adapter = small.adapter(small.LORA.replace(use_rslora=True, alpha_pattern={"up_proj": 3}))
    jaxadapt.save(adapter, tmp_path / "in")
    export_adapter(adapter, tmp_path / "saved")
    export_adapter(tmp_path / "in", tmp_path / "exported")
    assert small.files(tmp_path / "saved") == small.files(tmp_path / "exported")
    assert jaxadapt.read_config(tmp_path / "saved").rank_pattern == {}
    export_adapter(adapter, tmp_path / "low", dtype="float16")
    whole = load_file(tmp_path / "saved/adapter_model.safetensors")
    for key, x in load_file(tmp_path / "low/adapter_model.safetensors").items():
        np.testing.assert_array_equal(x, whole[key].astype("float16"))  # rounded once, after the multiplication
    plain = jaxadapt.merging.plain_lora(jaxadapt.to_peft(adapter))
    plain = dataclasses.replace(plain, config=plain.config.replace(inference_mode=True))
    jaxadapt.write(plain, tmp_path / "written")
    assert small.files(tmp_path / "written") == small.files(tmp_path / "saved")


# ---------------------------------------------------------------- GGUF


def deltas(wrapped):
    """PEFT's own ΔW of each module, (out, in)."""
    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").detach().numpy()
            found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


def rotated_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """transformers' row i of a head is llama.cpp's row 2i, and row i + half its row 2i + 1: written out one by one."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + i] = rows[head * size + 2 * i]
            out[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return out


FAMILIES = {
    "llama": ("llama", LINEAR), "mistral": ("llama", LINEAR), "qwen2": ("qwen2", LINEAR), "qwen3": ("qwen3", LINEAR),
    "gemma2": ("gemma2", LINEAR), "gemma3_text": ("gemma3", LINEAR),
    "phi3": ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": ("gpt2", ["c_attn", "c_proj", "c_fc"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_holds_the_changes(family, tmp_path):
    architecture, targets = FAMILIES[family]
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    model = model_of(family)
    model.config.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, targets, use_rslora=True, alpha_pattern={targets[1]: 2}, **options)
    wrapped.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out.gguf", "gguf", base=tmp_path / "base")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: reader.get_field(name).contents() for name in
              ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")}  # fmt: skip
    assert fields == {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora",
                      "adapter.lora.alpha": 4.0}  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"attn_q": 4, "attn_k": 2} if architecture == "llama" else {}
    for module, want in deltas(wrapped).items():
        layer, _, name = module.partition("layers." if "layers." in module else ".h.")[2].partition(".")
        place = f"blk.{layer}.{NAMES[name]}.weight"
        a, b = (tensors.pop(f"{place}.lora_{side}") for side in "ab")
        assert list(a.shape) == [want.shape[1], 4]  # GGUF lists the fastest axis first
        assert list(b.shape) == [4, want.shape[0]]
        rows = b.data if NAMES[name] not in heads else rotated_pairs(b.data, heads[NAMES[name]])
        # alpha / rank = 1; float32 products in another order
        np.testing.assert_allclose(rows @ a.data, want, rtol=1e-5, atol=1e-6, err_msg=module)
    assert not tensors


def test_gguf_of_an_untied_embedding(tmp_path):
    model = model_of("qwen2", tied=False)
    model.config.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, ["embed_tokens", "lm_head"])
    wrapped.save_pretrained(tmp_path / "in", save_embedding_layers=False)
    export_adapter(tmp_path / "in", tmp_path / "out.gguf", "gguf", base=tmp_path / "base", dtype="float16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {str(tensor.data.dtype) for tensor in tensors.values()} == {"float16"}
    # llama.cpp takes rows of lora_a for tokens and multiplies them by lora_b (out, r).
    table = tensors["token_embd.weight.lora_a"].data.astype("float32")
    got = table @ tensors["token_embd.weight.lora_b"].data.astype("float32").T
    np.testing.assert_allclose(got, deltas(wrapped)["model.embed_tokens"], rtol=5e-3, atol=1e-3)  # float16
    assert tensors["output.weight.lora_b"].data.shape == (24, 4)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(jaxadapt.MismatchError, match=r"lm_head: the head is tied(.|\n)*embed_tokens: the head is tied"):
        export_adapter(tmp_path / "in", tmp_path / "no.gguf", "gguf", base=tmp_path / "base")
    assert not (tmp_path / "no.gguf").exists()


# ---------------------------------------------------------------- MLX


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_holds_the_changes(dora, tmp_path):
    wrapped = adapted(model_of("llama"), use_rslora=True, rank_pattern={"k_proj": 2}, use_dora=dora)
    wrapped.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", "mlx")
    document = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert document["fine_tune_type"] == ("dora" if dora else "lora")
    settings = document["lora_parameters"]
    assert settings["scale"] == 1.0
    tensors = load_file(tmp_path / "out/adapters.safetensors")
    found = deltas(wrapped) if not dora else {}
    assert len(tensors) == (3 if dora else 2) * len(settings["keys"])
    for module in settings["keys"]:
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert a.shape[1] == b.shape[0] == settings["rank"] == 4
        layer = wrapped.base_model.model.get_submodule(module)
        want = found.get(module, layer.lora_B["default"].weight.detach().numpy()
                         @ layer.lora_A["default"].weight.detach().numpy() * layer.scaling["default"])  # fmt: skip
        np.testing.assert_allclose((a @ b).T, want, rtol=1e-5, atol=1e-6)
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight.detach().numpy()
            np.testing.assert_array_equal(tensors[f"{module}.m"], magnitude)


def test_mlx_names_of_gpt2(tmp_path):
    wrapped = adapted(model_of("gpt2"), ["c_attn"], fan_in_fan_out=True)
    wrapped.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", "mlx")
    assert "model.h.0.attn.c_attn.lora_a" in load_file(tmp_path / "out/adapters.safetensors")


# ---------------------------------------------------------------- what has no form


REFUSED = {
    "DoRA": ({"use_dora": True}, "vllm", r"use_dora=True: merge .*jaxadapt merge.*--rank R --base BASE"),
    "lora_bias": ({"lora_bias": True}, "plain", r"lora_bias=True: merge the adapter"),
    "copies": ({"modules_to_save": ["embed_tokens"]}, "gguf", r"modules_to_save.*jaxadapt merge"),
    "copies of norms": ({"modules_to_save": ["input_layernorm"]}, "mlx", r"modules_to_save.*jaxadapt merge"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "mlx", r"trainable_token_indices.*jaxadapt merge"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, "gguf", r"alora_invocation_tokens=.*some tokens only"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of biases that the base lacks
def test_what_has_no_form_is_refused_with_what_helps(case, tmp_path):
    fields, program, message = REFUSED[case]
    model = model_of("llama")
    model.config.save_pretrained(tmp_path / "base")
    adapted(model, ["q_proj"], **fields).save_pretrained(tmp_path / "in")
    out = tmp_path / ("out.gguf" if program == "gguf" else "out")
    with pytest.raises(jaxadapt.ConfigError, match=message):
        export_adapter(tmp_path / "in", out, program, base=tmp_path / "base")
    assert not out.exists()


def test_layers_for_tgi(tmp_path):
    adapted(model_of("llama"), ["q_proj"], layers_to_transform=[1]).save_pretrained(tmp_path / "in")
    with pytest.raises(jaxadapt.ConfigError, match="left out in all layers"):
        export_adapter(tmp_path / "in", tmp_path / "out", "tgi")
    export_adapter(tmp_path / "in", tmp_path / "out", "sglang")


def test_the_nearest_lora_of_a_rank(tmp_path):
    """IA3 as a LoRA: at full rank it is exact, at a small one the error is that of the best approximation."""
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base")
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    wrapped = peft.get_peft_model(model, config).eval()
    train(wrapped)
    want = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "in")
    with pytest.raises(jaxadapt.ConfigError, match="a plain LoRA cannot express IA3: merge"):
        export_adapter(tmp_path / "in", tmp_path / "out", "vllm")
    result = export_adapter(tmp_path / "in", tmp_path / "out", "vllm", rank=16, base=tmp_path / "base")
    assert max(result.error.values()) < 1e-5
    np.testing.assert_allclose(read_back(model_of("llama"), tmp_path / "out"), want, atol=1e-4)
    small = export_adapter(tmp_path / "in", tmp_path / "small", "vllm", rank=2, base=tmp_path / "base")
    merged = wrapped.merge_and_unload().state_dict()
    for module, error in small.error.items():
        change = (merged[f"{module}.weight"] - model_of("llama").state_dict()[f"{module}.weight"]).numpy()
        s = np.linalg.svd(change, compute_uv=False)
        assert error == pytest.approx(np.sqrt((s[2:] ** 2).sum() / (s**2).sum()), rel=1e-3)


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path):
    adapted(model_of("llama"), ["q_proj"], use_rslora=True).save_pretrained(tmp_path / "in")
    run = CliRunner().invoke(main, ["export", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout) == {"path": str(tmp_path / "out"), "program": "plain", "rank": 4, "tensors": 4,
                                      "version": "every program that reads PEFT's LoRA", "error": {}}  # fmt: skip
    shown = CliRunner().invoke(main, ["export", str(tmp_path / "in"), "--out", str(tmp_path / "x"), "--for", "sglang"])
    assert "sglang (0.5.23, its source, not run)" in shown.output
    run = CliRunner().invoke(main, ["export", str(tmp_path / "in"), "--out", str(tmp_path / "x"), "--for", "gguf"])
    assert "expected a file name ending in .gguf" in run.output
    assert run.exit_code == 1


@pytest.mark.parametrize(("name", "reason"), [("tinker", "Tinker's client (0.38.0) loads no files"), ("nobody", "")])
def test_a_program_that_no_adapter_is_written_for(tmp_path, name: str, reason: str):
    """docs/tinker.md names the case."""
    shown = CliRunner().invoke(main, ["export", "in", "--for", name, "--out", str(tmp_path / "x")])
    assert shown.exit_code == 1
    assert (
        f"expected one of plain, transformers, vllm, gguf, mlx, sglang, tgi, tensorrt-llm, found '{name}'"
        in shown.output
    )
    assert reason in shown.output
    assert ("Tinker" in shown.output) is bool(reason)
    assert not (tmp_path / "x").exists()


def head_adapter(folder) -> None:
    """A LoRA of the token embedding's head, for a Llama of 24 tokens."""
    config = jaxadapt.LoraConfig(r=2, target_modules=["lm_head"])
    module = "base_model.model.lm_head.lora_"
    tensors = {f"{module}A.weight": np.ones((2, 16), "f4"), f"{module}B.weight": np.ones((24, 2), "f4")}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), folder)


@pytest.mark.parametrize(("inner", "refused"), [(False, False), (None, True), (True, True)])
def test_a_head_is_exported_for_llama_cpp_only_if_the_base_surely_has_one(inner, refused, tmp_path):
    """transformers 4 and 5 read the two fields of a contradicting config.json differently, so it counts as tied."""
    head_adapter(tmp_path / "in")
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **SIZES,
        "tie_word_embeddings": inner is True,
    }
    if inner is None:
        fields["text_config"] = {**SIZES, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = {"base": tmp_path / "config.json"}
    if refused:
        with pytest.raises(jaxadapt.AdapterError, match="tied to"):
            export_adapter(tmp_path / "in", tmp_path / "out.gguf", "gguf", **options)
        assert not (tmp_path / "out.gguf").exists()
    else:
        assert export_adapter(tmp_path / "in", tmp_path / "out.gguf", "gguf", **options).rank == 2


def test_a_dora_without_its_magnitudes_is_refused_for_mlx(tmp_path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], use_dora=True)
    tensors = {f"base_model.model.q.lora_{s}.weight": np.ones(n, "f4") for s, n in (("A", (2, 4)), ("B", (6, 2)))}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
    with pytest.raises(jaxadapt.MismatchError, match="q: expected its magnitudes"):
        export_adapter(tmp_path / "in", tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_a_qalora_whose_a_is_no_matrix_is_refused(tmp_path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], use_qalora=True)
    tensors = {f"base_model.model.q.lora_{s}.weight": np.ones(n, "f4") for s, n in (("A", (4,)), ("B", (6, 2)))}
    jaxadapt.write(jaxadapt.PeftTensors(config, tensors), tmp_path / "in")
    with pytest.raises(jaxadapt.MismatchError, match=r"q: expected rank 2, found A \[4\] and B \[6, 2\]"):
        export_adapter(tmp_path / "in", tmp_path / "out")


def test_the_initial_adapter_is_not_overwritten(tmp_path):
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    tensors = {f"base_model.model.q.lora_{s}.weight": np.ones(n, "f4") for s, n in (("A", (2, 4)), ("B", (6, 2)))}
    for name, start in (("in", "pissa"), ("first", "pissa")):
        jaxadapt.write(jaxadapt.PeftTensors(config.replace(init_lora_weights=start), tensors), tmp_path / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    with pytest.raises(jaxadapt.AdapterError, match="first"):
        export_adapter(tmp_path / "in", tmp_path / "first", first=tmp_path / "first")
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == before
