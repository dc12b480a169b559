"""Files for another vocabulary than the model's: refused, or the rows that fit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import Weight

TABLE = jaxadapt.KeyMap(
    "tiny",
    (
        Weight("embed.embedding", "embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight("head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    output="lm_head",
)
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", "lm_head"]},
    "copies": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}


def base(size: int) -> dict[str, Any]:
    rng = np.random.RandomState(size)
    table, head = (rng.standard_normal(shape).astype("float32") for shape in ((size, 4), (4, size)))
    return {"embed": {"embedding": table}, "head": {"kernel": head}}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("theirs", "mine", "form"), [(9, 7, "safetensors"), (7, 9, "safetensors"), (7, 9, "orbax")])
def test_the_rows_that_fit(name, theirs, mine, form, tmp_path):
    config = jaxadapt.LoraConfig(r=2, init_lora_weights=False, **CASES[name])
    adapter = jaxadapt.init(base(theirs), config, key=jax.random.key(0), keymap=TABLE)
    jaxadapt.save(adapter, tmp_path, format=form)
    params = base(mine)
    with pytest.raises(jaxadapt.MismatchError, match=rf"(?s)wrongly shaped.*expected .*{mine}.*found .*{theirs}"):
        jaxadapt.load(tmp_path, {"params": params}, keymap=TABLE)
    with pytest.warns(UserWarning, match=rf"for a vocabulary of {theirs}, and the model's has {mine}"):
        loaded = jaxadapt.load(jaxadapt.read(tmp_path, fit_vocabulary=True), {"params": params}, keymap=TABLE)
    small = min(theirs, mine)
    found = jaxadapt.merge(params, jaxadapt.extract(loaded))
    # Where the file has rows the change is the file's, elsewhere there is none.
    before = base(theirs)
    change = jaxadapt.merge(before, adapter)["embed"]["embedding"] - before["embed"]["embedding"]
    want = np.array(params["embed"]["embedding"])
    want[:small] += change[:small]
    np.testing.assert_allclose(found["embed"]["embedding"], want, atol=1e-6)
    head = np.array(params["head"]["kernel"])
    if name == "copies":
        head[:, :small] = before["head"]["kernel"][:, :small]
    else:
        head[:, :small] += (jaxadapt.merge(before, adapter)["head"]["kernel"] - before["head"]["kernel"])[:, :small]
    np.testing.assert_allclose(found["head"]["kernel"], head, atol=1e-6)


def test_only_rows_of_the_vocabulary_are_skipped(tmp_path):
    adapter = jaxadapt.init(base(7), jaxadapt.LoraConfig(r=2, **CASES["lora"]), key=jax.random.key(0), keymap=TABLE)
    jaxadapt.save(adapter, tmp_path / "files")
    jaxadapt.save(adapter, tmp_path / "orbax", format="orbax")
    wide = {"embed": {"embedding": np.zeros((7, 5), "f4")}, "head": {"kernel": np.zeros((5, 7), "f4")}}
    for place in (tmp_path / "files", tmp_path / "orbax"):
        with pytest.raises(jaxadapt.MismatchError, match="wrongly shaped"):
            jaxadapt.load(jaxadapt.read(place, fit_vocabulary=True), {"params": wide}, keymap=TABLE)
