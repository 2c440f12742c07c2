"""One run: the same for the same seed, and measured as it says."""

import copy
import dataclasses
import logging
from typing import Any

import pytest
import torch
import training
from batches import Dataset
from methods import Method
from problems import Problem
from torch import Tensor, nn
from training import Outcome, measure, train

from lightning_gcsr import Sparsity, module_bytes

PROBLEM = Problem("digits", "deep_mlp", epochs=2, lr=0.02, batch_size=64)
PLAIN = Method("plain", penalty="l1", strength=0.01, update="proximal")
COHERENT = Method("coherent", penalty="l1", strength=0.05, update="gradient", coherence="agreement", scope="element")


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Lightning's and our own lines about each run are not what is tested."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def results(outcome: Outcome) -> dict[str, Any]:
    """All but the time it took."""
    return {name: value for name, value in dataclasses.asdict(outcome).items() if name != "seconds"}


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        PLAIN,
        COHERENT,
        Method("cautious_weight_decay", strength=0.01),
        Method("magnitude_pruning", compression=10),
        Method("linearized_bregman", strength=0.1, initial_density=0.2),
        dataclasses.replace(PLAIN, polish=0.3, warmup=0.2),
    ],
    ids=lambda method: method.title,
)
def test_seed_decides_the_outcome(method: Method, digits: Dataset) -> None:
    problem = dataclasses.replace(PROBLEM, augment="crop")
    first = train(problem, method, 3, digits)
    torch.manual_seed(12345)
    torch.rand(7)
    assert results(train(problem, method, 3, digits)) == results(first)
    assert results(train(problem, method, 4, digits)) != results(first)
    assert first.seconds > 0


@pytest.mark.parametrize("update", ["proximal", "gradient"])
def test_no_method_is_plain_at_strength_zero(update: str, digits: Dataset) -> None:
    none = results(train(PROBLEM, Method(), 0, digits))
    zero = results(train(PROBLEM, Method("plain", penalty="l1", strength=0, update=update), 0, digits))
    assert none == zero
    weak = results(train(PROBLEM, Method("plain", penalty="l1", strength=0.01, update=update), 0, digits))
    assert none != weak


