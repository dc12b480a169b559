"""The model card: what it says, that its code runs, and how it meets a card that a person wrote."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxadapt
from jaxadapt import Config
from jaxadapt.persistence import consumers
from jaxadapt.storage import location
from tests.support import small
from tests.support.small import CARD

KEYS = {f"base_model.model.model.layers.0.q_proj.lora_{side}.weight": (2, 8) for side in "AB"}


def written(config: Config, place: str | None = None, **page) -> str:
    address = None if place is None else location.parse_hub_address(place)
    return consumers.card_text(
        config, {key: ("F32", shape) for key, shape in KEYS.items()}, 160, consumers.Card(**page), address
    )


def lora(**fields) -> Config:
    base = fields.pop("base", "org/base")
    return jaxadapt.LoraConfig(target_modules=["q_proj"], **fields).replace(base_model_name_or_path=base)


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def body(text: str) -> str:
    return text.split("---\n", 2)[2]


# ---- what it says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.asarray])
def test_metrics_are_what_a_training_loop_has(kind):
    assert "| loss | 3.25 |\n| steps | 40 |" in written(lora(), metrics={"loss": kind(3.25), "steps": np.int64(40)})
    with pytest.raises(jaxadapt.ConfigError, match="metrics: loss: expected a number or text: only 0-d"):
        written(lora(), metrics={"loss": np.zeros(2)})


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        ({"modules_to_save": ["head"]}, None),
        ({"use_rslora": True, "use_dora": True}, None),
        ({"use_rslora": True}, "`use_rslora`: ignored"),
        ({"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}}, "`alpha_pattern`: ignored"),
    ],
)
def test_it_shows_a_way_only_where_there_is_one(fields, way):
    """Scales that a program ignores can be multiplied in; that does nothing for the head that it refuses."""
    text = written(lora(**fields))
    assert "Who reads it" in text
    assert ("--for plain" in text) == (way is not None)
    assert way is None or way in text


@pytest.mark.peft
@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_its_front_matter_has_what_peft_writes(task, tmp_path):
    import peft
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(4, 4)
            self.config = {"model_type": "tiny", "_name_or_path": "org/base"}
            self.name_or_path = "org/base"

        def prepare_inputs_for_generation(self, *args, **kwargs):
            return kwargs

    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # else it asks a Hub
    theirs = front((tmp_path / CARD).read_text())
    ours = front(written(jaxadapt.read_config(tmp_path)))
    assert theirs["base_model"] == ours["base_model"] == "org/base"
    assert theirs["library_name"] == ours["library_name"] == "peft"
    assert (theirs.get("pipeline_tag") == "text-generation") == (task == "CAUSAL_LM")
    assert theirs.get("pipeline_tag") in (None, ours.get("pipeline_tag"))
    assert set(theirs["tags"]) - {"transformers"} <= set(ours["tags"])  # it is not said to be a model of transformers


@pytest.mark.parametrize(
    ("task", "pipeline"), [("CAUSAL_LM", "text-generation"), ("SEQ_CLS", "text-classification"), (None, None)]
)
def test_the_pipeline_and_the_license(task, pipeline):
    found = front(written(lora(task_type=task), license="apache-2.0"))
    assert found.get("pipeline_tag") == pipeline
    assert found["license"] == "apache-2.0"
    assert found["tags"] == ["base_model:adapter:org/base", "lora", "jax", "jaxadapt"]


def test_hyperparameters_sizes_and_results():
    config = lora(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"v_proj": 2}, lora_dropout=0.1)
    text = written(config, metrics={"loss": 1 / 3, "data": "a|b", "steps": 40})
    for row in (
        "| method | LORA |", "| target_modules | q_proj |", "| r | 4 |", "| lora_alpha | 6 |", "| use_rslora | true |",
        '| rank_pattern | {"v_proj": 2} |', "| lora_dropout | 0.1 |",
        "| size | 32 parameters in 2 tensors, F32, 160 bytes |", "| loss | 0.333333 |",
        "| data | a\\|b |", "| steps | 40 |",
    ):  # fmt: skip
        assert f"\n{row}\n" in text
    assert "use_dora" not in text  # it is what every new configuration says
    assert "## Results" not in written(lora())


def test_each_dtype_is_named_once_whatever_its_byte_order(tmp_path):
    a, b = (np.ones(KEYS[key][:: -1 if "lora_B" in key else 1], "f4") for key in KEYS)
    tensors = dict(zip(KEYS, (a, b.astype(">f4")), strict=True))
    jaxadapt.write(jaxadapt.PeftTensors(lora(r=2), tensors), tmp_path)
    assert "32 parameters in 2 tensors, F32, " in (tmp_path / CARD).read_text()


@pytest.mark.parametrize(
    ("fields", "place", "line"),
    [
        ({}, "org/me", "vllm serve org/base --enable-lora --lora-modules me=org/me"),
        ({"r": 60}, "org/me", "--enable-lora --max-lora-rank 64 --lora-modules me=org/me"),
        ({}, "hf://org/me@v1/fr", "--lora-modules fr=$(jaxadapt pull org/me/fr)"),
        ({"base": None}, None, "vllm serve path/to/the/base/model --enable-lora"),
        ({"use_dora": True}, "org/me", None),
        ({"bias": "all"}, "org/me", None),
    ],
)
def test_vllm_where_it_takes_the_file(fields, place, line):
    text = written(lora(**fields), place)
    assert line in text if line else ("In vLLM" not in text and re.search(r"\| [^|]*vLLM[^|]* \| refuses it", text))


@pytest.mark.parametrize("base", ["/home/me/model", "../model", "C:\\model", "a/b/c"])
def test_a_path_of_somebodys_disk_is_no_base_model(base):
    text = written(lora(base=base))
    assert "base_model" not in front(text)
    assert base not in text


# ---- its code ----------------------------------------------------------------------------------------------


@pytest.mark.peft
@pytest.mark.network
@pytest.mark.parametrize("subfolder", ["", "fr"])
def test_the_code_of_a_pushed_card_runs(hub, subfolder):
    """Word for word: the JAX block on an NNX model and on Linen parameters, PEFT's on the same network in PyTorch."""
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.up_proj = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
            for name, module in (("q_proj", self.q_proj), ("up_proj", self.up_proj)):
                held = small.base()["params"][name]
                module.weight.data = torch.from_numpy(np.array(held["kernel"]).T.copy())
                module.bias.data = torch.from_numpy(np.array(held["bias"]))

        def forward(self, x):
            return self.up_proj(torch.tanh(self.q_proj(x)))

    trained = small.trained()
    jaxadapt.push(trained, f"org/tuned/{subfolder}".rstrip("/"), token="hf_writes", base_model="org/base")
    text = hub.files("org/tuned")[f"{subfolder}/{CARD}".lstrip("/")].decode()
    in_jax, in_torch = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"model": small.net(), "params": small.base()["params"]}
    exec(in_jax, names)
    want = np.asarray(trained(small.X))
    assert np.array_equal(names["model"](small.X), want)
    module = jaxadapt.adapt(small.LinenNet(), small.LORA)
    np.testing.assert_allclose(module.apply(names["variables"], small.X), want, rtol=1e-6, atol=1e-6)
    names = {"base_model": Tiny()}
    exec(in_torch, names)
    with torch.no_grad():
        found = names["model"](torch.from_numpy(small.X)).numpy()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)  # float32, summed in another order


