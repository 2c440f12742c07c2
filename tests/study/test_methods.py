"""Methods: what each needs, what it is called, and that callbacks and optimizer do what they are named for."""

import itertools
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Batches, Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from methods import SETTINGS, Method
from networks import make_network
from optimizers import CautiousSGD
from pat import PAT_METHODS, has_torchao
from problems import Problem
from torch import Tensor, nn
from training import Classifier

from lightning_gcsr import Gate, GradientCoherentRegularization, KeepZeros, Schedule
from lightning_gcsr.core.parameter_selection import select_parameters

PENALIZED: dict[str, Any] = {"penalty": "l1", "strength": 0.01, "update": "proximal"}
GIVEN: dict[str, dict[str, Any]] = {
    "none": {},
    "plain": PENALIZED,
    "delayed": PENALIZED | {"delay": 0.2},
    "coherent": PENALIZED | {"coherence": "direction", "scope": "model"},
    "cautious_weight_decay": {"strength": 0.01},
    "magnitude_pruning": {"compression": 10},
    "pat_top_k": {"compression": 10},
    "pat_lasso": {"strength": 0.01},
    "spred": {"strength": 0.01, "cut": 0.001},
    "linearized_bregman": {"strength": 0.01, "initial_density": 0.1},
}
"""What each method must be given."""
EXTRA: dict[str, Any] = PENALIZED | {
    "coherence": "direction",
    "scope": "model",
    "compression": 10,
    "threshold": 0.3,
    "tolerance": 0.1,
    "averaging": 0.9,
    "strength_scale": "fan_in",
    "delay": 0.2,
    "warmup": 0.1,
    "polish": 0.1,
    "prunings": 100,
    "target_sparsity": 0.9,
    "cut": 0.002,
    "initial_density": 0.3,
}
_OF_RIVALS = {"cut", "initial_density"}
SUPERFLUOUS: dict[str, set[str]] = {
    "none": set(EXTRA),
    "plain": _OF_RIVALS
    | {"coherence", "scope", "compression", "prunings", "threshold", "tolerance", "averaging", "delay"},
    "delayed": _OF_RIVALS | {"coherence", "scope", "compression", "prunings", "threshold", "tolerance", "averaging"},
    "coherent": _OF_RIVALS | {"compression", "prunings"},
    "cautious_weight_decay": set(EXTRA) - {"strength"},
    "magnitude_pruning": set(EXTRA) - {"compression", "prunings", "target_sparsity"},
    "pat_top_k": set(EXTRA) - {"compression", "target_sparsity"},
    "pat_lasso": set(EXTRA) - {"strength", "polish"},
    "spred": set(EXTRA) - {"strength", "cut"},
    "linearized_bregman": set(EXTRA) - {"strength", "initial_density"},
}


# -- settings --------------------------------------------------------------------------------------------------------


