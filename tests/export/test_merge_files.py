"""Merging and combining as files, against PEFT on the same files."""

from __future__ import annotations

import json
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from jaxadapt.export import adapter_files, merge_files
from jaxadapt.keymaps import pytorch
from jaxadapt.storage import safetensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402

pytestmark = pytest.mark.peft

SIZES = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, **SIZES)
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj"]


def llama():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, **SIZES,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]


def saved(make, tmp_path, name="adapter", seed=0, **options):
    """A base in a folder, an adapter of PEFT's in another, and PEFT's own merged weights."""
    torch.manual_seed(0)
    model, targets = make()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3  # biases too
    model.save_pretrained(tmp_path / "base", max_shard_size="1KB")
    torch.manual_seed(seed + 1)
    kind = peft.IA3Config if options.pop("ia3", False) else peft.LoraConfig
    config = kind(target_modules=targets, fan_in_fan_out=make is gpt2, **options)
    wrapped = peft.get_peft_model(model, config)
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data = torch.randn_like(p) * 0.3 + 0.5
    wrapped.save_pretrained(tmp_path / name)
    return wrapped


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "options", [{"r": 3, "use_rslora": True, "init_lora_weights": False}, {"ia3": True}], ids=["lora", "ia3"]
)
def test_merge_is_pefts(make, options, tmp_path):
    options = dict(options)
    if options.get("ia3"):
        options["feedforward_modules"] = ["c_proj"] if make is gpt2 else ["down_proj"]
    wrapped = saved(make, tmp_path, **options)
    seen = []
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    count = merge_files.merge_folder(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=lambda *at: seen.append(at)
    )
    want = wrapped.merge_and_unload().eval()
    # Rounded once from float32 sums here and there: nothing but the order of additions differs.
    got = safetensors.read(tmp_path / "out" / "model.safetensors")
    ours = {k: v for k, v in want.state_dict().items() if k in got}
    assert set(got) >= {k for k, _ in want.named_parameters()} - {"lm_head.weight"}
    for key, value in ours.items():
        np.testing.assert_allclose(got[key], value.numpy(), rtol=1e-6, atol=1e-6, err_msg=key)
    base = type(want).from_pretrained(tmp_path / "base").state_dict()
    changed = [k for k in got if not np.array_equal(got[k], base[k].numpy())]
    assert len([k for k in changed if k.endswith("weight")]) == count == 6
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.allclose(again(x).logits, want(x).logits, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert seen[-1][1] == seen[-1][2] > 0


def test_merge_finds_a_base_saved_without_its_head(tmp_path):
    """As the Hub's GPT-2: the files of the bare model lack the first part of every name."""
    wrapped = saved(gpt2, tmp_path, r=2, init_lora_weights=False)
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    whole.transformer.save_pretrained(tmp_path / "bare")
    merge_files.merge_folder(tmp_path / "bare", tmp_path / "adapter", tmp_path / "out")
    got = safetensors.read(tmp_path / "out" / "model.safetensors")
    want = wrapped.merge_and_unload().transformer.state_dict()
    assert all(np.allclose(v, want[k].numpy(), rtol=1e-6, atol=1e-6) for k, v in got.items())


@pytest.mark.filterwarnings("ignore:.*invalid shape:UserWarning")  # PEFT's own, of the bias of its B
def test_merge_puts_a_bias_of_b_onto_one_that_was_trained(tmp_path):
    wrapped = saved(gpt2, tmp_path, r=2, init_lora_weights=False, bias="all", lora_bias=True)
    merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = safetensors.read(tmp_path / "out" / "model.safetensors")
    want = wrapped.merge_and_unload().state_dict()
    for key, value in got.items():
        np.testing.assert_allclose(value, want[key].numpy(), rtol=1e-6, atol=1e-6, err_msg=key)


def test_merge_writes_nothing_for_what_cannot_be_merged(tmp_path):
    saved(llama, tmp_path, r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[3])
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(jaxadapt.AttachError, match=r"down_proj\.weight: aLoRA"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_refuses_codes_beside_scales(tmp_path):
    """As a model of 8-bit floats in blocks has them: a sum with the codes would be scaled as they are."""
    codes = np.ones((6, 4), ml_dtypes.float8_e4m3fn)
    tensors = {"q.weight": codes, "q.weight_scale_inv": np.full((1, 1), 1e-3, "float32")}
    specs = {key: (x.dtype, x.shape) for key, x in tensors.items()}
    (tmp_path / "base").mkdir()
    safetensors.write(tmp_path / "base" / "model.safetensors", specs, tensors.__getitem__, {})
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    jaxadapt.save(jaxadapt.init(base, config, key=jax.random.key(0)), tmp_path / "adapter")
    with pytest.raises(jaxadapt.FormatError, match=r"quantized \(blocks of 8 bits\).*\n.*q\.weight_scale_inv"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_refuses_another_model_and_the_base_itself(tmp_path):
    saved(llama, tmp_path / "a", r=2)
    saved(gpt2, tmp_path / "b", r=2)
    with pytest.raises(jaxadapt.MismatchError, match=r"the model has no place for model\.layers\.0-1"):
        merge_files.merge_folder(tmp_path / "b" / "base", tmp_path / "a" / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    one = tmp_path / "c" / "model.safetensors"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base").save_pretrained(one.parent)
    before = one.read_bytes()
    with pytest.raises(jaxadapt.FileError, match="this is the base model"):
        merge_files.merge_folder(one, tmp_path / "a" / "adapter", one.parent)
    assert one.read_bytes() == before
    with pytest.raises(jaxadapt.FileError, match="this is the base model"):
        merge_files.merge_folder(tmp_path / "a" / "base", tmp_path / "a" / "adapter", tmp_path / "a" / "base")


@pytest.mark.parametrize("asked", ["float32", "float16"])
def test_another_dtype_is_rounded_once_and_said(tmp_path, asked):
    """transformers opens a model in the dtype of its config.json; a base of bfloat16 rounds no sum in float32."""
    saved(llama, tmp_path, r=2, init_lora_weights=False)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    merge_files.merge_folder(tmp_path / "half", tmp_path / "adapter", tmp_path / "out", dtype=asked)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.dtype == getattr(torch, asked)
    for key, value in got.state_dict().items():
        # In float16 the two may lie on both sides of a border.
        step = 0 if asked == "float32" else 2**-10
        torch.testing.assert_close(value.float(), want[key], rtol=1e-6 + step, atol=1e-6 + step / 16, msg=key)


def test_a_configuration_in_which_no_dtype_can_be_said_is_refused(tmp_path):
    saved(llama, tmp_path, r=2)
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(jaxadapt.FormatError, match=r"config\.json: cannot set the dtype float16: expected a JSON file"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


TOKENS = {"trainable_token_indices": [1, 5]}


@pytest.mark.parametrize(
    "options", [TOKENS, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}],
    ids=["tokens", "tied adapter"],
)  # fmt: skip
def test_merge_into_a_table_that_is_the_head_as_well(options, tmp_path):
    torch.manual_seed(0)
    model = llama()[0].eval()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that its own merge counts the tied adapter twice: so no merge here
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2} | options))
        for name, p in wrapped.named_parameters():
            if p.requires_grad and "lm_head" not in name:
                torch.nn.init.normal_(p, std=0.3)
        if options is not TOKENS:
            inner = wrapped.base_model.model
            head, table = inner.lm_head, inner.model.embed_tokens
            head.lora_A["default"].weight.data = table.lora_embedding_B["default"].data.T.contiguous()
            head.lora_B["default"].weight.data = table.lora_embedding_A["default"].data.T.contiguous()
        wrapped.save_pretrained(tmp_path / "adapter")
    merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = torch.arange(6)[None]
    with torch.no_grad():
        want = wrapped(x).logits
        torch.testing.assert_close(merged(x).logits, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_a_table_that_is_not_the_adapters_is_another_base(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about merging such a thing
        saved(lambda: (llama()[0], ["embed_tokens"]), tmp_path, r=2, init_lora_weights=False)
    # The file holds the base's table beside the adapter (base_layer): another one is another base.
    (shard,) = (p for p in (tmp_path / "base").glob("*.safetensors") if "model.embed_tokens.weight" in load_file(p))
    held = load_file(shard)
    save_file(held | {"model.embed_tokens.weight": held["model.embed_tokens.weight"] + 1}, shard)
    with pytest.raises(jaxadapt.MismatchError, match="embed_tokens.base_layer.weight: its values differ"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_merge_refuses_an_adapters_folder_and_repeated_layers(tmp_path):
    saved(llama, tmp_path, r=2)
    with pytest.raises(jaxadapt.FileError, match="adapter: cannot write .* contains an adapter"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "base/adapter_config.json").write_text("{}")  # of an adapter that lies beside the model
    merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out/adapter_config.json").exists()
    config["layer_replication"] = [[0, 2], [1, 2]]
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(jaxadapt.ConfigError, match=r"repeats layers of its base.*export_base"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "no")


@pytest.mark.parametrize("make", [gpt2, llama])
def test_combine_is_pefts(make, tmp_path):
    first = saved(make, tmp_path, "one", 0, r=2, lora_alpha=6, init_lora_weights=False)
    saved(make, tmp_path, "two", 5, r=3, use_rslora=True, init_lora_weights=False)
    first.load_adapter(tmp_path / "two", "two")
    # PEFT keeps the first adapter's use_rslora, which is False here: see `combine`.
    first.add_weighted_adapter(["default", "two"], [0.7, -0.4], "both", combination_type="cat")
    first.save_pretrained(tmp_path / "peft", selected_adapters=["both"])
    run = CliRunner().invoke(main, [
        "combine", str(tmp_path / "one"), str(tmp_path / "two"), "--weights", "0.7,-0.4", "--method", "cat",
        "--out", str(tmp_path / "ours"), "--json",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout) == {"folder": str(tmp_path / "ours"), "r": 5, "lora_alpha": 5}
    want, got = jaxadapt.read(tmp_path / "peft" / "both"), jaxadapt.read(tmp_path / "ours")
    assert set(got.tensors) == set(want.tensors)
    for key, value in want.tensors.items():
        np.testing.assert_allclose(got.tensors[key], value, rtol=1e-6, atol=1e-7, err_msg=key)
    assert set(got.config.target_modules) == set(want.config.target_modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(make()[0], tmp_path / "ours")


def test_combine_with_a_smaller_rank(tmp_path):
    for name, seed in (("one", 0), ("two", 5)):
        saved(llama, tmp_path, name, seed, r=2, init_lora_weights=False)
    folders = [tmp_path / "one", tmp_path / "two"]
    adapter_files.combine_folders(folders, [1, 1], tmp_path / "four", method="cat")
    adapter_files.combine_folders(folders, [1, 1], tmp_path / "three", method="svd", svd_rank=3)
    adapter_files.combine_folders(folders, [1, 1], tmp_path / "resized", method="cat", resize=3)
    a, b = jaxadapt.read(tmp_path / "three").tensors, jaxadapt.read(tmp_path / "resized").tensors
    for module in pytorch.adapted_shapes({k: v.shape for k, v in a.items()}):
        at = f"base_model.model.{module}"
        deltas = [x[f"{at}.lora_B.weight"] @ x[f"{at}.lora_A.weight"] for x in (a, b)]
        np.testing.assert_allclose(*deltas, atol=1e-5)  # the best of rank 3, found on two ways
    assert jaxadapt.read_config(tmp_path / "four").r == 4


def test_combine_says_which_file_does_not_belong(tmp_path):
    rng = np.random.default_rng(0)
    held = {
        f"base_model.model.q.lora_{s}.weight": rng.standard_normal(n, "f4") for s, n in (("A", (2, 3)), ("B", (4, 2)))
    }
    for name, options in (("one", {}), ("two", {}), ("dora", {"use_dora": True})):
        config = jaxadapt.LoraConfig(r=2, target_modules=["q"], base_model_name_or_path=f"org/{name}", **options)
        jaxadapt.write(jaxadapt.PeftTensors(config, held, ""), tmp_path / name)
    with pytest.warns(UserWarning, match=r"different base models(.|\n)*one: org/one(.|\n)*two: org/two"):
        made = adapter_files.combine_folders([tmp_path / "one", tmp_path / "two"], [1, 1], tmp_path / "both")
    assert made.config.base_model_name_or_path is None
    with pytest.raises(jaxadapt.ConfigError, match=r"dora: use_dora=True"):
        adapter_files.combine_folders([tmp_path / "one", tmp_path / "dora"], [1, 1], tmp_path / "no")


def test_convolutions_are_combined_and_experts_refused(tmp_path):
    rng = np.random.default_rng(0)
    config = jaxadapt.LoraConfig(r=2, lora_alpha=6, target_modules=["conv"])
    shapes = {"base_model.model.conv.lora_A.weight": (2, 3, 3, 3), "base_model.model.conv.lora_B.weight": (5, 2, 1, 1)}
    files = [{key: rng.standard_normal(shape, "f4") for key, shape in shapes.items()} for _ in range(2)]
    for i, held in enumerate(files):
        jaxadapt.write(jaxadapt.PeftTensors(config, held, ""), tmp_path / str(i))
    made = adapter_files.combine_folders([tmp_path / "0", tmp_path / "1"], [0.5, -2], tmp_path / "both", method="cat")

    def change(held, scale):
        a, b = (np.asarray(held[key], "f8") for key in shapes)
        return scale * np.einsum("orhw,rixy->oixy", b, a)

    want = sum(change(held, 3 * weight) for held, weight in zip(files, (0.5, -2), strict=True))
    found = change(jaxadapt.read(tmp_path / "both").tensors, made.config.lora_alpha / made.config.r)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)  # the factors are rounded to float32

    experts = config.replace(target_modules=[], target_parameters=["experts.up"])
    held = {f"base_model.model.experts.lora_{s}.weight": np.ones(n, "f4") for s, n in (("A", (4, 3)), ("B", (5, 4)))}
    jaxadapt.write(jaxadapt.PeftTensors(experts, held, ""), tmp_path / "experts")
    save_file({"experts.up": np.ones((2, 5, 3), "f4")}, tmp_path / "model.safetensors")
    for call, way in (
        (
            lambda: merge_files.merge_folder(tmp_path / "model.safetensors", tmp_path / "experts", tmp_path / "no"),
            "export_base",
        ),
        (lambda: adapter_files.combine_folders([tmp_path / "experts"], [1], tmp_path / "no"), "jaxadapt.combine"),
    ):
        with pytest.raises(jaxadapt.ConfigError, match=rf"cannot .*target_parameters.*{way}"):
            call()
    assert not (tmp_path / "no").exists()


def test_commands(tmp_path):
    saved(llama, tmp_path, r=2, init_lora_weights=False)

    def run(*args):
        return CliRunner().invoke(main, [str(a) for a in args])

    files = tmp_path / "base", tmp_path / "adapter"
    merged = run("merge", *files, "--out", tmp_path / "m", "--dtype", "bfloat16", "--json")
    assert json.loads(merged.stdout)["changed"] == 6
    header = safetensors.read_header(tmp_path / "m" / "model.safetensors")
    assert {t.dtype for t in header.tensors.values()} == {"BF16"}
    assert run("combine", tmp_path / "adapter", "--weights", "one", "--out", tmp_path / "c").exit_code == 2
    assert run("combine", tmp_path / "adapter", "--weights", "-1", "--out", tmp_path / "c", "--rank", 1).exit_code == 0
    assert jaxadapt.read_config(tmp_path / "c").r == 1
    assert run("combine", tmp_path / "adapter", "--weights", "nan", "--out", tmp_path / "d").exit_code == 2
    wrong = run("merge", "org/name", tmp_path / "adapter", "--out", tmp_path / "d")
    assert "org/name: no such file, and no folder with model.safetensors" in wrong.output
    wrong = run("combine", tmp_path / "adapter", "--weights", "1,2", "--out", tmp_path / "d")
    assert wrong.exit_code == 1
    assert "expected one for each of the 1 adapters" in wrong.output
