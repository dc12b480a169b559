"""Merging files where the head is tied to the table of tokens, against the unmerged PEFT model's logits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.export import merge_files
from jaxadapt.storage import hf_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

pytestmark = [
    pytest.mark.peft,
    # PEFT's own: of adapters on tied weights, and of the base's embeddings that it saves with them.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # GPT-2's head is a Linear
]

SIZES = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, **SIZES,
}  # fmt: skip
IDS = torch.arange(6)[None]


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **LLAMA))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(tie_word_embeddings=True, **LLAMA))


def gemma() -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(head_dim=4, **LLAMA))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, **SIZES))


def saved(tmp_path: Any, make: Any = llama, **options: Any) -> Any:
    """A base in a folder, an adapter of PEFT's in another, and the logits of PEFT with both read again."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    model.save_pretrained(tmp_path / "base", max_shard_size="1KB")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=make is gpt2, **options)
    wrapped = peft.get_peft_model(model, config)
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)  # in place: tied adapters share memory
    wrapped.save_pretrained(tmp_path / "adapter")
    return unmerged(tmp_path)


def unmerged(tmp_path: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(IDS).logits


def merged(tmp_path: Any) -> Any:
    merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", max_shard_size=1000)
    model, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits


def close(got: Any, want: Any) -> None:
    # In float32 merged and unmerged differ in the order of the sums alone.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * max(1, want.abs().max().item()))


def tie(tmp_path: Any) -> Any:
    return json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]


