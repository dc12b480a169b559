"""LoRA configurations and weights found in the wild, on tiny models of their families, beside live PEFT.

The folder is not part of the project (see `real_adapters` in conftest.py). Run with `-s` for the table of outcomes.
"""

from __future__ import annotations

import collections
import copy
import functools
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
import transformers

import jaxadapt
from jaxadapt import Config, Weight
from jaxadapt.core import paths
from tests.support import peft_harness as harness

pytestmark = pytest.mark.peft

# What a base model's name or the targets say of the family, first hit first; "made up" is a model of those names.
FAMILIES = [
    (r"distilbert", "DistilBert"),
    (r"\bbert-base", "Bert"),
    (r"roberta", "Roberta"),
    (r"esm2", "Esm"),
    (r"^gpt2$", "GPT2"),
    (r"gpt-neo-", "GPTNeo"),
    (r"pythia", "GPTNeoX"),
    (r"falcon", "Falcon"),
    (r"bloom-", "Bloom"),
    (r"opt-125", "OPT"),
    (r"phi-2", "Phi"),
    (r"t5", "T5"),
    (r"[Qq]wen(1.5|2.5)|HY-MT|Cosmos", "Qwen2"),
    (r"[Mm]istral", "Mistral"),
    (r"[Ll][Ll]a[Mm][Aa]", "Llama"),
]
SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "DistilBert": {"vocab_size": 32, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    "GPT2": {"vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 2},
    "GPTNeo": {**SMALL, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "Bloom": {"vocab_size": 32, "hidden_size": 8, "n_layer": 2, "n_head": 2},
    "OPT": {**SMALL, "ffn_dim": 12, "word_embed_proj_dim": 8},
    "T5": {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
}
HEADS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}

REFUSED = {
    "047": "excluded by modules_to_save",  # the head is trained in full already: so PEFT says too
    "123": "use_bdlora",
    "181": "cannot initialize with kasa_config from random numbers",  # `start` does: test_variants
    "226": "enable_lora",
    "124": "target_modules: expected names or an expression, found null",
    "125": "target_modules: expected names or an expression, found null",
    "126": "target_modules: expected names or an expression, found null",
    "127": "target_modules: expected names or an expression, found null",
    "128": "target_modules: expected names or an expression, found null",
    "129": "target_modules: expected names or an expression, found null",
}
"""Configurations that are refused here, by number, and what the error says."""


# ---- tiny models -----------------------------------------------------------------------------------------


@functools.cache
def model_of(family: str, task: str | None) -> Any:
    kind = HEADS.get(task or "", "ForConditionalGeneration" if family == "T5" else "ForCausalLM")
    name = {"GPT2ForCausalLM": "GPT2LMHeadModel"}.get(family + kind, family + kind)
    sizes = SIZES.get(family, {**SMALL, "intermediate_size": 12, "num_key_value_heads": 1})
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    return getattr(transformers, name)(config).eval()


def made_up(names: tuple[str, ...]) -> Any:
    """A plain network with a linear layer of each name, in two layers; full names stand for themselves."""
    net = torch.nn.Module()
    for name in names:
        for full in [name] if name.startswith("model.") else [f"model.layers.{i}.{name}" for i in range(2)]:
            node = net
            *head, last = full.split(".")
            for part in head:
                if part not in node._modules:
                    node.add_module(part, torch.nn.Module())
                node = node._modules[part]
            node.add_module(last, torch.nn.Linear(8, 8))
    return net


def fitting(config: dict[str, Any]) -> tuple[str, Any]:
    """The family, and a tiny model of it, for a configuration."""
    base, names = str(config.get("base_model_name_or_path")), config.get("target_modules")
    family = next((family for pattern, family in FAMILIES if re.search(pattern, base)), None)
    if family is not None:
        model = model_of(family, config.get("task_type"))
        modules = [name for name, _ in model.named_modules()]
        wanted = [names] if isinstance(names, str) else names or []
        if any(name == w or name.endswith(f".{w}") or re.fullmatch(w, name) for w in wanted for name in modules):
            return family, model
    if isinstance(names, str):  # the one expression in the wild that no family here has modules for
        names = re.findall(r"\w+_proj", names)
        return "made up", made_up(tuple(f"language_model.{n}" for n in dict.fromkeys(names)))
    return "made up", made_up(tuple(dict.fromkeys(names or ("q_proj",))))


def ours(model: Any) -> tuple[dict[str, Any], jaxadapt.KeyMap]:
    """A torch model's parameters as a JAX tree of zeros, and the table that ties the two."""
    leaves: dict[str, Any] = {}
    lines: list[Weight] = []
    seen: set[int] = set()
    for module, node in model.named_modules():
        for name, parameter in node.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied: one leaf
                continue
            seen.add(id(parameter))
            shape, key = tuple(parameter.shape), f"{module}.{name}"
            axes = " ".join(f"a{i}" for i in range(len(shape)))
            leaf, pattern, options = key, f"{axes} -> {axes}", {"kind": "other"}
            if name == "weight" and isinstance(node, torch.nn.Linear):
                leaf, pattern, shape, options = f"{module}.kernel", "i o -> o i", shape[::-1], {}
            elif name == "weight" and type(node).__name__ == "Conv1D":
                leaf, pattern, options = f"{module}.kernel", "i o -> i o", {"fan_in_fan_out": True}
            elif name == "weight" and isinstance(node, torch.nn.Embedding):
                leaf, pattern, options = f"{module}.embedding", "v d -> v d", {"kind": "embedding"}
            leaves[leaf] = np.zeros(shape, "float32")
            lines.append(Weight(leaf, key, pattern, **options))
    return paths.unflatten(leaves), jaxadapt.KeyMap("wild", tuple(lines))


# ---- configurations --------------------------------------------------------------------------------------


def lora_configs(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "configs").glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(data, dict) and data.get("peft_type") == "LORA":
            found[path.stem] = data
    return found


def peft_specs(model: Any, path: Path, family: str, folder: Path) -> Any:
    from peft import PeftConfig, get_peft_model
    from peft.utils.save_and_load import get_peft_model_state_dict

    shutil.copy(path, folder / "adapter_config.json")
    config = PeftConfig.from_pretrained(str(folder))
    if family == "made up":
        config.task_type = None
    adapted = get_peft_model(copy.deepcopy(model), config)
    return harness.specs(get_peft_model_state_dict(adapted, save_embedding_layers=False))


@pytest.mark.filterwarnings("default:outcomes")
def test_configurations_in_the_wild(real_adapters, tmp_path):
    """Each one initializes on a tiny model of its family with PEFT's keys and comes back whole, or is refused."""
    outcomes: dict[str, tuple[str, str]] = {}
    for number, data in lora_configs(real_adapters).items():
        family, model = fitting(data)
        params, table = ours(model)
        path = real_adapters / "configs" / f"{number}.json"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # entries for layers that this model lacks; PEFT's advice
            config = Config.from_dict(data)
            if number in REFUSED:
                with pytest.raises(jaxadapt.AdapterError, match=REFUSED[number]) as caught:
                    jaxadapt.init(params, config, key=jax.random.key(0), keymap=table)
                outcomes[number] = family, f"refused: {str(caught.value).splitlines()[0]}"
                continue
            adapter = jaxadapt.init(params, config, key=jax.random.key(0), keymap=table)
            tensors = jaxadapt.to_peft(adapter)
            found = harness.specs(dict(tensors.tensors))
            assert found == peft_specs(model, path, family, tmp_path), number
            again = jaxadapt.from_peft(tensors, params, keymap=table)
        for key, leaf in adapter.flat().items():
            np.testing.assert_array_equal(again.flat()[key], leaf, err_msg=f"{number} {key}")
        assert again.config == adapter.config
        outcomes[number] = family, "as PEFT"
    assert len(outcomes) == 125
    table = [f"{len(n):4} {family:12} {how[:110]}" for (family, how), n in sorted(_grouped(outcomes).items())]
    warnings.warn("\n".join(["outcomes", *table]), stacklevel=1)  # what pytest shows, from its workers as well


def _grouped(outcomes: dict[str, tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for number, outcome in outcomes.items():
        groups[outcome].append(number)
    return groups


# ---- weights ---------------------------------------------------------------------------------------------


def described(tensors: dict[str, Any]) -> tuple[jaxadapt.LoraConfig, dict[str, Any], jaxadapt.KeyMap]:
    """A configuration, base parameters and a table for which these are the tensors of a LoRA."""
    prefix = "base_model.model."
    shapes: dict[str, tuple[int, int]] = {}
    ranks: dict[str, int] = {}
    copies: dict[str, Any] = {}
    for key, array in tensors.items():
        assert key.startswith(prefix), key
        name = key.removeprefix(prefix)
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            ranks[module] = array.shape[0]
            shapes[module] = (array.shape[1], tensors[key.replace("lora_A", "lora_B")].shape[0])
        elif not name.endswith(".lora_B.weight"):
            copies[name] = np.zeros(array.shape, array.dtype)
    assert len(set(ranks.values())) == 1
    config = jaxadapt.LoraConfig(
        r=next(iter(ranks.values())),
        target_modules=sorted(shapes),
        modules_to_save=sorted({name.rpartition(".")[0] for name in copies}) or None,
    )
    leaves = {f"{module}.kernel": np.zeros(shape, "float32") for module, shape in shapes.items()}
    lines = [Weight(f"{module}.kernel", f"{module}.weight", "i o -> o i") for module in shapes]
    for name, array in copies.items():
        axes = " ".join(f"a{i}" for i in range(array.ndim))
        leaves[name] = array
        lines.append(Weight(name, name, f"{axes} -> {axes}", kind="other"))
    return config, paths.unflatten(leaves), jaxadapt.KeyMap("wild", tuple(lines))


def test_weights_in_the_wild(real_adapters, tmp_path):
    """Every LoRA file: into a model of the shapes it speaks of, and out again, tensor for tensor."""
    loaded: list[str] = []
    for path in sorted((real_adapters / "weights").glob("*_adapter_model.*")):
        folder = tmp_path / path.name
        folder.mkdir()
        shutil.copy(path, folder / path.name.partition("_")[2])
        (folder / "adapter_config.json").write_text(jaxadapt.LoraConfig().to_json())
        if path.stat().st_size < 100:
            with pytest.raises(jaxadapt.FormatError):
                jaxadapt.read(folder)
            continue
        before = dict(jaxadapt.read(folder).tensors)
        if not any("lora_A" in key for key in before):
            continue  # prompt tuning, or no adapter at all
        config, params, table = described(before)
        tensors = jaxadapt.PeftTensors(config, before)
        if any(value.ndim == 3 for value in before.values()):  # PEFT 0.2's MergedLinear, which PEFT refuses as well
            with pytest.raises(jaxadapt.MismatchError, match="24 wrongly shaped"):
                jaxadapt.from_peft(tensors, params, keymap=table)
            continue
        adapter = jaxadapt.from_peft(tensors, params, keymap=table)
        jaxadapt.save(adapter, folder / "again")
        after = jaxadapt.read(folder / "again").tensors
        assert set(after) == set(before)
        for key, value in before.items():
            assert after[key].dtype == value.dtype
            np.testing.assert_array_equal(after[key], value, err_msg=f"{path.name} {key}")
        loaded.append(path.name[:3])
    assert len(loaded) == 7, loaded
