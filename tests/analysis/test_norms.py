"""Norms, effective ranks, their grid and plot, compared with NumPy on the full change."""

from __future__ import annotations

import io
import itertools
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import jaxadapt
from jaxadapt.analysis import measure_norms, norms_png
from jaxadapt.analysis.changes import Norm, Norms
from jaxadapt.cli import main
from tests.support import small

P = "base_model.model."
RNG = np.random.default_rng(0)


def array(*shape):
    return RNG.standard_normal(shape).astype("float32")


def tensors(config, **held):
    return jaxadapt.PeftTensors(config, {P + key: value for key, value in held.items()}, "these")


def of_matrix(delta):
    s = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    p = s[s > 1e-9 * s[0]] / s.sum()
    return np.linalg.norm(delta), np.exp(-(p * np.log(p)).sum())


def test_lora_is_the_norm_of_the_formed_change():
    config = jaxadapt.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "v", "e", "c"], use_rslora=True, rank_pattern={"v": 2},
        alpha_pattern={"v": 3}, modules_to_save=["head"],
    )  # fmt: skip
    a, b, a2, b2 = array(4, 9), array(7, 4), array(2, 9), array(7, 2)
    ea, eb, ca, cb = array(4, 11), array(5, 4), array(4, 3, 2, 2), array(6, 4, 1, 1)
    held = tensors(
        config,
        **{"l.0.q.lora_A.weight": a, "l.0.q.lora_B.weight": b, "l.0.v.lora_A.weight": a2, "l.0.v.lora_B.weight": b2,
           "e.lora_embedding_A": ea, "e.lora_embedding_B": eb, "c.lora_A.weight": ca, "c.lora_B.weight": cb,
           "head.weight": array(3, 3)},
    )  # fmt: skip
    found = measure_norms(held)
    want = {
        "l.0.q": (3.0, b @ a, 4), "l.0.v": (3 / 2**0.5, b2 @ a2, 2), "e": (3.0, eb @ ea, 4),
        "c": (3.0, cb[:, :, 0, 0] @ ca.reshape(4, -1), 4),
    }  # fmt: skip
    assert {n.module for n in found.modules} == set(want)
    for norm in found.modules:
        scale, delta, rank = want[norm.module]
        size, effective = of_matrix(scale * delta)
        # Both in float64, from the same float32 factors, whose product numpy formed in float32.
        np.testing.assert_allclose([norm.norm, norm.effective_rank, norm.scale], [size, effective, scale], rtol=1e-5)
        assert norm.rank == rank
    assert found.left_out == ("head.weight",)


def test_experts_are_changed_each_by_itself():
    """As PEFT's ParamWrapper splits the factors: rows of A by expert, columns of B by rank."""
    config = jaxadapt.LoraConfig(
        r=4, lora_alpha=6, target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        rank_pattern={"experts.gate_up_proj": 2},
    )  # fmt: skip
    held = {
        "l.0.experts.base_layer.lora_A.weight": array(6, 9), "l.0.experts.base_layer.lora_B.weight": array(7, 6),
        "l.0.experts.lora_A.weight": array(12, 7), "l.0.experts.lora_B.weight": array(5, 12),
    }  # fmt: skip
    found = {norm.module: norm for norm in measure_norms(tensors(config, **held)).modules}
    for name, module, rank in (("gate_up_proj", "experts.base_layer", 2), ("down_proj", "experts", 4)):
        a = held[f"l.0.{module}.lora_A.weight"].reshape(3, rank, -1)
        b = held[f"l.0.{module}.lora_B.weight"]
        deltas = 6 / rank * np.einsum("ore,eri->eoi", b.reshape(b.shape[0], rank, 3), a)
        want = [np.linalg.norm(deltas), np.mean([of_matrix(delta)[1] for delta in deltas])]
        norm = found[f"l.0.experts.{name}"]
        np.testing.assert_allclose([norm.norm, norm.effective_rank], want, rtol=1e-5)  # as above
        assert (norm.rank, norm.scale) == (rank, 6 / rank)
    assert Norms("", tuple(found.values())).grid().columns == ("gate_up_proj", "down_proj")


def test_the_change_is_never_formed():
    """The full change would take 160 GB here."""
    config = jaxadapt.LoraConfig(r=1, lora_alpha=1, target_modules=["q"])
    wide = np.ones((1, 200_000), "f4")
    (norm,) = measure_norms(tensors(config, **{"q.lora_A.weight": wide, "q.lora_B.weight": wide.T})).modules
    assert norm.norm == pytest.approx(200_000)


def test_a_fresh_adapter_and_one_direction():
    config = jaxadapt.LoraConfig(r=3, lora_alpha=3, target_modules=["q"])
    fresh = measure_norms(
        tensors(config, **{"q.lora_A.weight": array(3, 5), "q.lora_B.weight": np.zeros((4, 3), "f4")})
    )
    assert (fresh.modules[0].norm, fresh.modules[0].effective_rank) == (0, 0)
    b = np.outer(array(4), [1, 2, 3]).astype("f4")
    one = measure_norms(tensors(config, **{"q.lora_A.weight": array(3, 5), "q.lora_B.weight": b})).modules[0]
    assert one.effective_rank == pytest.approx(1, abs=1e-4)