def test_every_method_is_tested() -> None:
    assert set(GIVEN) == set(SUPERFLUOUS) == set(SETTINGS)
    assert {"method", *EXTRA} == {field.name for field in fields(Method)}
    for method, given in GIVEN.items():
        assert Method(method, **given).method == method


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, given in GIVEN.items() for name in given])
def test_missing_setting_is_named(method: str, name: str) -> None:
    given = {key: value for key, value in GIVEN[method].items() if key != name}
    with pytest.raises(ValueError, match=rf"^`{name}` must be given .*got {name}=(None|0\.0)\.?") as error:
        Method(method, **given)
    assert f"method={method!r}" in str(error.value)


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in SETTINGS for name in EXTRA if name in SUPERFLUOUS[method]]
)
def test_superfluous_setting_is_named(method: str, name: str) -> None:
    """What a method does not use must be left out, or two runs that are the same would be told apart."""
    with pytest.raises(ValueError, match=rf"`{name}` must .*got {name}={EXTRA[name]!r}"):
        Method(method, **GIVEN[method] | {name: EXTRA[name]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "plane"}, r"`method` must be one of 'none', .* got method='plane'\. Did you mean 'plain'\?"),
        ({"method": "plain", **PENALIZED, "penalty": "l3"}, r"`penalty` .*'l3'"),
        ({"method": "plain", **PENALIZED, "update": "sgd"}, r"`update` must be one of .*got update='sgd'"),
        ({"method": "plain", **PENALIZED, "strength": -1}, r"`strength` must .* got strength=-1"),
        ({"method": "plain", **PENALIZED, "strength": "1e-3"}, r"`strength` must .* got strength='1e-3'"),
        (
            {"method": "plain", **PENALIZED, "warmup": 1.5},
            r"`warmup` must be a number in \[0, 1\], got warmup=1\.5\. It",
        ),
        ({"method": "delayed", **PENALIZED, "delay": -0.1}, r"`delay` must be a number in \[0, 1\], got delay=-0\.1"),
        (
            {"method": "plain", **PENALIZED, "polish": "0.1"},
            r"`polish` must be a number in \[0, 1\], got polish='0\.1'",
        ),
        ({"method": "coherent", **GIVEN["coherent"], "scope": "layer"}, r"`scope` .*got scope='layer'"),
        ({"method": "coherent", **GIVEN["coherent"], "coherence": "cosine"}, r"`coherence` .*got coherence='cosine'"),
        ({"method": "coherent", **GIVEN["coherent"], "threshold": 7}, r"`threshold` .*got threshold=7"),
        (
            {"method": "magnitude_pruning", "compression": 0.5},
            r"`compression` must .* at least 1, got compression=0\.5",
        ),
        ({"method": "cautious_weight_decay", "strength": -1}, r"`strength` must .* got strength=-1"),
    ],
)
def test_bad_value_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Method(**settings)


@pytest.mark.parametrize("method", ["plain", "magnitude_pruning", "pat_top_k"])
def test_how_far_to_go_is_said_once(method: str) -> None:
    [name] = [key for key in GIVEN[method] if key in ("strength", "compression")]
    with pytest.raises(ValueError, match=rf"`{name}` must be left out beside target_sparsity with method='{method}'"):
        Method(method, **GIVEN[method], target_sparsity=0.9)


def test_target_sparsity_places_a_pruning() -> None:
    assert Method("pat_top_k", target_sparsity=0.9).sparsity == pytest.approx(
        Method("pat_top_k", compression=10).sparsity
    )


def test_cautious_weight_decay_is_for_sgd() -> None:
    method, adamw = (
        Method("cautious_weight_decay", strength=0.1),
        Problem("digits", "deep_mlp", 1, 0.1, optimizer="adamw"),
    )
    with pytest.raises(ValueError, match=r"`optimizer` must be 'sgd' with method='cautious_weight_decay', got"):
        method.check_optimizer(adamw)


