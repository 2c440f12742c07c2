"""Modules of many kinds: compiled, lazy, parametrized, shared, recurrent, convolutional, sparse."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gcsr import CompressionMonitor, Gate, GradientCoherentRegularization

from .loops import train_by_hand
from .models import (
    FEATURES,
    THIS_STEP,
    MemoryLogger,
    Regression,
    adam,
    fit,
    largest_difference,
    loader,
    mlp,
    momentum,
    same,
    sgd,
    steps_of,
    weights_of,
)

UPDATES = pytest.mark.parametrize("update", ["gradient", "proximal"])
TRANSPOSED = pytest.mark.filterwarnings("ignore:.*dimension 0 are the inputs there:UserWarning")
"""For a group lasso that meets a transposed convolution on purpose."""
VANISHING = dict.fromkeys(range(100), 0.0)


def regularization(update="gradient", **kwargs):
    return GradientCoherentRegularization(**({"strength": 0.05} | kwargs), update=update)


def names(callback):
    return list(callback.regularizer.parameters)


def moved_by_the_penalty(tmp_path, net, update, make_optimizer=sgd, steps=4):
    """Train with a vanishing loss and assert that each regularized weight moved by lr·λ a step; return their names."""
    start = weights_of(net)
    model, callback = Regression(net, make_optimizer, factors=VANISHING), regularization(update, gate=None)
    fit(tmp_path, model, callback)
    regularized = [name.removeprefix("net.") for name in names(callback)]
    assert steps_of(callback) == steps
    for name, weight in weights_of(net).items():
        if name not in regularized:
            assert torch.equal(weight, start[name])
            continue
        expected = start[name]
        for _ in range(steps):
            step = 0.1 * 0.05 * expected.sign()
            expected = (
                torch.where(expected.abs() < 0.005, 0.0, expected - step) if update == "proximal" else expected - step
            )
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
    return regularized


def large(net):
    """Move every weight away from zero, so that a few steps of 0.005 do not reach it."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.where(parameter < 0, -1.0, 1.0)
    return net


# -- compiled ------------------------------------------------------------------------------------------------------


def eager(module):
    """Compiled as far as torch's tracing goes, which needs no C++ compiler."""
    return torch.compile(module, backend="eager")


def trained(tmp_path, net, update, **kwargs):
    model, callback, logger = Regression(net, momentum), regularization(update, log_per_parameter=True), MemoryLogger()
    fit(tmp_path, model, callback, logger=logger, max_epochs=2, **kwargs)
    return weights_of(model), callback, logger


def plain_names(weights):
    return {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}


@UPDATES
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracing looks at it
def test_compiled_module_trains_as_the_plain_one(tmp_path, update):
    expected, _, expected_log = trained(tmp_path, mlp(), update)
    model, callback, logger = (
        Regression(mlp(), momentum),
        regularization(update, log_per_parameter=True),
        MemoryLogger(),
    )
    torch._dynamo.reset()
    fit(tmp_path, eager(model), [callback, CompressionMonitor()], logger=logger, max_epochs=2)
    assert names(callback) == ["net.0.weight", "net.2.weight"]
    assert steps_of(callback) == 8
    assert largest_difference(weights_of(model), expected) < 1e-6
    assert {key for key in logger.logged if key.startswith("gcsr/")} == {
        key for key in expected_log.logged if key.startswith("gcsr/")
    }
    assert logger.values("gcsr/injected") == pytest.approx(expected_log.values("gcsr/injected"))
    assert "sparsity/parameter/net.0.weight" in logger.logged


@UPDATES
@pytest.mark.parametrize("part", ["all", "first"])
def test_compiled_submodule_trains_as_the_plain_one(tmp_path, update, part):
    expected, _, expected_log = trained(tmp_path, mlp(), update)
    torch._dynamo.reset()
    net = mlp()
    compiled = eager(net) if part == "all" else nn.Sequential(eager(net[0]), net[1], net[2])
    weights, callback, logger = trained(tmp_path, compiled, update)
    assert any("_orig_mod" in name for name in weights)
    assert names(callback) == ["net.0.weight", "net.2.weight"]
    assert largest_difference(plain_names(weights), expected) < 1e-6
    assert logger.logged == expected_log.logged
    assert logger.values("gcsr/coherence/net.0.weight") == pytest.approx(
        expected_log.values("gcsr/coherence/net.0.weight"), abs=1e-5
    )


def test_submodule_compiled_in_place_and_patterns_by_its_plain_name(tmp_path):
    torch._dynamo.reset()
    net = nn.Sequential(eager(mlp()[0]), nn.Tanh(), nn.Linear(8, 1))
    model, callback = Regression(net), regularization(include=[r"^net\.0\.weight$"], strength={r"^net\.0\.": 0.2})
    fit(tmp_path, model, callback)
    assert names(callback) == ["net.0.weight"]
    assert steps_of(callback) == 4


