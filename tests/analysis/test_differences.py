"""`diff` compared with NumPy on the changes ΔW themselves, and with scipy-free angles from QR."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt.analysis import diff
from jaxadapt.cli import main
from tests.support import small

P = "base_model.model."
RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


def tensors(config: jaxadapt.Config, held: dict[str, np.ndarray]) -> jaxadapt.PeftTensors:
    return jaxadapt.PeftTensors(config, {P + key: value for key, value in held.items()}, "these")


def lora(r: int, names: tuple[str, ...] = ("l.0.q", "l.1.q", "l.0.v"), **settings: Any) -> jaxadapt.PeftTensors:
    config = jaxadapt.LoraConfig(**{"r": r, "lora_alpha": 6, "target_modules": ["q", "v"], **settings})
    held = {}
    for name in names:
        held |= {f"{name}.lora_A.weight": array(r, 9), f"{name}.lora_B.weight": array(7, r)}
    return tensors(config, held)


def change(adapter: jaxadapt.PeftTensors, name: str, scale: float) -> np.ndarray:
    """ΔW, formed."""
    a, b = (adapter.tensors[f"{P}{name}.lora_{n}.weight"].astype("float64") for n in "AB")
    return scale * b @ a


def angles(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The principal angles of two column spaces, smallest and largest in degrees."""
    q, p = (np.linalg.qr(m.astype("float64"))[0] for m in (x, y))
    cosines = np.linalg.svd(q.T @ p, compute_uv=False)
    return [math.degrees(math.acos(min(c, 1))) for c in (cosines[0], cosines[-1])]


@pytest.mark.parametrize("other_rank", [3, 2])
def test_lora_is_compared_by_the_formed_changes(other_rank: int):
    one = lora(3, alpha_pattern={"v": 2}, use_rslora=True)
    two = lora(other_rank, lora_alpha=5)
    found = {m.module: m for m in diff(one, two).modules}
    total = np.zeros(3)
    for name in ("l.0.q", "l.1.q", "l.0.v"):
        x = change(one, name, (2 if name.endswith("v") else 6) / 3**0.5)
        y = change(two, name, 5 / other_rank)
        module = found[name]
        expected = [np.linalg.norm(x), np.linalg.norm(y), np.linalg.norm(x - y), np.vdot(x, y)]
        expected[3] /= expected[0] * expected[1]
        # Both in float64 from the same float32 factors; the Gram matrices square the rounding.
        np.testing.assert_allclose([*module.norms, module.distance, module.cosine], expected, rtol=1e-9)
        assert module.ranks == (3, other_rank)
        for side, found_angles in (("B", module.output_angles), ("A", module.input_angles)):
            factors = [t.tensors[f"{P}{name}.lora_{side}.weight"] for t in (one, two)]
            wanted = angles(*(f if side == "B" else f.T for f in factors))
            np.testing.assert_allclose(found_angles, wanted, atol=1e-4)  # acos near 1 takes the root of the rounding
        total += np.array([*expected[:2], expected[2]]) ** 2
    whole = diff(one, two).total()
    assert whole is not None
    np.testing.assert_allclose([*whole.norms, whole.distance], np.sqrt(total), rtol=1e-9)


def test_factors_of_many_blocks_and_of_less_rank():
    """Longer than what is converted at a time; one column of B is the sum of the others, so Cholesky has no factor."""
    config = jaxadapt.LoraConfig(r=3, lora_alpha=6, target_modules=["q"])
    one, two = (
        tensors(config, {"q.lora_A.weight": array(3, 30_001), "q.lora_B.weight": array(40_003, 3)}) for _ in (0, 1)
    )
    b = one.tensors[P + "q.lora_B.weight"]
    b[:, 2] = b[:, 0] + b[:, 1]
    found = diff(one, two).modules[0]
    a, b, c, d = (t.tensors[f"{P}q.lora_{n}.weight"].astype("float64") for t in (one, two) for n in "AB")
    grams = (b.T @ b) * (a @ a.T), (d.T @ d) * (c @ c.T), (b.T @ d) * (a @ c.T)
    xx, yy, xy = (4 * float(gram.sum()) for gram in grams)
    np.testing.assert_allclose(found.norms, [xx**0.5, yy**0.5], rtol=1e-9)
    np.testing.assert_allclose(found.distance, (xx + yy - 2 * xy) ** 0.5, rtol=1e-9)
    np.testing.assert_allclose(found.input_angles, angles(a.T, c.T), atol=1e-4)
    np.testing.assert_allclose(found.output_angles, angles(b[:, :2], d), atol=1e-3)  # the sum is rounded to float32


def test_two_steps_of_a_run_keep_their_digits():
    """‖ΔW₁‖² + ‖ΔW₂‖² − 2⟨ΔW₁, ΔW₂⟩ would lose them all: the factors differ in the last bits of float32."""
    one = lora(3)
    two = dataclasses.replace(one, tensors={k: v * np.float32(1 + 2e-7) for k, v in one.tensors.items()})
    for module in diff(one, two).modules:
        x, y = (change(t, module.module, 2) for t in (one, two))
        assert 0 < module.relative < 1e-6
        np.testing.assert_allclose(module.distance, np.linalg.norm(x - y), rtol=1e-6)