def test_titles_tell_methods_apart() -> None:
    """The report puts runs of one title in one line: all that differs but the strength must be in it."""
    settings: list[dict[str, Any]] = [{"method": "none"}, {"method": "cautious_weight_decay", "strength": 0.01}]
    settings += [{"method": "magnitude_pruning", "compression": 2}, {"method": "pat_top_k", "compression": 2}]
    settings += [{"method": "pat_lasso", "strength": 0.1}, {"method": "pat_lasso", "strength": 0.1, "polish": 0.3}]
    settings += [{"method": "spred", "strength": 0.1, "cut": cut} for cut in (0.001, 0.002)]
    settings += [{"method": "linearized_bregman", "strength": 0.1, "initial_density": share} for share in (0.1, 0.2)]
    updates = ("proximal", "dual_averaging", "gradient")
    for penalty, update in itertools.product(("l1", "l2", "group_lasso", "elastic_net"), updates):
        base = {"penalty": penalty, "update": update, "strength": 0.1}
        settings += [{"method": "plain", **base, **more} for more in ({}, {"warmup": 0.1}, {"polish": 0.1})]
        settings += [{"method": "plain", **base, "strength_scale": "fan_in"}]
        settings += [{"method": "delayed", **base, "delay": 0.1}]
        for coherence, scope in itertools.product(("agreement", "direction", "temporal"), ("element", "model")):
            gate = {"coherence": coherence, "scope": scope}
            settings += [
                {"method": "coherent", **base, **gate, **more}
                for more in ({}, {"delay": 0.1}, {"delay": 0.2}, {"warmup": 0.1}, {"polish": 0.1})
            ]
            if coherence != "temporal":
                settings += [{"method": "coherent", **base, **gate, "averaging": share} for share in (0.5, 0.9)]
            if (coherence, scope) == ("agreement", "element"):
                settings += [{"method": "coherent", **base, **gate, "tolerance": share} for share in (0.1, 0.3)]
            if scope == "model":  # an element's coherence is a sign
                settings += [{"method": "coherent", **base, **gate, "threshold": least} for least in (0.3, 0.5)]
    titles = [Method(**values).title for values in settings]
    assert len(set(titles)) == len(titles)


def test_titles_tell_delays_apart() -> None:
    titles = {Method("delayed", **PENALIZED, delay=delay).title for delay in (0.1, 0.2, 0.5)}
    assert len(titles) == 3


@pytest.mark.parametrize("name", ["delay", "warmup", "polish"])
def test_titles_tell_near_shares_apart(name: str) -> None:
    titles = {Method("coherent", **GIVEN["coherent"], **{name: share}).title for share in (0.12, 0.125)}
    assert len(titles) == 2


def test_title_does_not_depend_on_what_the_line_is_drawn_over() -> None:
    for method, given in GIVEN.items():
        axis = "compression" if method == "magnitude_pruning" else "strength"
        if axis in given:
            assert Method(method, **given).title == Method(method, **given | {axis: 77}).title


# -- shares of the training ------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return make_network("deep_mlp", (1, 8, 8), 10)


def callback_of(method: Method) -> GradientCoherentRegularization:
    """The callback that regularizes."""
    [callback] = [c for c in method.callbacks(network(), 10) if isinstance(c, GradientCoherentRegularization)]
    return callback


def test_shares_reach_the_schedule() -> None:
    method = Method("delayed", **PENALIZED, delay=0.25, warmup=0.1, polish=0.3)
    assert callback_of(method).schedule == Schedule(delay=0.25, warmup=0.1, stop=0.7)


@pytest.mark.parametrize("shares", [{"delay": 0.6, "polish": 0.5}, {"delay": 1.0, "polish": 0.1}, {"polish": 1.0}])
def test_shares_that_leave_no_step_for_the_penalty_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"`\w+` must"):
        Method("delayed" if "delay" in shares else "plain", **PENALIZED, **shares)


def test_without_shares_the_penalty_is_there_from_first_to_last() -> None:
    assert callback_of(Method("plain", **PENALIZED)).schedule == Schedule(delay=0.0, warmup=0.0)


def test_settings_reach_the_callback() -> None:
    method = Method(
        "coherent",
        penalty="group_lasso",
        strength=0.03,
        update="gradient",
        coherence="temporal",
        scope="parameter",
        threshold=0.4,
        strength_scale="fan_in",
    )
    callback = callback_of(method)
    assert callback.gate == Gate("temporal", scope="parameter", threshold=0.4)
    assert repr(callback.penalty) == "GroupLasso(dim=0)"
    assert (callback.strength, callback.update, callback.strength_scale) == (0.03, "gradient", "fan_in")
    sign = Method("coherent", **PENALIZED, coherence="agreement", scope="element", tolerance=0.2, averaging=0.9)
    assert callback_of(sign).gate == Gate(tolerance=0.2, averaging=0.9)
    # The ablation: the sign of each step's gradient decides, without tolerance.
    bare = Method("coherent", **PENALIZED, coherence="agreement", scope="element")
    assert callback_of(bare).gate == Gate(tolerance=0.0, averaging=0.0)