# -- lazy ----------------------------------------------------------------------------------------------------------


def lazy_net():
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))


def fill(net):
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), mlp().parameters(), strict=True):
            parameter.copy_(weight)


class InitializedInTime(Regression):
    """Runs its lazy layers once in the hook that Lightning has for making layers."""

    def configure_model(self):
        if nn.parameter.is_lazy(self.net[0].weight):
            self.net(torch.zeros(1, FEATURES))
            fill(self.net)


@UPDATES
@pytest.mark.parametrize("when", ["before", "configure_model"])
def test_lazy_module_that_ran_once_trains_as_the_plain_one(tmp_path, update, when):
    net = lazy_net()
    if when == "before":
        net(torch.zeros(1, FEATURES))
        fill(net)
    model, callback = InitializedInTime(net, momentum), regularization(update)
    fit(tmp_path, model, callback, max_epochs=2)
    assert names(callback) == ["net.0.weight", "net.2.weight"]
    assert same(weights_of(model), trained(tmp_path, mlp(), update)[0])


# -- parametrized --------------------------------------------------------------------------------------------------


def test_weight_norm_regularizes_the_tensors_it_trains(tmp_path):
    """These are the norms of the rows and their directions; the product of the two is not a parameter."""
    update = "gradient"
    net = large(nn.Sequential(parametrizations.weight_norm(nn.Linear(FEATURES, 8)), nn.Tanh(), nn.Linear(8, 1)))
    regularized = moved_by_the_penalty(tmp_path, net, update)
    original = "0.parametrizations.weight.original"
    assert regularized == [f"{original}1", "2.weight"]  # not the norms of the rows
    assert net[0].parametrizations.weight.original0.shape == (8, 1)