Q, E = "q_proj", "embed_tokens"
TIES = {"ensure_weight_tying": True}
CASES = {
    "saved table": ({"target_modules": [Q], "modules_to_save": [E]}, False),
    "saved head": ({"target_modules": [Q], "modules_to_save": ["lm_head"]}, False),
    "saved both": ({"target_modules": [Q], "modules_to_save": [E, "lm_head"]}, False),
    "saved as one": ({"target_modules": [Q], "modules_to_save": [E], **TIES}, True),
    "table": ({"target_modules": [Q, E]}, False),
    "head": ({"target_modules": [Q, "lm_head"]}, False),
    "both": ({"target_modules": [Q, E, "lm_head"]}, False),
    "one": ({"target_modules": [Q, "lm_head"], **TIES}, True),
    "tokens": ({"target_modules": [Q], "trainable_token_indices": [1, 5]}, True),
    "tokens of the head": ({"target_modules": [Q], "trainable_token_indices": {"lm_head": [1, 5]}}, False),
    "tokens of both": ({"target_modules": [Q], "trainable_token_indices": {E: [1, 5], "lm_head": [1, 2]}}, False),
    "the same tokens": ({"target_modules": [Q], "trainable_token_indices": {E: [1, 5], "lm_head": [1, 5]}}, True),
    "tokens as one": ({"target_modules": [Q], "trainable_token_indices": [1, 5], **TIES}, True),
    "saved table, head": ({"target_modules": [Q, "lm_head"], "modules_to_save": [E]}, False),
    "table, saved head": ({"target_modules": [Q, E], "modules_to_save": ["lm_head"]}, False),
    "DoRA of both": ({"target_modules": [Q, E, "lm_head"], "use_dora": True}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_computes_what_peft_does_unmerged(case, tmp_path):
    options, tied = CASES[case]
    want = saved(tmp_path, **options)
    close(merged(tmp_path), want)
    assert tie(tmp_path) is tied
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not tied


@pytest.mark.parametrize("make", [qwen2, gemma, gpt2])
@pytest.mark.parametrize("case", ["saved table", "table", "both"])
def test_other_models_too(make, case, tmp_path):
    names = {Q: "c_attn", E: "wte"} if make is gpt2 else {}
    options = {key: [names.get(name, name) for name in value] for key, value in CASES[case][0].items()}
    want = saved(tmp_path, make, **options)
    if make is not qwen2:  # gemma and gpt2 are tied by default
        path = tmp_path / "base/config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "tie_word" not in k}))
    close(merged(tmp_path), want)
    assert tie(tmp_path) is False


def test_peft_ties_no_table_that_it_does_not_know_by_name(tmp_path):
    want = saved(tmp_path, gpt2, target_modules=["c_attn", "wte"], **TIES)
    close(merged(tmp_path), want)
    assert tie(tmp_path) is False


def test_a_base_saved_without_its_head_gets_the_whole_models_names(tmp_path):
    """As the Hub's GPT-2: transformers would look for the head under the first part of the other names."""
    want = saved(tmp_path, gpt2, target_modules=["c_attn", "wte"])
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    whole.transformer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare/config.json").write_text((tmp_path / "base/config.json").read_text())
    merge_files.merge_folder(tmp_path / "bare", tmp_path / "adapter", tmp_path / "out")
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(load_file(tmp_path / "out/model.safetensors"))
    with torch.no_grad():
        close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, want)


@pytest.mark.parametrize("options", [CASES["table"][0], CASES["tokens"][0]], ids=["table", "tokens"])
def test_a_folder_that_holds_the_table_twice_is_tied_all_the_same(options, tmp_path):
    """As PyTorch's own files do. Rows of tokens change both in PEFT, a table's own adapter the table."""
    want = saved(tmp_path, gpt2, **{k: ["c_attn", "wte"] if k == "target_modules" and E in v else v
                                    for k, v in options.items() if k != "target_modules" or E in v},
                 **({} if E in options["target_modules"] else {"target_modules": ["c_attn"]}))  # fmt: skip
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    held = {key: value.detach().clone().numpy() for key, value in one.state_dict().items()}
    assert "lm_head.weight" in held
    save_file(held, tmp_path / "base/model.safetensors", {"format": "pt"})
    close(unmerged(tmp_path), want)
    close(merged(tmp_path), want)


def test_what_cannot_be_known_is_refused_before_anything_is_written(tmp_path):
    saved(tmp_path, **CASES["table"][0])
    base, out = tmp_path / "base", tmp_path / "out"
    config = json.loads((base / "config.json").read_text())

    def refused(pattern: str, **fields: Any) -> None:
        (base / "config.json").write_text(json.dumps({k: v for k, v in (config | fields).items() if v is not None}))
        with pytest.raises(jaxadapt.MismatchError, match=pattern):
            merge_files.merge_folder(base, tmp_path / "adapter", out)
        assert not out.exists()

    refused(
        r"config\.json does not state whether .*Set tie_word_embeddings", model_type="mine", tie_word_embeddings=None
    )
    refused(r"config\.json does not state", text_config={"tie_word_embeddings": False})
    (base / "config.json").write_text(json.dumps(config))
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    for path in base.glob("model*"):
        path.unlink()
    held = {key: value.detach().clone().numpy() for key, value in whole.state_dict().items()}
    save_file(held | {"lm_head.weight": held["lm_head.weight"] + 1}, base / "model.safetensors")
    refused(
        r"contradicts itself.*ties the head to the embedding.*lm_head\.weight and model\.embed_tokens\.weight differ"
    )
    del held["lm_head.weight"]
    odd = {key.replace("model.embed_tokens", "model.tokens"): value for key, value in held.items()}
    save_file(odd, base / "model.safetensors")
    files = load_file(tmp_path / "adapter/adapter_model.safetensors")
    renamed = {key.replace("embed_tokens", "tokens"): value for key, value in files.items()}
    save_file(renamed, tmp_path / "adapter/adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text()) | {"target_modules": [Q, "tokens"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(fields))
    refused(r"the name of this model's head is unknown(.|\n)*model\.tokens\.weight(.|\n)*Add a tensor for the head")


def test_the_head_cannot_be_apart_where_rows_of_both_are_trained(tmp_path):
    saved(tmp_path, target_modules=[Q, "lm_head"], trainable_token_indices={E: [1, 5]})
    with pytest.raises(jaxadapt.MismatchError, match="changes rows of model.embed_tokens.weight"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_head_that_shares_with_more_than_the_table_is_refused(tmp_path):
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=24)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "shared"])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(jaxadapt.MismatchError, match=r"shared\.weight, because other modules share this weight"):
        merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_head_to_untie(tmp_path):
    model = transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(tie_word_embeddings=True, **LLAMA))
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[Q, E], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_files.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    was = load_file(tmp_path / "base/model.safetensors")
    assert "lm_head.weight" not in got
    assert not np.array_equal(got["model.embed_tokens.weight"], was["model.embed_tokens.weight"])
    assert tie(tmp_path) is True