def test_ia3_and_methods_that_need_the_base():
    l = array(6, 1)
    config = jaxadapt.IA3Config(target_modules=["q"], feedforward_modules=[])
    (norm,) = measure_norms(tensors(config, **{"q.ia3_l": l})).modules
    assert norm.norm == pytest.approx(np.sqrt(np.mean((l - 1) ** 2)))
    assert norm.rank is norm.scale is norm.effective_rank is None
    w1a, w1b, w2a, w2b = array(6, 2), array(2, 4), array(6, 2), array(2, 4)
    loha = jaxadapt.Config.from_dict({"peft_type": "LOHA", "target_modules": ["q"], "r": 2, "alpha": 3})
    named = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    found = measure_norms(tensors(loha, **{f"q.{name}": x for name, x in named.items()}))
    size, effective = of_matrix(3 / 2 * (w1a @ w1b) * (w2a @ w2b))
    assert (found.what, found.modules[0].rank) == ("‖ΔW‖", 2)
    # The product is formed in float32 on both sides.
    np.testing.assert_allclose([found.modules[0].norm, found.modules[0].effective_rank], [size, effective], rtol=1e-4)
    other = jaxadapt.Config.from_dict({"peft_type": "OFT", "target_modules": ["q"], "oft_block_size": 2})
    with pytest.raises(jaxadapt.ConfigError, match="norms for OFT"):
        measure_norms(tensors(other, **{"q.hada_w1_a": l}))


@pytest.mark.parametrize("peft_type", ["VERA", "PVERA", "RANDLORA", "VBLORA", "UNILORA", "TINYLORA"])
def test_shared_tensors_do_not_tell_the_change_of_a_module(peft_type):
    """A module's part of them depends on its sizes in the base, so no norm would be known."""
    config = jaxadapt.Config.from_dict({"peft_type": peft_type, "target_modules": ["q"]})
    with pytest.raises(jaxadapt.ConfigError, match=f"norms for {peft_type}.* Compare the weights before and after"):
        measure_norms(tensors(config, **{"q.x": array(6)}))


def test_a_scale_of_zero_and_factors_without_a_product():
    factors = {"q.lora_A.weight": array(3, 5), "q.lora_B.weight": array(4, 3)}
    off, on = (jaxadapt.LoraConfig(r=3, lora_alpha=alpha, target_modules=["q"]) for alpha in (0, 3))
    zero, one = (measure_norms(tensors(config, **factors)).modules[0] for config in (off, on))
    assert (zero.norm, zero.scale, zero.effective_rank) == (0, 0, one.effective_rank)
    odd = {"k.lora_A.weight": array(4, 2), "k.lora_B.weight": array(6, 2, 2)}
    assert measure_norms(tensors(on, **factors, **odd)).left_out == ("k",)


def test_a_run_that_went_astray_is_shown_not_decomposed(tmp_path):
    """NumPy's decompositions raise LinAlgError for NaN."""
    config = jaxadapt.LoraConfig(r=4, target_modules=["q"])
    for bad in ({"l.1.q"}, {"l.0.q", "l.1.q"}):
        a = {m: np.full((4, 9), np.nan if m in bad else 1, np.float32) for m in ("l.0.q", "l.1.q")}
        parts = {f"{m}.lora_A.weight": x for m, x in a.items()} | {f"{m}.lora_B.weight": array(7, 4) for m in a}
        jaxadapt.write(tensors(config, **parts), tmp_path / str(len(bad)))
        result = CliRunner().invoke(main, ["inspect", str(tmp_path / str(len(bad))), "--norms", "--json",
                                           "--plot", str(tmp_path / "norms.png")])  # fmt: skip
        assert result.exit_code == 0, result.output
        found = {one["module"]: one["norm"] for one in json.loads(result.output)["norms"]["modules"]}
        assert {module for module, norm in found.items() if norm is None} == bad
        assert CliRunner().invoke(main, ["inspect", str(tmp_path / str(len(bad))), "--norms"]).output.count("nan") >= 1


def test_the_grid():
    names = ["lm_head", "enc.block.0.mlp.down_proj", "enc.block.0.q_proj", "dec.block.10.q_proj", "dec.block.2.q_proj"]
    made = Norms("", tuple(Norm(name, float(i)) for i, name in enumerate(names))).grid()
    assert made.rows == ("enc.block.0", "dec.block.2", "dec.block.10", "–")
    assert made.columns == ("q_proj", "down_proj", "lm_head")
    assert made.values("norm")[0] == [2.0, 1.0, None]
    experts = Norms(
        "",
        (
            Norm("l.0.experts.0.up", 3.0, 2.0, 4, 1.0),
            Norm("l.0.experts.1.up", 4.0, 4.0, 4, 1.0),
        ),
    ).grid()
    assert (experts.rows, experts.columns) == (("0",), ("up",))
    assert experts.values("norm") == [[5.0]]  # of the two together
    assert experts.values("effective_rank") == [[3.0]]
    twice = Norms(
        "",
        (
            Norm("l.0.self.dense", 1.0),
            Norm("l.0.cross.dense", 2.0),
        ),
    ).grid()
    assert twice.columns == ("self.dense", "cross.dense")
    diffusion = Norms("", tuple(Norm(f"up.1.attn.{name}", 1.0) for name in ("to_k", "to_out.0", "to_q"))).grid()
    assert diffusion.columns == ("to_q", "to_k", "to_out.*")