def test_directions_of_weight_norm_can_be_left_out(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(parametrizations.weight_norm(nn.Linear(FEATURES, 8)), nn.Tanh(), nn.Linear(8, 1))
    callback = regularization("proximal", strength=0.8, include=["original0"], **THIS_STEP)
    model, start = Regression(net), net[0].weight.detach().clone()
    fit(tmp_path, model, callback, max_epochs=5)
    norms = net[0].parametrizations.weight.original0.detach().flatten()
    assert (norms == 0).any()
    # A row whose norm is zero is a zero row of the weight.
    assert torch.equal((net[0].weight == 0).all(1), norms == 0)
    assert not torch.equal(start, net[0].weight.detach())


# -- shared and frozen ---------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = self.first
        self.head = nn.Linear(FEATURES, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs):
        return self.head(self.second(self.first(inputs).tanh()).tanh())


@UPDATES
def test_shared_layer_is_regularized_once(tmp_path, update):
    assert moved_by_the_penalty(tmp_path, large(Twice()), update) == ["first.weight", "head.weight"]


@UPDATES
def test_shared_layer_gives_the_weights_of_a_plain_loop(tmp_path, update):
    model = Regression(Twice())
    fit(tmp_path, model, regularization(update, include=["second.weight"], **THIS_STEP))
    net = Twice()
    train_by_hand(net, loader(), strength=0.05, update=update, include=["first.weight"])
    assert same(weights_of(model.net), weights_of(net))


@UPDATES
@pytest.mark.parametrize("given", ["all", "trainable"])
def test_layer_that_is_frozen_from_the_start_is_neither_shrunk_nor_measured(tmp_path, update, given):
    def trainable(parameters):
        return sgd([parameter for parameter in parameters if given == "all" or parameter.requires_grad])

    net, logger = mlp(), MemoryLogger()
    net[0].requires_grad_(False)
    start = weights_of(net)
    model, callback = (
        Regression(net, trainable),
        regularization(update, gate=Gate(scope="model"), log_per_parameter=True),
    )
    fit(tmp_path, model, callback, logger=logger)
    assert torch.equal(net[0].weight, start["0.weight"])
    assert not torch.equal(net[2].weight, start["2.weight"])
    assert steps_of(callback) == 4
    assert logger.values("gcsr/coherence") == pytest.approx(logger.values("gcsr/coherence/net.2.weight"))
    assert "gcsr/coherence/net.0.weight" not in logger.logged


# -- attention, recurrence, convolutions ---------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, inputs):
        sequence = torch.stack([inputs, inputs.flip(1), -inputs], 1)
        attended, _ = self.attention(sequence, sequence, sequence, need_weights=False)
        return self.head(self.norm(attended + sequence).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, inputs):
        outputs, _ = self.lstm(inputs.unsqueeze(2))
        return self.head(outputs[:, -1])


class Convolutions(nn.Module):
    """Up and down again, on a small picture made of the features; with a group for each channel in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 8, 3, groups=4)
        self.down = nn.Conv2d(8, 1, 2)

    def forward(self, inputs):
        picture = torch.stack([inputs, inputs.flip(1)], 1).reshape(-1, 2, 2, 2)
        picture = picture.contiguous(memory_format=self.memory_format)
        return self.down(self.grouped(self.norm(self.up(picture)).tanh())).flatten(1)

    memory_format = torch.contiguous_format


def made(module_class, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return large(module_class())


NETS = {
    Attention: ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"],
    Recurrent: [f"lstm.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")] + ["head.weight"],
    Convolutions: ["up.weight", "grouped.weight", "down.weight"],
}


@UPDATES
@pytest.mark.parametrize("module_class", NETS)
def test_weights_of_every_layer_are_regularized_and_nothing_else(tmp_path, module_class, update):
    assert moved_by_the_penalty(tmp_path, made(module_class), update) == NETS[module_class]


@UPDATES
@TRANSPOSED
@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize("penalty", ["l1", "group_lasso"])
@pytest.mark.parametrize("module_class", NETS)
def test_every_layer_gives_the_weights_of_a_plain_loop(tmp_path, module_class, penalty, make_optimizer, update):
    arguments = {"penalty": penalty, "strength": 0.02, "strength_scale": "fan_in", "update": update}
    model = Regression(made(module_class), make_optimizer)
    fit(tmp_path, model, GradientCoherentRegularization(**arguments, **THIS_STEP), max_epochs=2)
    net = made(module_class)
    train_by_hand(net, [*loader(), *loader()], make_optimizer, **arguments)
    assert same(weights_of(model.net), weights_of(net))


@UPDATES
@TRANSPOSED
@pytest.mark.parametrize("penalty", ["l1", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("decision", [{}, {"gate": Gate("temporal", scope="parameter")}], ids=["element", "temporal"])
def test_channels_last_gives_the_weights_of_contiguous_ones(tmp_path, penalty, decision, update):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = made(Convolutions).to(memory_format=memory_format)
        net.memory_format = memory_format
        start, logger, model = weights_of(net), MemoryLogger(), Regression(net, momentum)
        fit(tmp_path, model, regularization(update, penalty=penalty, **decision), logger=logger, max_epochs=2)
        assert net.up.weight.is_contiguous(memory_format=memory_format)
        results.append((weights_of(net), logger.values("gcsr/coherence"), logger.values("gcsr/injected")))
    (contiguous, coherence, injected), (last, last_coherence, last_injected) = results
    assert largest_difference(contiguous, last) < 1e-5
    assert largest_difference(contiguous, start) > 1e-2
    assert last_coherence == pytest.approx(coherence, abs=1e-5)
    assert last_injected == pytest.approx(injected)
    assert 0 < sum(injected) < 8


# -- sparse gradients ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding with sparse gradients, of which the batches touch the first rows only, read out by fixed numbers."""

    def __init__(self, sparse=True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(10, 3, sparse=sparse)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(10, 3, generator=generator))
        self.register_buffer("readout", torch.randn(3, 1, generator=generator))

    def forward(self, inputs):
        words = (inputs.abs() * 2).long().clamp_max(5)
        return (self.embedding(words).mean(1) @ self.readout).tanh()


def sparse_adam(parameters):
    return torch.optim.SparseAdam(list(parameters), lr=0.1)


@UPDATES
@pytest.mark.parametrize("make_optimizer", [sgd, sparse_adam])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sparse_embedding_trains_as_in_a_plain_loop(tmp_path, make_optimizer, update, accumulate):
    arguments = {"strength": 0.05, "update": update, "gate": Gate("direction", scope="parameter")}
    logger, model = MemoryLogger(), Regression(Words(), make_optimizer)
    callback = GradientCoherentRegularization(**arguments)
    fit(tmp_path, model, callback, logger=logger, max_epochs=2, accumulate_grad_batches=accumulate)
    assert steps_of(callback) == 8 // accumulate
    assert model.net.embedding.weight.grad.is_sparse
    net = Words()
    train_by_hand(net, [*loader(), *loader()], make_optimizer, accumulate=accumulate, **arguments)
    assert same(weights_of(model.net), weights_of(net))
    untouched = Words().embedding.weight[6:]
    assert torch.equal(model.net.embedding.weight[6:], untouched)
    assert any(value > 0 for value in logger.values("gcsr/injected"))


@UPDATES
def test_penalty_of_a_sparse_embedding_reaches_the_touched_rows(tmp_path, update):
    """The loss vanishes, and of four batches every one touches some of the rows."""
    model, callback = Regression(Words(), sgd, factors=VANISHING), regularization(update, gate=None)
    start = weights_of(model.net)["embedding.weight"]
    fit(tmp_path, model, callback)
    touched = torch.zeros(10)
    for inputs, _ in loader():
        touched[(inputs.abs() * 2).long().clamp_max(5).unique()] += 1
    assert 0 < int((touched == 4).sum()) < 6 <= int((touched > 0).sum()) + 1
    expected = start - 0.1 * 0.05 * touched[:, None] * start.sign()
    torch.testing.assert_close(model.net.embedding.weight.detach(), expected, rtol=1e-4, atol=1e-6)