@pytest.mark.parametrize("method", ["plain", "delayed"])
def test_plain_and_delayed_have_no_gate(method: str) -> None:
    assert callback_of(Method(method, **GIVEN[method])).gate is None


@pytest.mark.parametrize("method", SETTINGS)
def test_callbacks_are_fresh_and_only_what_is_needed(method: str) -> None:
    made = Method(method, **GIVEN[method])
    kinds = [type(callback).__name__ for callback in made.callbacks(network(), 10)]
    ours = ["GradientCoherentRegularization"]
    wanted = dict.fromkeys(("plain", "delayed", "coherent"), ours) | {"magnitude_pruning": ["GradualPruning"]}
    assert kinds == (wanted | {"spred": ["Factors"]}).get(method, [])
    for one, other in zip(made.callbacks(network(), 10), made.callbacks(network(), 10), strict=True):
        assert one is not other


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", sorted(set(SETTINGS) - {"cautious_weight_decay", "spred"}))
def test_optimizer_is_that_of_the_problem(method: str, optimizer: str) -> None:
    if method in PAT_METHODS and not has_torchao():
        pytest.skip("torchao is not installed")
    problem = Problem("digits", "deep_mlp", 1, 0.1, momentum=0.7, optimizer=optimizer, weight_decay=0.03)
    made = Method(method, **GIVEN[method]).optimizer(net := network(), problem, 100)
    base = getattr(made, "base_optimizer", made)
    assert isinstance(base, torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW)
    for group in made.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.03)
        assert optimizer == "adamw" or group["momentum"] == 0.7
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(net.parameters()))


def test_polish_comes_after_the_penalty() -> None:
    made = Method("plain", **PENALIZED, polish=0.25)
    assert [type(callback).__name__ for callback in made.callbacks(network(), 10)][1:] == ["KeepZeros"]
    assert callback_of(made).schedule.stop == 0.75


# -- in a Trainer ----------------------------------------------------------------------------------------------------


class Probe(Callback):
    """Copies of all weights, after each step and at the end of each epoch as this callback's neighbours leave them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(_copies(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(_copies(pl_module))


def _copies(module: LightningModule) -> dict[str, Tensor]:
    """Parameters by name; of a pruned one, what the network computes with."""
    copies = {}
    for name, layer in module.network.named_modules():  # type: ignore[union-attr, operator]
        for kind in ("weight", "bias"):
            if isinstance(tensor := getattr(layer, f"{kind}_orig", getattr(layer, kind, None)), Tensor):
                copies[f"{name}.{kind}"] = tensor.detach() * getattr(layer, f"{kind}_mask", 1)
    return copies


EPOCHS = 10


def fit(
    method: Method, images: Dataset, path: Path, epochs: int = EPOCHS, polished: bool = True
) -> tuple[nn.Module, Probe, Probe]:
    """Train one for a few epochs with a probe before and one after its callbacks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net = make_network("lenet_300_100", images.shape, images.classes)
    batches = Batches(images.train, 128, 0)
    steps = epochs * len(batches)
    module = Classifier(net, Problem("digits", "lenet_300_100", epochs, 0.02), method, steps)
    before, after = Probe(), Probe()
    callbacks = [callback for callback in method.callbacks(net, epochs) if polished or type(callback) is not KeepZeros]
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[before, *callbacks, after],
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, batches)
    return net, before, after


