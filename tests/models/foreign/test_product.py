"""Every family in every dialect, out and in, files alone: a new table of either kind is tested by being there.

What each dialect's arrays compute is by hand in `cases.py`, what each family's weights are in `tests/keymaps/families`;
here it
is their product: a PEFT file laid out as a library's tree and read back computes the same, or is refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.export.conversion import TreeOptions, convert
from jaxadapt.keymaps.families import FAMILIES
from jaxadapt.models.foreign import DIALECTS
from tests.keymaps.families import specimen_arrays
from tests.keymaps.families.specimens import BY_NAME, RECORDED, SPECIMENS, recorded
from tests.support.configs import value_of

NAMES = (*(d.name for d in DIALECTS.values() if not d.has_slots), "qwix/flat")
ONE = {s.table: s.name for s in SPECIMENS if (RECORDED / f"{s.name}.json").exists() and s.lora["target_modules"]}
"""A specimen for each table (stacked ones too) whose shapes are recorded; the others have the same lines, or twins."""
REFUSED = r"no path for it|no exact equivalent|no layout|no entry matches|does not map|sizes are not known|ambiguous"


def products(folder: Path) -> dict[str, np.ndarray]:
    held = jaxadapt.read(folder)
    config, out = held.config, dict[str, np.ndarray]()
    for key, a in held.tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            r = value_of(config.get("rank_pattern"), module, config.get("r"))
            alpha = value_of(config.get("alpha_pattern"), module, config.get("lora_alpha"))
            out[module] = alpha / r * held.tensors[key.replace("lora_A", "lora_B")] @ a
    return out


def test_tables_are_here():
    assert len({table.partition("/")[0] for table in ONE} & set(FAMILIES)) > 30


@pytest.mark.filterwarnings("ignore:.*rounded once", "ignore:target_modules adapts no routed expert")
@pytest.mark.parametrize("table", sorted(ONE))
def test_there_and_back(table: str, tmp_path: Path):
    specimen = dataclasses.replace(BY_NAME[ONE[table]], parameters=())
    shapes = recorded(specimen.name)["leaves"]
    specimen_arrays.write_adapter(specimen, shapes, tmp_path / "peft")
    save_file({path: np.zeros(shape, "float32") for path, shape in shapes.items()}, tmp_path / "base.safetensors")
    like, wanted, fitting = tmp_path / "base.safetensors", products(tmp_path / "peft"), list[str]()
    told = {"like": like, "on_shared": "concat"}
    for dialect in NAMES:
        tree, back = tmp_path / "tree.safetensors", tmp_path / "back"
        try:
            done = convert(tmp_path / "peft", tree, TreeOptions(to_keymap=table, dialect=dialect, **told))
        except jaxadapt.KeyMapError as error:
            if not re.search(REFUSED, str(error)):
                raise
            continue
        alpha = None if DIALECTS[dialect.partition("/")[0]].unscaled else done.lora_alpha
        convert(tree, back, TreeOptions(from_keymap=table, lora_alpha=alpha, **told))
        found = products(back)
        assert set(found) == set(wanted)
        for module, x in wanted.items():
            close = 2e-6 * abs(x).max()  # sums of another order, and factors that are no power of two
            np.testing.assert_allclose(found[module], x, rtol=0, atol=close, err_msg=f"{dialect} {module}")
        fitting.append(dialect)
    assert fitting
