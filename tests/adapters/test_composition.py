"""Offline composition against PEFT's add_weighted_adapter, and re-ranking against dense singular values."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from adapters import composition, peft_format, pruning
from adapters.errors import AdapterError, InvalidChoice
from adapters.weights import LoraWeights, LowRank, with_digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]


def random_weights(seed: int, ranks: dict[str, int], out: int = 12, into: int = 10, scale: float = 0.5) -> LoraWeights:
    draw = torch.Generator().manual_seed(seed)
    return with_digest(
        f"a{seed}",
        {
            path: LowRank(torch.randn(r, into, generator=draw), torch.randn(out, r, generator=draw), scale)
            for path, r in ranks.items()
        },
    )


def peft_result(llama, folders, weights, **kwargs):
    model = PeftModel.from_pretrained(copy.deepcopy(llama), folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    seed, inject = kwargs.pop("seed", 0), model.base_model.inject_adapter

    def inject_and_seed(*args):
        """The new adapter's first values are drawn before DARE's masks are."""
        inject(*args)
        torch.manual_seed(seed)

    model.base_model.inject_adapter = inject_and_seed
    model.add_weighted_adapter([f"a{i}" for i in range(len(folders))], weights, "merged", **kwargs)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if "merged" in getattr(module, "lora_A", {}):
            found[name] = (
                module.get_delta_weight("merged"),
                module.lora_A["merged"].weight,
                module.lora_B["merged"].weight,
            )
    return found


@pytest.fixture
def three(make_peft):
    """Three adapters of PEFT with unequal scales, two of equal rank and one of another rank and more modules."""
    specs = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]},
        {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]},
        {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]},
    ]
    folders = [make_peft(seed=i, folder=f"f{i}", **spec)[1] for i, spec in enumerate(specs)]
    return folders, [peft_format.read_folder(folder, name=f"a{i}") for i, folder in enumerate(folders)]


def test_exact_equals_peft_cat_and_the_sum_of_updates(llama, three):
    folders, adapters = three
    weights = [0.7, -1.3, 2.0]
    pairs = list(zip(adapters, weights, strict=True))
    result = composition.exact(pairs, "sum")
    oracle = peft_result(llama, folders, weights, combination_type="cat")
    assert set(result.modules) == set(oracle)
    for path, (delta, _, _) in oracle.items():
        assert torch.allclose(result.delta(path), delta, atol=1e-5)
        true = sum(w * a.delta(path) for a, w in pairs if path in a.modules)
        assert torch.allclose(result.delta(path), true, atol=1e-5)
    assert result.ranks == [3, 11] and {m.scale for m in result.modules.values()} == {1.0}
    assert result.metadata["composition"]["of"][1] == {"version": adapters[1].version.label, "weight": -1.3}


@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        ("linear", {}),
        ("ties", {"density": 0.4}),
        ("dare_linear", {"density": 0.5, "seed": 7}),
        ("dare_ties", {"density": 0.5, "seed": 3}),
    ],
)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.8]])
def test_merges_equal_peft(method, kwargs, weights, llama, three):
    folders, adapters = three
    result = composition.compose(list(zip(adapters[:2], weights, strict=True)), "m", method, **kwargs)
    oracle = peft_result(llama, folders[:2], weights, combination_type=method, **kwargs)
    assert set(result.modules) == set(oracle)
    for path, (_, a, b) in oracle.items():
        assert torch.allclose(result.modules[path].A, a, atol=1e-6)
        assert torch.allclose(result.modules[path].B, b, atol=1e-6)


def test_linear_differs_from_the_sum():
    one, two = (random_weights(i, {"m": 4}) for i in range(2))
    true = composition.exact([(one, 1.0), (two, 1.0)], "e").delta("m")
    assert (composition.linear([(one, 1.0), (two, 1.0)], "l").delta("m") - true).norm() / true.norm() > 0.5


def test_a_composed_adapter_saves_and_loads_in_peft(llama, three, tmp_path):
    _, adapters = three
    result = composition.compose([(a, 0.5) for a in adapters], "sum", rank=5)
    peft_format.save(result, tmp_path / "out")
    read = peft_format.read_folder(tmp_path / "out", name="sum")
    assert read.digest == result.digest
    for key in ("composition", "pruning"):
        assert read.metadata[key] == json.loads(json.dumps(result.metadata[key])), "the file says what it was made of"
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "out")
    for path in result.modules:
        loaded = model.base_model.model.get_submodule(path).get_delta_weight("default")
        assert torch.allclose(loaded, result.delta(path), atol=1e-6)


@given(rank=st.integers(1, 12), keep=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_truncation_is_optimal_and_states_its_error(rank, keep, seed):
    weights = random_weights(seed, {"m": rank})
    cut, what = pruning.truncate(weights, keep)
    dense = weights.delta("m")
    sigma = torch.linalg.svdvals(dense.double())
    best = float(sigma[keep:].norm() / sigma.norm())
    measured = float((cut.delta("m") - dense).norm() / dense.norm())
    assert measured == pytest.approx(best, abs=2e-6)
    assert what.error == pytest.approx(best, abs=2e-6) and what.worst_error == pytest.approx(best, abs=2e-6)
    assert cut.modules["m"].rank <= keep
    assert cut.metadata["pruning"]["error"] == what.error


def test_invalid_compositions_are_refused():
    one, two = random_weights(0, {"m": 4}), random_weights(1, {"m": 3})
    with pytest.raises(InvalidChoice, match="equal ranks"):
        composition.linear([(one, 1.0), (two, 1.0)], "l")
    with pytest.raises(InvalidChoice, match="different bases"):
        composition.exact([(one, 1.0), (random_weights(2, {"m": 4}, out=13), 1.0)], "e")
    with pytest.raises(InvalidChoice, match="no adapters"):
        composition.exact([], "e")
    with pytest.raises(InvalidChoice, match="every weight is zero"):
        composition.exact([(one, 0.0)], "e")
    with pytest.raises(InvalidChoice, match="add up to zero; nothing is left"):
        composition.exact([(one, 1.5), (one, -0.5), (one, -1.0)], "e")
    with pytest.raises(InvalidChoice, match="finite"):
        composition.exact([(one, float("nan"))], "e")
    with pytest.raises(AdapterError, match="density"):
        composition.ties([(one, 1.0)], "t", density=0.0)
    with pytest.raises(AdapterError, match="exact, linear"):
        composition.compose([(one, 1.0)], "x", "slerp")


@pytest.mark.parametrize("method", composition.METHODS)
def test_every_method_validates_its_adapters(method):
    one, other = random_weights(1, {"x": 2}), random_weights(2, {"x": 2}, out=8)
    for pairs, reason in (
        ([], "no adapters"),
        ([(one, 1.0), (other, 1.0)], "different bases"),
        ([(one, 99.0)], "finite"),
    ):
        with pytest.raises(InvalidChoice, match=reason):
            composition.compose(pairs, "c", method)
    with pytest.raises(AdapterError, match="density"):
        composition.ties([(one, 1.0)], "c", density=1.5)


def test_a_composed_adapter_keeps_metadata_that_all_share():
    one, other = (replace(random_weights(seed, {"x": 2}), metadata={"base": "m"}) for seed in (1, 2))
    assert composition.compose([(one, 1.0), (other, 1.0)], "c").metadata["base"] == "m"
    for base in ("n", None):
        pairs = [(one, 1.0), (replace(other, metadata={"base": base}), 1.0)]
        assert "base" not in composition.compose(pairs, "c").metadata


def test_dare_depends_on_the_seed():
    pairs = [(random_weights(i, {"m": 4}), 1.0) for i in range(2)]
    digests = [composition.dare(pairs, "d", density=0.5, seed=s).digest for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_the_global_threshold_keeps_the_largest_singular_values():
    strong, weak = random_weights(0, {"m": 4}, scale=1.0), random_weights(1, {"n": 4}, scale=1e-3)
    both = with_digest("b", {**strong.modules, **weak.modules})
    kept, cut = pruning.truncate_globally(both, budget=4 * 22)
    assert set(kept.modules) == {"m"} and cut.dropped == ("n",) and cut.parameters == 4 * 22
    assert cut.error < 2e-3 and cut.worst_module == "n" and cut.worst_error == 1.0
    kept, cut = pruning.truncate_globally(both, energy=0.9)
    assert cut.error <= 0.1**0.5 + 1e-6 and kept.modules["m"].rank < 4
    kept, cut = pruning.truncate_globally(both, energy=1.0)
    assert cut.error < 1e-6
    with pytest.raises(AdapterError, match="keeps nothing"):
        pruning.truncate_globally(both, budget=3)
    with pytest.raises(AdapterError, match="every update of the adapter is zero"):
        pruning.truncate_globally(random_weights(0, {"m": 4}, scale=0.0), energy=0.9)
    with pytest.raises(AdapterError, match="either"):
        pruning.truncate_globally(both)
    with pytest.raises(AdapterError, match="share"):
        pruning.truncate_globally(both, energy=1.5)


def test_dropping_modules_states_its_error():
    both = with_digest("b", {**random_weights(0, {"m": 4}).modules, **random_weights(1, {"n": 2}, scale=0.01).modules})
    assert pruning.weakest_modules(both, 0.5) == ["n"]
    left, cut = pruning.drop_modules(both, ["n"])
    whole = (both.delta("m").norm() ** 2 + both.delta("n").norm() ** 2) ** 0.5
    assert cut.error == pytest.approx(float(both.delta("n").norm() / whole), rel=1e-5)
    assert set(left.modules) == {"m"} and cut.dropped == ("n",)
    with pytest.raises(AdapterError, match="no module 'x'"):
        pruning.drop_modules(both, ["x"])
    with pytest.raises(AdapterError, match="would be left"):
        pruning.drop_modules(both, ["m", "n"])
    with pytest.raises(AdapterError, match="share"):
        pruning.weakest_modules(both, 1.0)
    with pytest.raises(AdapterError, match="at least 1"):
        pruning.truncate(both, 0)


def test_the_budget_stops_at_the_first_value_that_does_not_fit():
    def one(value, into):
        return LowRank(torch.eye(1, into) * value, torch.eye(2, 1), 1.0)

    both = with_digest("b", {"large": one(3.0, 4), "wide": one(2.0, 40), "small": one(1.0, 4)})
    kept, cut = pruning.truncate_globally(both, budget=2 * 6)
    assert set(kept.modules) == {"large"} and cut.dropped == ("small", "wide")


def test_composition_metadata():
    one, other = (replace(random_weights(i, {"x": 2}), metadata={"base": "m", "quantization": "q"}) for i in (1, 2))
    pairs = [(one, 0.5), (other, -2.0)]
    of = [{"version": one.version.label, "weight": 0.5}, {"version": other.version.label, "weight": -2.0}]
    told = composition.compose(pairs, "c", "dare_ties", density=1.0, seed=3).metadata
    assert told == {
        "base": "m",
        "quantization": "q",
        "composition": {"method": "dare_ties", "density": 1.0, "seed": 3, "of": of},
    }
    assert composition.compose(pairs, "c").metadata["composition"] == {"method": "exact", "of": of}


def test_method_settings_are_used():
    pairs = [(random_weights(i, {"x": 3}), 1.0) for i in range(3)]

    def composed(method, **how):
        return composition.compose(pairs, "c", method, **how).digest

    assert composed("dare_linear", seed=1) == composition.dare(pairs, "c", density=0.5, seed=1).digest
    assert composed("dare_linear", seed=1) != composed("dare_linear", seed=0)
    assert composed("ties", density=0.4) != composed("ties")
    assert composition.compose(pairs, "c", rank=2).modules["x"].rank == 2


def test_an_invalid_seed_is_refused_by_name():
    pair = (random_weights(1, {"x": 2}), 1.0)
    for seed in (-(1 << 64), 1 << 64):
        with pytest.raises(AdapterError) as wrong:
            composition.compose([pair], "c", "dare_linear", seed=seed)
        assert wrong.value.param == "seed"


def test_weakest_modules_respect_the_share():
    three = with_digest("b", {p: random_weights(i, {p: 2}, scale=0.1**i).modules[p] for i, p in enumerate("xyz")})
    assert pruning.weakest_modules(three, 0.5) == ["z"] and pruning.weakest_modules(three, 0.0) == []
    hundred = with_digest("b", {f"x{i}": three.modules["x"] for i in range(100)})
    assert len(pruning.weakest_modules(hundred, 0.29)) == 29
    negative = with_digest(
        "b", {"x": LowRank(three.modules["x"].A, three.modules["x"].B, -1.0), "z": three.modules["z"]}
    )
    assert pruning.weakest_modules(negative, 0.5) == ["z"], "a negative scale makes a module no weaker"


def test_pruning_metadata():
    whole = replace(random_weights(1, {"x": 4}), metadata={"base": "m"})
    cut, what = pruning.truncate(whole, 2, "new")
    told = cut.metadata["pruning"]
    assert cut.name == "new" and cut.metadata["base"] == "m" and told["of"] == whole.version.label
    assert (told["parameters_before"], told["parameters"], told["error"]) == (4 * 22, 2 * 22, what.error)
    assert pruning.truncate(whole, 2)[0].name == whole.name


def test_modules_that_are_not_truncated_are_unchanged():
    whole = random_weights(1, {"x": 4})
    cut, what = pruning.truncate(whole, 4)
    assert torch.equal(cut.modules["x"].A, whole.modules["x"].A) and cut.modules["x"].scale == 0.5
    assert what.error == 0.0


def dense(module):
    return module.B.double() @ module.A.double() * module.scale


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_the_stated_error_includes_rounding(given, asked):
    """Where what is cut is small, it is mostly what rounding costs."""
    steep = torch.logspace(0, -4, 6)
    x, y, z = (random_weights(seed, {"x": 6}).modules["x"] for seed in (1, 2, 3))
    whole = with_digest(
        "whole",
        {
            "x": LowRank(x.A.to(given), (x.B * steep).to(given), 0.5),
            "y": LowRank(y.A.to(given), y.B.to(torch.float32), 2.0),
            "z": LowRank(z.A[:2].to(given), z.B[:, :2].to(given), -1.0),
        },
    )
    cut, what = pruning.truncate(whole, 5, dtype=asked)
    off = {path: float((dense(cut.modules[path]) - dense(old)).norm()) for path, old in whole.modules.items()}
    norms = {path: float(dense(old).norm()) for path, old in whole.modules.items()}
    total = sum(n * n for n in off.values()) ** 0.5 / sum(n * n for n in norms.values()) ** 0.5
    assert what.error == pytest.approx(total, rel=1e-4) and what.worst_module == "y"
    assert what.worst_error == pytest.approx(off["y"] / norms["y"], rel=1e-4)
    assert [m.A.dtype for m in cut.modules.values()] == [asked or given] * 3
    assert [m.B.dtype for m in cut.modules.values()] == [asked or t for t in (given, torch.float32, given)]
    alone, what = pruning.truncate(with_digest("x", {"x": whole.modules["x"]}), 5, dtype=asked)
    assert what.error == pytest.approx(off["x"] / norms["x"], rel=1e-3)
    if asked is not None or given != torch.float32:
        assert what.error > 2 * float(torch.linalg.svdvals(dense(whole.modules["x"]))[5] / norms["x"])


def test_a_budget_is_met_exactly():
    both = with_digest(
        "b", {"x": LowRank(torch.ones(1, 4), torch.ones(6, 1), 1.0), "y": random_weights(2, {"y": 2}).modules["y"]}
    )
    assert pruning.truncate_globally(random_weights(1, {"x": 4}), budget=2 * 22)[1].parameters == 2 * 22
    with pytest.raises(AdapterError, match="a budget of 9 parameters keeps nothing; the least is 10"):
        pruning.truncate_globally(both, budget=9)