@pytest.mark.parametrize("compression", [1, 7, 100])
def test_pruning_ends_at_the_asked_compression(compression: int, digits: Dataset, tmp_path: Path) -> None:
    net, before, after = fit(Method("magnitude_pruning", compression=compression), digits, tmp_path)
    weights = select_parameters(net)
    total = sum(weight.numel() for weight in weights.values())
    nonzeros = sum(int(weight.count_nonzero()) for weight in weights.values())
    assert total / nonzeros == pytest.approx(compression, rel=0.01)
    for name, bias in net.named_parameters():
        if name not in weights:
            assert bias.count_nonzero() > 0.9 * bias.numel(), name
    wanted = {f"{layer}.{kind}" for layer in (1, 3, 5) for kind in ("weight", "bias")}
    assert {name for name, _ in net.named_parameters()} == wanted  # the pruning is permanent

    # The schedule: sparsity rises by a cubic until 70 % of the epochs, and nothing more is pruned after that.
    sparsities = [1 - sum(int(epoch[n].count_nonzero()) for n in weights) / total for epoch in after.epochs]
    final = 1 - 1 / compression
    cubic = [final * (1 - (1 - min(epoch / 7, 1)) ** 3) for epoch in range(1, EPOCHS + 1)]
    assert sparsities == pytest.approx(cubic, abs=1e-3)

    # Pruning sets weights to zero and leaves the others as trained: no reset to the start.
    for epoch in range(EPOCHS):
        for name in weights:
            left = after.epochs[epoch][name]
            assert torch.equal(left, before.epochs[epoch][name] * (left != 0)), (epoch, name)
    assert not torch.equal(after.epochs[-1]["1.bias"], after.epochs[0]["1.bias"])