def test_equal_changes_of_other_factors():
    one = lora(3)
    turn = np.linalg.qr(RNG.standard_normal((3, 3)))[0].astype("float32")
    turned = {k: turn @ v if "lora_A" in k else v @ turn.T for k, v in one.tensors.items()}
    found = diff(one, dataclasses.replace(one, tensors=turned))
    for module in found.modules:
        assert module.relative < 1e-6  # the rounding of float32
        assert module.cosine == pytest.approx(1, abs=1e-12)
        assert module.output_angles == pytest.approx((0, 0), abs=1e-3)
    assert not found.is_equal
    assert diff(one, one).is_equal
    assert diff(one, dataclasses.replace(one, tensors=dict(one.tensors))).total().distance == 0


def test_experts_embeddings_and_other_tensors():
    config = jaxadapt.LoraConfig(
        r=2, lora_alpha=6, target_modules=["e"], target_parameters=["experts.down_proj"], modules_to_save=["head"],
    )  # fmt: skip

    def drawn() -> jaxadapt.PeftTensors:
        return tensors(config, {
            "l.0.experts.lora_A.weight": array(6, 7), "l.0.experts.lora_B.weight": array(5, 6),
            "e.lora_embedding_A": array(2, 11), "e.lora_embedding_B": array(4, 2), "head.weight": array(3, 3),
        })  # fmt: skip

    one, two = drawn(), drawn()
    found = {m.module: m for m in diff(one, two).modules}

    def expert_changes(t: jaxadapt.PeftTensors) -> np.ndarray:
        a = t.tensors[P + "l.0.experts.lora_A.weight"].reshape(3, 2, 7)
        return 3 * np.einsum("ore,eri->eoi", t.tensors[P + "l.0.experts.lora_B.weight"].reshape(5, 2, 3), a)

    x, y = expert_changes(one), expert_changes(two)
    assert found["l.0.experts.down_proj"].distance == pytest.approx(np.linalg.norm(x - y), rel=1e-5)
    x, y = (3 * t.tensors[P + "e.lora_embedding_B"] @ t.tensors[P + "e.lora_embedding_A"] for t in (one, two))
    assert found["e"].distance == pytest.approx(np.linalg.norm(x - y), rel=1e-5)
    x, y = (t.tensors[P + "head.weight"] for t in (one, two))
    assert (found["head.weight"].kind, found["head.weight"].distance) == (
        "tensor",
        pytest.approx(np.linalg.norm(x - y)),
    )


def test_ia3_is_compared_by_its_relative_change():
    one, two = (small.adapter(small.IA3, seed) for seed in (1, 2))
    found = diff(jaxadapt.to_peft(one), jaxadapt.to_peft(two))
    for module in found.modules:
        x, y = (np.asarray(jaxadapt.to_peft(a).tensors[f"{P}{module.module}.ia3_l"], "float64") for a in (one, two))
        assert module.kind == "IA3"
        assert module.norms == pytest.approx((np.linalg.norm(x - 1), np.linalg.norm(y - 1)))
        assert module.distance == pytest.approx(np.linalg.norm(x - y))


def test_settings_modules_and_sizes_that_differ():
    one = lora(3, names=("l.0.q", "l.0.v"))
    two = lora(3, names=("l.0.q", "l.0.k"), lora_dropout=0.5)
    two.tensors[P + "l.0.q.lora_A.weight"] = array(3, 8)
    found = diff(one, two)
    assert found.settings == {"lora_dropout": (0.0, 0.5)}
    assert found.only == (("l.0.v",), ("l.0.k",))
    assert found.other_shapes == ("l.0.q: [7, 9] and [7, 8]",)
    assert not found.modules
    assert not found.is_equal
    assert found.total() is None
    assert str(found).split("\n\n") == [
        "settings that differ: 1\n  lora_dropout: 0.0 and 0.5",
        "only in the first: 1\n  l.0.v",
        "only in the second: 1\n  l.0.k",
        "of other sizes: 1\n  l.0.q: [7, 9] and [7, 8]",
    ]
    with pytest.raises(jaxadapt.MismatchError, match="their methods are LORA and IA3"):
        diff(one, jaxadapt.to_peft(small.adapter(small.IA3)))


def test_the_order_of_names_is_no_difference(tmp_path):
    """PEFT writes target_modules from a set of Python, whose order is another one in each process."""
    one = lora(3, names=("l.0.q",))
    two = dataclasses.replace(one, config=one.config.replace(target_modules=["v", "q"]))
    assert one.config.to_dict()["target_modules"] != two.config.to_dict()["target_modules"]
    assert diff(one, two).is_equal
    other = dataclasses.replace(one, config=one.config.replace(target_modules=["v", "o", "q"]))
    assert diff(two, other).settings == {"target_modules": (["q", "v"], ["o", "q", "v"])}