@pytest.fixture
def saved(tmp_path):
    jaxadapt.save(small.trained(), tmp_path / "out", base_model="org/base")
    return tmp_path / "out"


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_inspect_draws_and_prints(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    result = run("inspect", saved, "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    want = measure_norms(jaxadapt.read(saved)).modules
    for norm in want:
        assert f"{norm.norm:#.3g}" in result.output
        assert f"{norm.effective_rank:#.3g}" in result.output
    assert "rank 2 and scale 3 in all modules" in result.output
    assert max(map(len, result.output.splitlines())) <= 70
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    run("inspect", saved, "--plot", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == data  # the same adapter, the same bytes
    listed = json.loads(run("inspect", saved, "--norms", "--json").stdout)["norms"]
    assert [m["norm"] for m in listed["modules"]] == [n.norm for n in want]


def test_a_picture_is_a_png_where_one_can_be_written(saved, tmp_path):
    wrong = run("inspect", saved, "--plot", tmp_path / "a.pdf")
    assert wrong.exit_code == 2
    assert "ending in .png" in wrong.output
    nowhere = run("inspect", saved, "--plot", tmp_path / "no" / "a.png")
    assert nowhere.exit_code == 1
    assert f"{tmp_path / 'no' / 'a.png'}: cannot write" in nowhere.output


def test_many_columns_are_put_under_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    config = jaxadapt.LoraConfig(r=1, lora_alpha=1, target_modules="all-linear")
    held = {f"l.0.module{i}.lora_{s}.weight": np.ones((1, 1), "f4") for i in range(9) for s in "AB"}
    jaxadapt.write(tensors(config, **held), tmp_path)
    output = run("inspect", tmp_path, "--norms").output
    assert max(map(len, output.splitlines())) <= 40
    assert all(output.count(f"module{i}") == 2 for i in range(9))  # norm and effective rank


def test_without_matplotlib(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", saved, "--plot", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "pip install 'jaxadapt[plot]'" in result.output
    assert not (tmp_path / "a.png").exists()


def test_a_picture_of_one_cell():
    config = jaxadapt.LoraConfig(r=1, lora_alpha=1, target_modules=["q"])
    held = tensors(config, **{"q.lora_A.weight": array(1, 3), "q.lora_B.weight": array(2, 1)})
    assert norms_png(measure_norms(held), config).startswith(b"\x89PNG")
    with pytest.raises(jaxadapt.AdapterError, match="nothing to draw"):
        norms_png(measure_norms(tensors(config, **{"head.weight": array(2, 2)})), config)


SHAPES = {
    "one column": (24, 1), "one cell": (1, 1), "one row": (1, 7), "deep": (126, 2), "wide": (3, 18), "square": (6, 6)
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", ["trained", "fresh"])
def test_a_picture_of_any_shape_is_whole(shape, of):
    """Nothing is cut at the edge; the color bar is as tall as its map; the figure is not wider than a page."""
    from matplotlib import image

    layers, modules = SHAPES[shape]
    config = jaxadapt.LoraConfig(r=2, target_modules="all-linear").replace(base_model_name_or_path="org/" + "long" * 9)
    names = [f"model.layers.{i}.block.module_{k}" for i in range(layers) for k in range(modules)]
    b = np.zeros((5, 2), "f4") if of == "fresh" else array(5, 2)
    held = {f"{m}.lora_{s}.weight": x for m in names for s, x in (("A", array(2, 4)), ("B", b))}
    drawn = image.imread(io.BytesIO(norms_png(measure_norms(tensors(config, **held)), config)))[:, :, :3]
    edge = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
    assert (edge == 1).all()
    assert drawn.shape[1] <= 15 * 130
    if of == "fresh":  # one map, all of it of the lowest color
        low, high = ((abs(drawn * 255 - np.array(c)) < 4).all(-1) for c in ((68, 1, 84), (253, 231, 37)))
        rows = np.flatnonzero(low.sum(1) > 60)  # the map's; the bar is narrower
        assert abs(np.flatnonzero(high.any(1)).min() - rows.min()) <= 2  # the top of the bar
        feet = low[rows.max() - 3 : rows.max() + 1].astype(int)
        assert 2 in (np.diff(feet) == 1).sum(1)  # map and bar end together


def test_the_grid_of_many_modules_takes_time_in_proportion():
    def calls(count: int) -> int:
        seen = itertools.count()
        many = [Norm(f"layers.0.{i}x.{i}y.q", 1.0) for i in range(count)]
        sys.setprofile(lambda *_: next(seen))
        try:
            grid = Norms("", tuple(many)).grid()
        finally:
            sys.setprofile(None)
        assert grid.columns[:2] == ("0y.q", "1y.q")
        return next(seen)

    assert calls(200) < 3 * calls(100)
