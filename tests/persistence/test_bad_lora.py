"""LoRA configurations and files that contradict themselves, the model or each other: named errors with the way out."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, MismatchError, TargetError, Weight
from tests.persistence.test_bad_input import edit, good, plainly, refuses
from tests.support import small

__all__ = ["good"]  # a fixture

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ".*q", "layers_to_transform": [1]}, "layers_to_transform: expected null if target_modules"),
    ({"target_modules": ".*q", "layers_to_transform": [1], "layers_pattern": "h"}, "layers_pattern: expected null"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern: expected null if layers_to_transform is"),
    ({"use_dora": True, "megatron_config": {"a": 1}}, "use_dora: expected false with a megatron_config"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias: expected false with use_dora"),
    ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias: expected false unless init_lora_weights"),
    ({"init_lora_weights": "loftq"}, "loftq_config: expected an object"),
]


@pytest.mark.parametrize(("fields", "says"), CONTRADICTIONS)
def test_fields_that_contradict_each_other(fields, says, good):
    """In a configuration and in a file alike, before anything is attached."""
    with pytest.raises(ConfigError, match=re.escape(says)):
        jaxadapt.LoraConfig(**fields)
    edit(good, **fields)
    refuses(good, ConfigError, says)


@pytest.mark.peft
@pytest.mark.parametrize("fields", [fields for fields, _ in CONTRADICTIONS])
def test_peft_refuses_the_same(fields):
    peft = pytest.importorskip("peft")
    with pytest.raises((ValueError, ImportError)):  # (for "loftq" it asks for scipy first)
        peft.LoraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 0}, "r: expected a positive integer, found 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']: expected a positive integer, found 0"),
    ],
)
def test_ranks_of_0(fields, says, good):
    with pytest.raises(ConfigError, match=re.escape(says)):
        jaxadapt.LoraConfig(**fields)
    edit(good, **fields)
    refuses(good, ConfigError, says)


# ---- patterns --------------------------------------------------------------------------------------------


def ranks(adapter: jaxadapt.Adapter) -> dict[str, int]:
    return {leaf.rpartition(".")[0]: x["lora_A"].shape[-2] for leaf, x in adapter.sites.items()}


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["qq_proj"], r"(?s)found none that matches 'qq_proj'.*near misses: q_proj.*available are .*up_proj"),
        (r".*\.qq_proj", r"(?s)found none that matches.*a string is a regular expression"),
    ],
)
def test_targets_that_match_nothing(targets, says, good):
    config = small.LORA.replace(target_modules=targets)
    with pytest.raises(TargetError, match=says):
        jaxadapt.adapt(small.net(), config, rngs=nnx.Rngs(0))
    edit(good, target_modules=targets)
    refuses(good, TargetError, "found none that matches")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing(field, good):
    """PEFT says nothing, and what such a file computes is plain: it is loaded, and the key is named."""
    config = small.LORA.replace(**{field: {"k_proj": 3}})
    says = f"{field}: 'k_proj' matches none of the targets"
    with pytest.warns(UserWarning, match=says):
        jaxadapt.adapt(small.net(), config, rngs=nnx.Rngs(0))
    edit(good, **{field: {"k_proj": 3}})
    with pytest.warns(UserWarning, match=says):
        jaxadapt.load(good, small.net())


OVERLAPS: list[dict[str, int]] = [
    {"q_proj": 3, ".*proj": 2},  # not in sorted order: as PEFT tries them, and as it is kept
    {".*proj": 2, "q_proj": 3},
    {"layers.0.q_proj": 1, "q_proj": 3},
    {"q_proj": 3, "layers.0.q_proj": 1},
]


class Deep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([small.Net(rngs) for _ in range(2)])


def torch_deep() -> Any:
    """`Deep` in PyTorch."""
    torch = pytest.importorskip("torch")

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = {"q_proj": (6, 8), "up_proj": (8, 6)}
            self.layers = torch.nn.ModuleList(
                [torch.nn.ModuleDict({n: torch.nn.Linear(*size) for n, size in one.items()}) for _ in range(2)]
            )

    return Torch()


@pytest.mark.peft
def test_an_expression_that_selects_what_holds_modules():
    """PEFT refuses it; here it means the modules that it selects, and whoever wants a file for PEFT is told."""
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Target module ModuleDict"):
        peft.get_peft_model(torch_deep(), peft.LoraConfig(target_modules=r"layers\.0.*"))
    config = jaxadapt.LoraConfig(target_modules=r"layers\.0.*")
    with pytest.warns(UserWarning, match="also selects modules that contain modules, which PEFT refuses: layers.0"):
        model = jaxadapt.adapt(Deep(nnx.Rngs(0)), config, rngs=nnx.Rngs(0))
    assert set(jaxadapt.extract(model).sites) == {"layers.0.q_proj.kernel", "layers.0.up_proj.kernel"}


@pytest.mark.peft
@pytest.mark.parametrize("patterns", OVERLAPS)
def test_of_two_patterns_for_one_module_the_first_counts_as_in_peft(patterns, tmp_path):
    """With a warning that names both; and still after a save (PEFT's sorts them, and contradicts its own tensors)."""
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": patterns}
    theirs = peft.get_peft_model(torch_deep(), peft.LoraConfig(**fields))
    want = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    model, config = Deep(nnx.Rngs(0)), jaxadapt.LoraConfig(**fields)
    first, second = (re.escape(repr(key)) for key in patterns)
    says = f"rank_pattern: {first} and {second} both match layers.0.q_proj, where the first wins"
    with pytest.warns(UserWarning, match=says):
        jaxadapt.adapt(model, config, rngs=nnx.Rngs(0))
    assert ranks(jaxadapt.extract(model)) == want
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same again
        jaxadapt.save(model, tmp_path)
        assert list(json.loads((tmp_path / small.CONFIG).read_text())["rank_pattern"]) == list(patterns)
        assert ranks(jaxadapt.extract(jaxadapt.load(tmp_path, Deep(nnx.Rngs(1))))) == want
        loaded = peft.PeftModel.from_pretrained(torch_deep(), str(tmp_path))  # a rank of another size would be an error
    assert list(loaded.peft_config["default"].rank_pattern) == list(patterns)


# ---- what a file lacks -----------------------------------------------------------------------------------


def test_modules_to_save_that_are_missing_from_the_file(good):
    """PEFT warns and keeps the base's; here the keys are named, and the model stays as it was."""
    edit(good, target_modules=["q_proj"], modules_to_save=["up_proj"])
    tensors = {key: x for key, x in jaxadapt.read(good).tensors.items() if "up_proj" not in key}
    plainly(good, tensors)
    refuses(good, MismatchError, "2 missing from", "base_model.model.up_proj.weight", "base_model.model.up_proj.bias")


def test_dora_without_magnitudes_names_each(good):
    edit(good, use_dora=True)
    keys = [f"base_model.model.{name}.lora_magnitude_vector" for name in ("q_proj", "up_proj")]
    refuses(good, MismatchError, "2 missing from", *keys)


TOKENS = jaxadapt.KeyMap(
    "tokens",
    (
        Weight("embed.embedding", "embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight("lin.kernel", "lin.weight", "i o -> o i"),
    ),
)


def table(size: int) -> dict[str, Any]:
    return {"embed": {"embedding": np.ones((size, 4), "float32")}, "lin": {"kernel": np.ones((4, 4), "float32")}}


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([2, 9], "embed_tokens: token 9 is outside the vocabulary of 9"),
        ([-1], "embed_tokens: token -1 is outside the vocabulary of 9"),
        ([2, 2], "embed_tokens: token 2 is given twice"),
        ({"embed_tokens": [20], "wte": [1]}, "wte: no module has this name"),
    ],
)
def test_tokens_beyond_the_vocabulary(indices, says):
    config = jaxadapt.LoraConfig(r=2, target_modules=["lin"], trainable_token_indices=indices)
    with pytest.raises(TargetError, match=says):
        jaxadapt.init(table(9), config, key=jax.random.key(0), keymap=TOKENS)


def test_a_file_of_tokens_beyond_the_vocabulary(tmp_path: Path):
    """The file is right for its own base; for a smaller one the token is named, before anything is read into it."""
    config = jaxadapt.LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"embed_tokens": [3, 8]})
    adapter = jaxadapt.init(table(9), config, key=jax.random.key(0), keymap=TOKENS)
    jaxadapt.save(adapter, tmp_path)
    for fits in (False, True):
        with pytest.raises(
            TargetError, match=r"(?s)Resize the model.*embed_tokens: token 8 is outside the vocabulary of 6"
        ):
            jaxadapt.load(jaxadapt.read(tmp_path, fit_vocabulary=fits), {"params": table(6)}, keymap=TOKENS)