def test_a_difference_is_printed_as_text():
    """With the numbers of NumPy, and without control characters of names."""
    one, two = lora(3, names=("l.0.q",)), lora(3, names=("l.0.q", "l.0.\x1b[2J"))
    x, y = change(one, "l.0.q", 2), change(two, "l.0.q", 2)
    norms = np.linalg.norm(x), np.linalg.norm(y)
    assert str(diff(one, two)).splitlines() == [
        "compared  1 modules with LoRA; 1 of them differ",
        f"norms     {norms[0]:.4g} and {norms[1]:.4g}",
        f"distance  {np.linalg.norm(x - y) / norms[0]:.4g} × the norm of the first",
        f"cosine    {(x * y).sum() / norms[0] / norms[1]:.4g}",
        "",
        "only in the second: 1",
        "  l.0.\\x1b[2J",
    ]
    assert str(diff(one, one)) == "equal: the same settings, modules and values"


def test_an_untrained_adapter_has_no_direction():
    one = lora(3)
    fresh = dataclasses.replace(one, tensors={k: v * 0 if "lora_B" in k else v for k, v in one.tensors.items()})
    module = diff(fresh, one).modules[0]
    assert module.relative == math.inf
    assert math.isnan(module.cosine)
    assert module.output_angles is None
    assert diff(one, fresh).modules[0].relative == pytest.approx(1)


def test_the_grid():
    one, two = lora(3), lora(3)
    grid = diff(one, two).grid()
    assert grid is not None
    assert (grid.rows, grid.columns) == (("0", "1"), ("q", "v"))
    found = {m.module: m for m in diff(one, two).modules}
    assert grid.values("relative")[0] == pytest.approx([found["l.0.q"].relative, found["l.0.v"].relative])
    assert grid.values("relative")[1][1] is None
    assert grid.values("cosine")[1][0] == pytest.approx(found["l.1.q"].cosine)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command(tmp_path):
    one, two = lora(3), lora(3, lora_dropout=0.5)
    jaxadapt.write(one, tmp_path / "a")
    jaxadapt.write(two, tmp_path / "b")
    assert run("diff", tmp_path / "a", tmp_path / "a").exit_code == 0
    result = run("diff", tmp_path / "a", tmp_path / "b", "--plot", tmp_path / "p.png", "--modules")
    assert result.exit_code == 1
    for text in (*str(diff(one, two)).splitlines(), "l.0.q", "cosine"):
        assert text in result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    again = run("diff", tmp_path / "a", tmp_path / "b", "--plot", tmp_path / "q.png", "--json")
    distance = diff(one, two).total().distance
    # The file has the modules in another order, and so has the sum.
    assert json.loads(again.output)["totals"]["LoRA"]["distance"] == pytest.approx(distance, rel=1e-14)
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "q.png").read_bytes()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, for a NaN
def test_values_that_are_nan_differ(tmp_path):
    one = lora(3)
    two = dataclasses.replace(one, tensors={k: v.copy() for k, v in one.tensors.items()})
    two.tensors[P + "l.0.q.lora_A.weight"][0, 0] = np.nan
    found = diff(one, two)
    assert not found.is_equal
    assert [math.isnan(m.distance) for m in found.modules] == [True, False, False]
    grid = found.grid()
    assert grid is not None
    assert math.isnan(grid.values("cosine")[0][0])
    jaxadapt.write(one, tmp_path / "a")
    jaxadapt.write(two, tmp_path / "b")
    result = run("diff", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    assert "3 modules with LoRA; 1 of them differ, 1 with a NaN or an infinity" in result.output


def test_two_steps_of_a_run(tmp_path):
    model = small.trained()
    manager = jaxadapt.CheckpointManager(tmp_path / "run")
    manager.save(1, model)
    jaxadapt.save(model, tmp_path / "first")
    jaxadapt.inject(model, small.noisy(jaxadapt.extract(model), 7))
    manager.save(2, model)
    manager.wait()
    jaxadapt.save(model, tmp_path / "second")
    steps = [tmp_path / "run" / f"step-00000000{n}.safetensors" for n in (1, 2)]
    document = json.loads(run("diff", *steps, "--json").output)
    assert not document["equal"]
    saved = json.loads(run("diff", tmp_path / "first", tmp_path / "second", "--json").output)
    assert document["totals"] == saved["totals"]
    assert json.loads(run("diff", steps[0], tmp_path / "first", "--json").output)["totals"]["LoRA"]["distance"] == 0


@pytest.mark.parametrize("other", ["out/", 3, jaxadapt.LoraConfig()])
def test_only_peft_tensors_are_compared(other):
    tensors = jaxadapt.PeftTensors(jaxadapt.LoraConfig(target_modules=["q"]), {})
    for pair in ((tensors, other), (other, tensors)):
        with pytest.raises(jaxadapt.AttachError, match=rf"jaxadapt.read\(folder\)[^\n]*\n  {type(other).__name__}$"):
            jaxadapt.analysis.diff(*pair)
