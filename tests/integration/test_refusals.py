"""What does not work is refused before the first step with a way out, and what looks like a mistake is warned of."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gcsr import (
    L1,
    L2,
    CompressionMonitor,
    ElasticNet,
    Gate,
    GradientCoherentRegularization,
    GroupLasso,
    _lightning,
)

from .models import MemoryLogger, Regression, ValidatedRegression, fit, loader, make_trainer, sgd, weights_of


def regularization(**kwargs):
    return GradientCoherentRegularization(**({"strength": 0.05} | kwargs))


def refused(tmp_path, error, match, callback, model=None, **kwargs):
    """Assert that the fit is refused with this message before a training step."""
    model = Regression() if model is None else model
    with pytest.raises(error, match=match):
        fit(tmp_path, model, callback, **kwargs)
    assert model.training_steps == 0


# -- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_lbfgs_is_refused(tmp_path, update):
    model = Regression(make_optimizer=torch.optim.LBFGS)
    way_out = r"`GradientCoherentRegularization`: LBFGS is not supported.*Use SGD, Adam"
    refused(tmp_path, MisconfigurationException, way_out, regularization(update=update), model)


def test_maximize_is_refused(tmp_path):
    model = Regression(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, maximize=True))
    way_out = r"maximize=True is not supported.*Negate the loss and use maximize=False"
    refused(tmp_path, MisconfigurationException, way_out, regularization(), model)


def test_maximize_in_one_group_is_refused(tmp_path):
    def make(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "maximize": True}, {"params": others}], lr=0.1)

    refused(tmp_path, MisconfigurationException, "Negate the loss", regularization(), Regression(make_optimizer=make))


# -- neighbours ----------------------------------------------------------------------------------------------------


def test_measuring_a_gradient_with_another_penalty_in_it_is_refused(tmp_path):
    callbacks = [regularization(name="a", update="gradient"), regularization(name="b", strength=0.01)]
    message = r"'b' would measure gradients into which 'a' has .* 'net\.0\.weight' first\. Give 'a' update='proximal'"
    refused(tmp_path, MisconfigurationException, message, callbacks)


@pytest.mark.parametrize(
    ("aim", "advice"),
    [
        ({"strength": 0.1}, r"Give both update='proximal', or keep"),
        ({"target_sparsity": 0.5, "strength": None}, r"Give both a strength in place of target_sparsity, and update="),
    ],
    ids=["strength", "target"],
)
def test_two_that_keep_latent_weights_of_the_same_parameters_are_refused(tmp_path, aim, advice):
    callbacks = [regularization(name=name, update="dual_averaging", **aim) for name in "ab"]
    message = r"'b' and 'a' regularize 2 parameters together, 'net\.0\.weight' first.*" + advice
    refused(tmp_path, MisconfigurationException, message, callbacks)


def test_neighbours_on_weights_of_their_own_measure_what_they_measure_alone(tmp_path):
    def coherence(*names):
        logger = MemoryLogger()
        layers = {"a": r"net\.0\.weight", "b": r"net\.2\.weight"}
        callbacks = [
            regularization(name=name, include=[layers[name]], gate=Gate(scope="model"), update="gradient")
            for name in names
        ]
        fit(tmp_path, Regression(), callbacks, logger=logger, max_steps=1)
        return logger.values("b/coherence") + logger.values("b/grad_norm")

    assert coherence("a", "b") == coherence("b")


def test_proximal_neighbours_on_the_same_weights_measure_what_they_measure_alone(tmp_path):
    def coherence(*names):
        logger = MemoryLogger()
        callbacks = [regularization(name=name, gate=Gate(scope="model"), update="proximal") for name in names]
        fit(tmp_path, Regression(), callbacks, logger=logger, max_steps=1)
        return logger.values("b/coherence") + logger.values("b/grad_norm")

    assert coherence("a", "b") == coherence("b")


# -- strategies and precisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy_class",
    [FSDPStrategy, DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy],
)
@pytest.mark.parametrize("callback", [regularization(), CompressionMonitor()], ids=lambda c: type(c).__name__)
def test_strategies_that_hide_gradients_are_refused(strategy_class, callback):
    strategy = object.__new__(strategy_class)  # most of these cannot be made on a CPU
    trainer = SimpleNamespace(strategy=strategy, precision="32-true", callbacks=[callback])
    way_out = rf"`{type(callback).__name__}` does not support the strategy {strategy_class.__name__}.*strategy='ddp'"
    with pytest.raises(MisconfigurationException, match=way_out):
        callback.setup(trainer, Regression(), "fit")


@pytest.mark.parametrize("strategy_class", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
def test_tested_strategies_are_accepted(strategy_class):
    trainer = SimpleNamespace(strategy=object.__new__(strategy_class), precision="32-true")
    assert _lightning.check_trainer(trainer, "Callback") is None


@pytest.mark.parametrize("callback", [regularization(), CompressionMonitor()], ids=lambda c: type(c).__name__)
def test_unsupported_strategy_is_refused_before_the_first_step(tmp_path, monkeypatch, callback):
    """With the single device taken off the list of supported strategies."""
    monkeypatch.setattr(_lightning, "_STRATEGIES", ("DDPStrategy",))
    way_out = r"does not support the strategy SingleDeviceStrategy:.*Use a single device, strategy='ddp'"
    refused(tmp_path, MisconfigurationException, way_out, callback)


def test_unsupported_strategy_is_no_matter_where_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(_lightning, "_STRATEGIES", ("DDPStrategy",))
    trainer = make_trainer(tmp_path, [regularization(), CompressionMonitor()])
    metrics = trainer.validate(ValidatedRegression(), loader(), verbose=False)
    assert metrics[0]["validation_loss"] > 0


class OddPrecision(Precision):
    """A precision that nobody has tested."""

    precision = "transformer-engine"


@pytest.mark.parametrize("callback", [regularization(), CompressionMonitor()], ids=lambda c: type(c).__name__)
def test_unsupported_precision_is_refused(tmp_path, callback):
    way_out = r"does not support precision='transformer-engine' yet\. Use one of '32-true', '16-mixed'"
    refused(tmp_path, MisconfigurationException, way_out, callback, plugins=[OddPrecision()])


# -- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"include": ["net.0.wieght"]}, {"exclude": ["net.0.wieght"]}, {"strength": {"net.0.wieght": 0.1}}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_pattern_that_matches_nothing_is_refused_with_near_names(tmp_path, arguments):
    argument = next(iter(arguments))
    message = rf"`{argument}` must match the name of a parameter, .*'net\.0\.wieght'.*Near names: .*'net\.0\.weight'"
    refused(tmp_path, ValueError, message, regularization(**arguments))


def test_nothing_to_regularize_is_refused(tmp_path):
    message = r"nothing to regularize.*name others with `include`.*'net\.2\.bias'"
    refused(tmp_path, ValueError, message, regularization(exclude=["weight"]))


def test_module_of_vectors_only_is_refused(tmp_path):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, inputs):
            return (inputs * self.scale).sum(1, keepdim=True)

    refused(tmp_path, ValueError, r"`include`.*'net\.scale'", regularization(), Regression(Scale()))


def test_lazy_parameter_is_refused(tmp_path):
    model = Regression(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)))
    model.make_optimizer = lambda _: sgd(model.net[1].parameters())
    refused(tmp_path, ValueError, "Run one batch through the module first", regularization(), model)


def test_penalty_that_does_not_fit_is_refused(tmp_path):
    message = "`dim` must name a dimension.*Use dim=0"
    refused(tmp_path, ValueError, message, regularization(penalty=GroupLasso(dim=2)))


# -- warnings ------------------------------------------------------------------------------------------------------


def decaying(parameters):
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


@pytest.mark.parametrize("penalty", [L2(), ElasticNet(0.5)], ids=repr)
def test_weight_decay_on_top_of_l2_is_warned_of_once(tmp_path, penalty):
    with pytest.warns(UserWarning, match=r"weight_decay of its own on 2.*Set weight_decay=0") as caught:
        fit(tmp_path, Regression(make_optimizer=decaying), regularization(penalty=penalty), max_epochs=2)
    assert len([warning for warning in caught if "weight_decay" in str(warning.message)]) == 1


@pytest.mark.parametrize("penalty", [L1(), ElasticNet(1.0), GroupLasso()], ids=repr)
def test_weight_decay_is_no_matter_under_other_penalties(tmp_path, penalty, recwarn):
    fit(tmp_path, Regression(make_optimizer=decaying), regularization(penalty=penalty))
    assert not [warning for warning in recwarn if "weight_decay" in str(warning.message)]


def test_weight_decay_on_other_parameters_is_no_matter(tmp_path, recwarn):
    def make(parameters):
        weights, biases = [], []
        for parameter in parameters:
            (weights if parameter.dim() > 1 else biases).append(parameter)
        return torch.optim.SGD([{"params": weights}, {"params": biases, "weight_decay": 0.01}], lr=0.1)

    fit(tmp_path, Regression(make_optimizer=make), regularization(penalty="l2"))
    assert not [warning for warning in recwarn if "weight_decay" in str(warning.message)]


def test_optimizer_without_regularized_parameters_is_warned_of(tmp_path):
    model = Regression()
    model.make_optimizer = lambda _: sgd([model.net[0].bias])
    with pytest.warns(UserWarning, match=r"No optimizer holds .*'net\.0\.weight'.*`include` and `exclude`"):
        fit(tmp_path, model, regularization())


@pytest.mark.parametrize("aim", [{"strength": 0.1}, {"target_sparsity": 0.5, "strength": None}], ids=str)
def test_frozen_parameters_in_an_optimizer_are_warned_of(tmp_path, aim, recwarn):
    model = Regression()
    model.net[0].requires_grad_(False)
    callback = regularization(update="dual_averaging", include=[r"net\.0\.weight"], **aim)
    fit(tmp_path, model, callback)
    start, *ends = [str(warning.message) for warning in recwarn if "gcsr" in str(warning.message)]
    assert start.startswith("All parameters that 'gcsr' regularizes are frozen, 'net.0.weight' first")
    assert [end.rpartition(". ")[2] for end in ends] == ["Its parameters are frozen."] * ("target_sparsity" in aim)


DEAD = r"gcsr: at step 0 the weights of 'net\.0\.weight' have collapsed: their norm fell from 5\.66 to (0|\S+e-08)"


@pytest.mark.parametrize(("penalty", "update"), [("l2", "gradient"), ("l1", "proximal")])
def test_layers_that_die_are_warned_of_once_with_step_figures_and_a_way_out(tmp_path, penalty, update):
    """A step of L2 with lr·λ = 1 and a soft threshold above all weights both end at zero."""
    model = Regression(factors=dict.fromkeys(range(12), 0.0))
    with torch.no_grad():
        model.net[0].weight.copy_(model.net[0].weight.sign())  # its norm is √32
    callback = regularization(penalty=penalty, strength=10.0, gate=None, update=update)
    with pytest.warns(UserWarning, match=DEAD + ".*Use a smaller strength than 10") as caught:
        fit(tmp_path, model, callback, max_epochs=2)
    assert len([warning for warning in caught if "have collapsed" in str(warning.message)]) == 1
    assert float(weights_of(model)["net.0.weight"].norm()) < 1e-6


def test_layer_that_dies_later_is_warned_of_later(tmp_path):
    class DiesInTurn(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            with torch.no_grad():
                if batch_idx in (1, 3):
                    self.net[batch_idx - 1].weight.zero_()

    model = DiesInTurn()
    model.make_optimizer = lambda _: sgd([model.net[0].bias, model.net[2].weight])
    model.net[2].weight.register_hook(torch.zeros_like)
    with pytest.warns(UserWarning, match="have collapsed") as caught:
        fit(tmp_path, model, regularization(strength=1e-12))
    messages = [str(warning.message) for warning in caught if "have collapsed" in str(warning.message)]
    assert len(messages) == 2
    assert "at step 1 the weights of 'net.0.weight'" in messages[0]
    assert "at step 3 the weights of 'net.2.weight'" in messages[1]


def test_layer_that_shrinks_but_lives_is_not_warned_of(tmp_path, recwarn):
    class Shrinks(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if self.training_steps == 0:
                with torch.no_grad():
                    self.net[0].weight *= 1e-5

    model = Shrinks()
    model.make_optimizer = lambda _: sgd(model.net[2].parameters())
    fit(tmp_path, model, regularization())
    assert float(weights_of(model)["net.0.weight"].norm()) < 1e-3
    assert not [warning for warning in recwarn if "collapsed" in str(warning.message)]


def test_collapse_is_warned_of_where_the_fit_is_shorter_than_the_logging_cadence(tmp_path):
    callback = regularization(strength=10.0, gate=None, update="proximal")
    with pytest.warns(UserWarning, match="have collapsed"):
        fit(tmp_path, Regression(), callback, log_every_n_steps=50)