def test_networks_of_one_seed_start_alike_whatever_the_method(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    make = training.make_network

    def recorded(*arguments: Any) -> nn.Module:
        network = make(*arguments)
        starts.append(torch.cat([parameter.detach().flatten().clone() for parameter in network.parameters()]))
        return network

    monkeypatch.setattr(training, "make_network", recorded)
    for method in (Method(), PLAIN, COHERENT):
        train(dataclasses.replace(PROBLEM, epochs=1), method, 0, digits)
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def recount(network: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and loss, an image after the other."""
    scores = [network(image[None])[0] for image in data[0]]
    right = sum(int(score.argmax() == label) for score, label in zip(scores, data[1], strict=True))
    losses = [-float(score.log_softmax(0)[label]) for score, label in zip(scores, data[1], strict=True)]
    return right / len(losses), sum(losses) / len(losses)


@pytest.mark.parametrize(
    "method",
    [PLAIN, Method("magnitude_pruning", compression=1.2), Method("spred", strength=0.1, cut=0.05)],
    ids=["plain", "pruning", "spred"],
)
def test_outcome_is_what_a_recount_finds(method: Method, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[nn.Module] = []

    def measure_a_copy(network: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
        measured.append(copy.deepcopy(network))
        return measure(network, data)

    monkeypatch.setattr(training, "measure", measure_a_copy)
    outcome = train(PROBLEM, method, 0, digits)
    network = measured[0]
    weights = {name: p for name, p in network.named_parameters() if name.endswith("weight")}
    assert outcome.weights == 64 * 128 + 6 * 128 * 128 + 128 * 10 == sum(p.numel() for p in weights.values())
    # Zeros are exact: what a user sees as `sparsity/model`.
    assert outcome.nonzeros == sum(int((p != 0).sum()) for p in weights.values()) < outcome.weights
    assert 1 - outcome.nonzeros / outcome.weights == pytest.approx(float(Sparsity()(network)))
    with torch.no_grad():
        accuracy, loss = recount(network, digits.validation)
        assert (outcome.validation_accuracy, outcome.validation_loss) == (accuracy, pytest.approx(loss, rel=1e-4))
        accuracy, loss = recount(network, digits.test)
        assert (outcome.test_accuracy, outcome.test_loss) == (accuracy, pytest.approx(loss, rel=1e-4))
    assert (outcome.dense_bytes, outcome.stored_bytes) == tuple(module_bytes(network))
    assert outcome.stored_bytes < outcome.dense_bytes
    assert outcome.train_images == 1_118
    assert outcome.classes == 10


@pytest.mark.filterwarnings("ignore:.*have collapsed:UserWarning")
def test_training_learns_and_strength_kills(digits: Dataset) -> None:
    assert train(dataclasses.replace(PROBLEM, epochs=3), Method(), 0, digits).test_accuracy > 0.85
    dead = train(PROBLEM, dataclasses.replace(PLAIN, strength=1.0), 0, digits)
    assert dead.nonzeros == 0
    assert dead.test_accuracy < 0.2


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmented_training_is_another(augment: str, digits: Dataset) -> None:
    plain = train(PROBLEM, Method(), 0, digits)
    augmented = train(dataclasses.replace(PROBLEM, augment=augment), Method(), 0, digits)
    assert results(augmented) != results(plain)
    assert augmented.train_loss > plain.train_loss


def test_networks_with_batch_norm_and_dropout_are_measured_as_they_are_used(digits: Dataset) -> None:
    problem = Problem("digits", "resnet_20", epochs=1, lr=0.1)
    first, second = (train(problem, PLAIN, 0, digits) for _ in range(2))
    assert results(first) == results(second)
    assert first.weights == 9 * 16 + 3 * 2 * 9 * 16**2 + 9 * 16 * 32 + 5 * 9 * 32**2 + 16 * 32 + 9 * 32 * 64 + (
        5 * 9 * 64**2 + 32 * 64 + 64 * 10
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "digit"}, r"`data` must be one of .*Did you mean 'digits'"),
        ({"network": "mlp"}, r"`network` must be one of .*'lenet_5'"),
        ({"epochs": 0}, r"`epochs` must be an integer of at least 1, got epochs=0"),
        ({"epochs": 2.5}, r"`epochs` must .* got epochs=2\.5"),
        ({"batch_size": 0}, r"`batch_size` must .* got batch_size=0"),
        ({"lr": -0.1}, r"`lr` must .* got lr=-0\.1"),
        ({"lr": "1e-2"}, r"`lr` must .* got lr='1e-2'"),
        ({"momentum": 1.5}, r"`momentum` must .* got momentum=1\.5"),
        ({"augment": "flip"}, r"`augment` must be one of None, 'crop', 'crop_flip', got augment='flip'"),
        ({"train_images": 0}, r"`train_images` must .* got train_images=0"),
        ({"optimizer": "adam"}, r"`optimizer` must be one of 'sgd', 'adamw', got optimizer='adam'"),
        ({"weight_decay": -1}, r"`weight_decay` must .* got weight_decay=-1"),
        ({"lr_warmup": -1}, r"`lr_warmup` must .* got lr_warmup=-1"),
        ({"data": "text"}, r"`network` must be one for text with data='text', got network='deep_mlp'"),
        ({"network": "character_transformer"}, r"`network` must be one for images with data='digits', got network="),
    ],
)
def test_bad_problem_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(PROBLEM, **change)


def test_learning_rate_rises_and_falls_to_zero() -> None:
    problem = dataclasses.replace(PROBLEM, lr_warmup=4)
    factors = [problem.lr_factor(step, 14) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.5)
    assert factors[14] == pytest.approx(0.0)
    assert dataclasses.replace(PROBLEM, lr_warmup=0).lr_factor(0, 10) == 1


def test_adamw_is_another_training(digits: Dataset) -> None:
    adamw = dataclasses.replace(PROBLEM, optimizer="adamw", lr=0.002, epochs=4)
    outcome = train(adamw, PLAIN, 0, digits)
    assert outcome.test_accuracy > 0.85
    assert outcome.nonzeros < outcome.weights
    assert results(outcome) != results(train(dataclasses.replace(adamw, weight_decay=0.5), PLAIN, 0, digits))
