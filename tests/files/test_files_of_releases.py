"""Every version reads the files of every release to the same numbers (docs/versions.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxadapt
from jaxadapt.methods import METHODS
from tests.files import record

ROOT = Path(__file__).resolve().parents[2]
RELEASES = sorted(path.name for path in record.HERE.iterdir() if (path / record.BASE).exists())
FOLDERS = [path.parent for release in RELEASES for path in sorted((record.HERE / release).glob(f"*/{record.NUMBERS}"))]


def test_a_release_has_files_of_every_method():
    assert "0.1.0" in RELEASES
    assert record.cases().keys() <= {folder.name for folder in FOLDERS if folder.parent.name == "0.1.0"}


def test_the_page_of_versions_says_which_methods_have_a_folder():
    kept = {folder.name.partition("-")[0] for folder in FOLDERS}
    adapting = {name for name, method in METHODS.items() if method.scope != "model"}
    page = " ".join((ROOT / "docs/versions.md").read_text("utf-8").split())
    assert f"{len(kept)} of the {len(adapting)} methods that change weights" in page
    assert f"no folders of {', '.join(sorted(adapting - kept))} and prompts" in page


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_folder_has_the_numbers_of_its_release(folder: Path):
    want = dict(np.load(folder / record.NUMBERS))
    stored = record.stored_numbers(folder)
    assert stored.keys() == {key for key in want if key.startswith("tensor.")}
    for key, value in stored.items():
        assert value.tobytes() == want[key].tobytes(), key
        assert (value.dtype, value.shape) == (want[key].dtype, want[key].shape), key
    base = record.nest(np.load(folder.parent / record.BASE))
    merged = record.merged_numbers(folder, base)
    assert merged.keys() == {key for key in want if key.startswith("merged.")}
    changed = 0
    for key, value in merged.items():
        # Another release of XLA may round a sum in another order.
        np.testing.assert_allclose(value, want[key], rtol=0, atol=1e-5 * np.abs(want[key]).max(), err_msg=key)
        _, name, leaf = key.split(".")
        changed += not np.array_equal(want[key], base[name][leaf])
    assert changed
    assert not [f for f in jaxadapt.verify(folder) if f.severity == "error"]