def test_config_json_is_read_as_transformers_reads_it():
    for kind in sorted(hf_model.TIE_DEFAULTS):
        made = CONFIG_MAPPING[kind]()
        assert made.tie_word_embeddings is hf_model.is_tied({"model_type": kind}), kind
    both = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    assert hf_model.is_tied(both) is True
    assert hf_model.is_tied({"model_type": "mine"}) is None
    assert hf_model.is_tied({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}) is None
    assert hf_model.untie_config(both) == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}


def tree(own_head: bool) -> dict[str, Any]:
    """The Llama's parameters in JAX, not read yet, with a leaf for the head or without."""
    out: dict[str, Any] = {}
    for key, value in llama().state_dict().items():
        *parts, _ = key.split(".")
        kind = "embedding" if parts[-1] == E else "kernel" if value.ndim == 2 else "weight"
        node = out
        for part in parts:
            node = node.setdefault(part, {})
        node[kind] = np.zeros(value.shape if kind == "embedding" else value.shape[::-1], "float32")
    return out if own_head else {"model": out["model"]}


@pytest.mark.parametrize("case", ["saved table", "table", "head", "both", "tokens of both", "DoRA of both"])
def test_in_memory_a_model_with_a_head_of_its_own_computes_the_same(case, tmp_path):
    want = saved(tmp_path, **CASES[case][0])
    base = jaxadapt.export.import_base(tmp_path / "base", tree(own_head=True))
    adapter = jaxadapt.from_peft(jaxadapt.read(tmp_path / "adapter"), base)
    out = tmp_path / "out"
    jaxadapt.export.export_base(jaxadapt.merge(base, adapter), out, like=tmp_path / "base")
    assert tie(tmp_path) is False
    with torch.no_grad():
        close(transformers.AutoModelForCausalLM.from_pretrained(out)(IDS).logits, want)


@pytest.mark.parametrize("case", ["saved table", "table"])
def test_in_memory_a_model_without_one_is_refused(case, tmp_path):
    saved(tmp_path, **CASES[case][0])
    base = jaxadapt.export.import_base(tmp_path / "base", tree(own_head=False))
    adapter = jaxadapt.from_peft(jaxadapt.read(tmp_path / "adapter"), base)
    with pytest.raises(jaxadapt.AttachError, match=r"separate head"):
        jaxadapt.merge(base, adapter)
    with pytest.raises(jaxadapt.AttachError, match=r"separate head"):
        jaxadapt.export.export_base(base, tmp_path / "out", adapter)


def test_an_exported_model_has_the_configuration_and_the_tokenizer_of_the_folder_it_is_like(tmp_path):
    want = saved(tmp_path, target_modules=["q_proj"])
    base = jaxadapt.export.import_base(tmp_path / "base", tree(own_head=False))
    adapter = jaxadapt.from_peft(jaxadapt.read(tmp_path / "adapter"), base)
    (tmp_path / "base/tokenizer.json").write_text("{}")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))  # the weights are float32
    jaxadapt.export.export_base(base, tmp_path / "out", adapter, like=tmp_path / "base")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**config, "dtype": "float32"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    with torch.no_grad():
        close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, want)
    with pytest.raises(jaxadapt.FileError, match=r"like=.*adapter: expected the folder of a model, .* no config\.json"):
        jaxadapt.export.export_base(base, tmp_path / "other", adapter, like=tmp_path / "adapter")
    assert not (tmp_path / "other").exists()


def test_export_minds_what_a_model_type_means_without_the_field(tmp_path):
    saved(tmp_path, **CASES["tokens"][0])
    base = jaxadapt.export.import_base(tmp_path / "base", tree(own_head=True))
    base["lm_head"]["kernel"] = base["lm_head"]["kernel"] + 1
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(jaxadapt.MismatchError, match=r"tie_word_embeddings is true \(or missing"):
        jaxadapt.export.export_base(base, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    jaxadapt.export.export_base(base, tmp_path)


def test_the_weights_alone_as_base_bring_the_config_json_that_unties(tmp_path):
    saved(tmp_path, **CASES["table"][0])
    one = tmp_path / "one"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(one)
    merge_files.merge_folder(one / "model.safetensors", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert tie(tmp_path) is False
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
