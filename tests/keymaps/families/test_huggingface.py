"""Models under Hugging Face's names: transformers' files, PEFT's refusals, and the language model of Qwen 3 VL."""

from __future__ import annotations

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
import transformers
from flax import nnx
from peft import LoraConfig, get_peft_model

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import families, plan
from tests.keymaps.families import jax_side, specimen_arrays, torch_side
from tests.keymaps.families.specimens import BY_NAME, DECODER, IDS, LAYERS, PROJ, recorded, rope, values
from tests.support import peft_harness as harness
from tests.support.twins import decoders, trees

pytestmark = pytest.mark.peft


def leaves_of(name: str) -> dict[str, np.ndarray]:
    return specimen_arrays.base_leaves(BY_NAME[name], jax_side.side(BY_NAME[name]).shapes)


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2", "qwen3_next", "nemotron_h"])
def test_the_files_of_transformers_are_read_bit_for_bit(name, tmp_path):
    """They have single experts, and other names of MiniMax's block and of all Nemotron's weights."""
    torch_side.base(name).save_pretrained(tmp_path)
    leaves = leaves_of(name)
    target = trees.nest({path: np.zeros_like(x) for path, x in leaves.items()})
    found = paths.flatten(jaxadapt.export.import_base(tmp_path, target))
    assert set(found) == set(leaves)
    for path, x in leaves.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_models_with_the_same_names_of_layers_are_not_taken_for_a_family():
    bloom = recorded("falcon")["leaves"] | {"transformer.word_embeddings_layernorm.scale": (16,)}
    assert families.resolve_keymap("auto", bloom).name == "generic"
    ungated = {path: shape for path, shape in recorded("stablelm")["leaves"].items() if ".gate_proj." not in path}
    assert families.resolve_keymap("auto", ungated).name == "llama"
    hy3 = {
        "self_attn.q_norm.weight": (6,),
        "self_attn.k_norm.weight": (6,),
        "mlp.shared_experts.up_proj.kernel": (16, 8),
    }
    hy3 = recorded("minimax_m2")["leaves"] | {
        f"model.layers.{l}.{leaf}": s for l in range(LAYERS) for leaf, s in hy3.items()
    }
    assert families.resolve_keymap("auto", hy3).name == "qwen3_moe"
    with_rms_norm = {path: shape for path, shape in recorded("stablelm")["leaves"].items() if "norm.bias" not in path}
    assert families.resolve_keymap("auto", with_rms_norm).name == "llama"


REFUSED = (  # PEFT's reason for each
    ("nemotron_h", "out_proj", "incompatible with Mamba"),
    ("nemotron_h", "conv1d", "incompatible with Mamba"),
    ("qwen3_next", "conv1d", "rank is divisible by groups"),
)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
@pytest.mark.parametrize(("name", "module", "reason"), REFUSED)
def test_what_peft_refuses_is_refused_by_name(name, module, reason):
    cls = getattr(transformers, BY_NAME[name].torch)
    with torch.device("meta"):
        model = cls(cls.config_class(**BY_NAME[name].config))
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, LoraConfig(r=2, target_modules=[module]))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", module])
    with pytest.raises(jaxadapt.TargetError, match=rf"model\.layers\.0\.\w+\.{module}\.kernel"):
        jaxadapt.init(trees.nest(leaves_of(name)), config, key=jax.random.key(0))


@pytest.mark.filterwarnings("ignore:target_modules adapts no routed expert:UserWarning")
def test_all_linear_leaves_out_what_peft_refuses():
    config = jaxadapt.LoraConfig(r=2, target_modules="all-linear")
    file = jaxadapt.to_peft(jaxadapt.init(trees.nest(leaves_of("nemotron_h")), config, key=jax.random.key(0)))
    modules = {key.partition(".lora_")[0].rpartition(".")[2] for key in file.tensors}
    assert modules == {"in_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    model = torch_side.base("nemotron_h")
    linear = {name for name, part in model.named_modules() if type(part) is torch.nn.Linear}
    expected = {name for name in linear if not name.endswith(("out_proj", "lm_head"))}
    assert {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.tensors} == expected


@pytest.mark.usefixtures("foreign_model")
def test_the_language_model_of_qwen3_vl(tmp_path):
    """Its base weights are those of "llama/vl", and an adapter that PEFT saved gives PEFT's logits of text."""
    text = {**DECODER, **rope(), "head_dim": 6, "tie_word_embeddings": False}
    vision = {"hidden_size": 8, "intermediate_size": 8, "depth": 1, "num_heads": 1, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "rope_parameters": {**rope()["rope_parameters"], "mrope_section": [1, 1, 1]}},
        vision_config={**vision, "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            x.copy_(torch.from_numpy(values(key, tuple(x.shape))))
    weights = {key: x.detach().numpy().copy() for key, x in model.state_dict().items() if "visual" not in key}

    twin = decoders.CausalLM({**text, "kind": "qwen3", "theta": 10000.0}, nnx.Rngs(0))
    shapes = {path: x.shape for path, x in trees.nnx_leaves(twin).items()}
    assert families.resolve_keymap("auto", shapes).name == "llama"
    made = plan.base_plan(families.get_family("llama/vl"), shapes)
    assert set(made.keys) == set(weights)
    leaves = made.decode(weights)
    for key, x in made.encode(leaves).items():
        np.testing.assert_array_equal(x, weights[key], err_msg=key)
    trees.fill(twin, leaves)

    pattern = rf".*language_model.*\.({'|'.join(PROJ)})"
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=pattern)).eval()
    with torch.no_grad():
        for key, x in adapted.named_parameters():
            if "lora_" in key:
                x.copy_(torch.from_numpy(values(key.replace(".default", ""), tuple(x.shape))))
        expected = adapted(input_ids=torch.from_numpy(IDS)).logits.numpy()
    adapted.save_pretrained(str(tmp_path / "peft"))
    loaded = jaxadapt.load(tmp_path / "peft", twin)
    logits = nnx.jit(lambda m: m(jax.numpy.asarray(IDS)))(loaded)
    # As in test_proof.py: logits are about 4, and two float32 implementations differ by some 1e-5.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    jaxadapt.save(loaded, tmp_path / "ours")
    found, tensors = harness.read_tensors(tmp_path / "ours"), harness.read_tensors(tmp_path / "peft")
    assert len(tensors) == 2 * LAYERS * len(PROJ)
    assert set(found) == set(tensors)
    for key, x in tensors.items():
        np.testing.assert_array_equal(found[key], x, err_msg=key)