# ---- beside a person's -------------------------------------------------------------------------------------

MINE = {
    "no front matter": "# Mine\n\nWords.\n",
    "nothing": "",
    "some": "---\nlicense: mit\n---\n# Mine\n",
    "tags in a row": "---\ntags: [jax, mine]\n---\nWords",
    "tags below": "---\ntags:\n  - mine\nlanguage:\n  - en\n---\nWords\n",
    "no tags": "---\ntags: []\nbase_model: other/base\n---\nWords\n",
    "windows": "---\r\nlicense: mit\r\n---\r\n# Mine\r\n",
    "a comment": "---\n# kept: yes\nlicense: mit # so\n---\nWords\n",
    "a rule in it": "# Mine\n\n---\n\nWords\n",
    "ours, edited": written(lora()).replace("## Use it", "## Mine\n\n## Use it"),
}


@pytest.mark.parametrize("name", MINE)
def test_a_persons_card_keeps_every_word_and_gets_the_front_matter_it_lacks(name):
    mine = MINE[name]
    new = written(lora(r=16), license="apache-2.0")
    once = consumers.merge_card(mine, new)
    found, before = front(once), front(mine.replace("\r\n", "\n")) if mine.startswith("---") else {}
    assert found["library_name"] == "peft"
    for key, value in before.items():
        kept = found[key]
        assert kept[: len(value)] == value if key == "tags" else kept == value
    assert {"lora", "jax", "jaxadapt"} <= set(found["tags"])
    assert len(found["tags"]) == len(set(found["tags"]))
    words = mine.replace("\r\n", "\n")
    words = body(words) if words.startswith("---") else words
    assert body(once).strip("\n") == words.strip("\n")
    if "# kept" in mine:
        assert "# kept: yes\nlicense: mit # so\n" in once
    assert consumers.merge_card(once, new) == once  # and no more the next time
    assert consumers.refresh_card(mine, new) == mine  # saving touches nothing of it


def test_a_card_that_nobody_touched_is_written_anew():
    old, new = written(lora(r=4)), written(lora(r=8))
    assert consumers.refresh_card(old, new) == consumers.merge_card(old, new) == new
    assert consumers.refresh_card(None, new) == consumers.merge_card(None, new) == new
    assert consumers.is_edited(old.replace("r | 4", "r | 5"))
    assert not consumers.is_edited(old.replace("\n", "\r\n"))  # what git does on some machines


@pytest.mark.parametrize("word", ["no", "Off", "true", "null", "y", "apache-2.0", "a: b"])
def test_a_license_is_the_text_it_was_in_yaml(word):
    """YAML 1.1 reads a bare `no` as false."""
    assert front(written(lora(), license=word))["license"] == word
    assert (f"license: {word}\n" in written(lora(), license=word)) == (word == "apache-2.0")