@pytest.mark.parametrize(("compression", "prunings"), [(20, 100), (5, 3)])
def test_pruning_in_steps_follows_the_schedule_within_epochs(
    compression: int, prunings: int, digits: Dataset, tmp_path: Path
) -> None:
    made = Method("magnitude_pruning", compression=compression, prunings=prunings)
    net, _, after = fit(made, digits, tmp_path, epochs=4)
    weights = select_parameters(net)
    total = sum(weight.numel() for weight in weights.values())
    steps = 4 * -(-len(digits.train[1]) // 128)
    final = 1 - 1 / compression
    for epoch, left in enumerate(after.epochs, start=1):
        done = min(epoch * steps // 4 * prunings // int(0.7 * steps), prunings)
        sparsity = 1 - sum(int(left[name].count_nonzero()) for name in weights) / total
        assert sparsity == pytest.approx(final * (1 - (1 - done / prunings) ** 3), abs=2e-3), epoch


def test_smallest_weights_of_all_layers_are_pruned(digits: Dataset, tmp_path: Path) -> None:
    _, before, after = fit(Method("magnitude_pruning", compression=20), digits, tmp_path, epochs=2)
    names = ("1.weight", "3.weight", "5.weight")
    pruned = torch.cat([before.epochs[0][name][after.epochs[0][name] == 0].abs() for name in names])
    left = torch.cat([after.epochs[0][name][after.epochs[0][name] != 0].abs() for name in names])
    assert len(pruned) == pytest.approx(0.95 * (len(pruned) + len(left)), rel=0.01)
    assert pruned.max() <= left.min()


def test_polish_keeps_zeros_and_is_stopping_otherwise(digits: Dataset, tmp_path: Path) -> None:
    settings = {"penalty": "l1", "strength": 0.02, "update": "proximal"}
    method = Method("plain", **settings, polish=0.4)
    _, _, polished = fit(method, digits, tmp_path, epochs=5)
    stop = round(0.6 * len(polished.steps))
    names = [name for name in polished.steps[0] if name.endswith("weight")]
    zeros = {name: polished.steps[stop - 1][name] == 0 for name in names}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 1_000
    for step in polished.steps[stop:]:
        for name in names:
            assert not step[name][zeros[name]].any()

    # The same without the callback: alike until the stop, and after it a single step that differs in the zeros only.
    _, _, stopped = fit(method, digits, tmp_path, epochs=5, polished=False)
    for one, other in zip(polished.steps[:stop], stopped.steps[:stop], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for name, weight in stopped.steps[stop].items():
        mask = zeros.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(polished.steps[stop][name], weight.masked_fill(mask, 0))
    assert any(stopped.steps[-1][name][zeros[name]].any() for name in names)
    last = polished.steps[-1]
    assert any(not torch.equal(last[name], polished.steps[stop][name]) for name in names)


def test_keeping_zeros_changes_nothing_where_there_are_none(digits: Dataset, tmp_path: Path) -> None:
    weak = {"penalty": "l2", "strength": 1e-5, "update": "gradient"}
    kept, _, _ = fit(Method("plain", **weak, polish=0.9), digits, tmp_path, epochs=2)
    plain, _, _ = fit(Method("plain", **weak), digits, tmp_path, epochs=2)
    for one, other in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert all(weight.all() for weight in select_parameters(kept).values())


# -- cautious weight decay -------------------------------------------------------------------------------------------


def cautious_reference(
    weight: list[float], gradients: list[list[float]], lr: float, momentum: float, decay: float
) -> list[float]:
    """The slow way, a number at a time: SGD's step, and after it decay where the step had the weight's own sign."""
    velocity: list[float | None] = [None] * len(weight)
    for gradient in gradients:
        for i, g in enumerate(gradient):
            old = velocity[i]
            velocity[i] = now = g if old is None else momentum * old + g
            weight[i] -= lr * now
            if now * weight[i] >= 0:
                weight[i] *= 1 - lr * decay
    return weight


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_cautious_sgd_agrees_with_the_slow_reference(momentum: float) -> None:
    lr, decay, steps = 0.1, 0.5, 12
    weight, bias = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (40, 5))
    start, start_bias = weight.detach().clone(), bias.detach().clone()
    gradients = torch.randn(steps, 40, dtype=torch.float64)
    gradients[:, :4] = 0  # where nothing pulls, decay acts: the product is not negative
    groups = [{"params": [weight], "cautious_decay": decay}, {"params": [bias]}]
    optimizer = CautiousSGD(groups, lr=lr, momentum=momentum)
    for step in range(steps):
        weight.grad, bias.grad = gradients[step].clone(), torch.ones_like(bias)
        assert optimizer.step() is None
    wanted = torch.tensor(cautious_reference(start.tolist(), gradients.tolist(), lr, momentum, decay)).double()
    wanted_plain = torch.tensor(cautious_reference(start.tolist(), gradients.tolist(), lr, momentum, 0.0)).double()
    torch.testing.assert_close(weight.detach(), wanted, atol=1e-6, rtol=1e-6)
    assert (wanted - wanted_plain).abs().max() > 0.01
    ones = torch.ones(steps, 5).tolist()
    torch.testing.assert_close(
        bias.detach(),
        torch.tensor(cautious_reference(start_bias.tolist(), ones, lr, momentum, 0.0)).double(),
        atol=1e-6,
        rtol=0,
    )


def test_cautious_sgd_calls_the_closure_and_skips_what_has_no_gradient() -> None:
    weight, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = CautiousSGD([{"params": [weight, unused], "cautious_decay": 0.5}], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        assert float(optimizer.step(closure).detach()) == 3  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9 * 0.95))
    assert torch.equal(unused, torch.ones(3))


def test_cautious_decay_is_on_weights_and_as_strong_as_the_penalty() -> None:
    net = make_network("resnet_20", (3, 32, 32), 10)
    problem = Problem("digits", "resnet_20", 1, 0.1)
    optimizer = Method("cautious_weight_decay", strength=0.02).optimizer(net, problem, 100)
    decayed, others = optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {id(p) for p in select_parameters(net).values()}
    assert {id(p) for p in others["params"]} == {id(p) for p in net.parameters()} - {id(p) for p in decayed["params"]}
    assert decayed["cautious_decay"] == pytest.approx(0.2)
    assert others.get("cautious_decay") is None
