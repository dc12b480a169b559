"""The number of trained values of each method on a model, for `jaxadapt methods`."""

from __future__ import annotations

from jaxadapt.methods import METHODS
from jaxadapt.models import summary_table


def test_sizes_of_each_method_on_a_model():
    shapes = {"q.kernel": (32, 64), "up.kernel": (64, 32)}
    sizes = summary_table.method_sizes(shapes)
    assert sizes.keys() == set(METHODS)
    assert sizes["LORA"] == 8 * (32 + 64) * 2
    assert all(size for size in sizes.values())
