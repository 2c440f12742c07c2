"""Small modules, data and helpers that the integration tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_gcsr import Gate, GradientCoherentRegularization, Schedule

FEATURES = 4

THIS_STEP: dict[str, Any] = {"gate": Gate(tolerance=0.0, averaging=0.0), "schedule": Schedule(warmup=0)}
"""The default gate on this step's gradient alone."""


def gate_of(coherence: Any, **arguments: Any) -> Gate | None:
    """A gate, or none where the coherence is ``None``."""
    return None if coherence is None else Gate(coherence, **arguments)


MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Plain SGD, under which the effect of a penalty can be told by hand."""
    return SGD(parameters, lr=0.1)


def momentum(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD with a state of its own."""
    return SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Adam, an adaptive optimizer."""
    return torch.optim.Adam(parameters, lr=0.01)


def mlp(seed: int = 0, hidden: int = 8) -> nn.Sequential:
    """The same small network for the same seed, whatever the random state is; no weight is within 0.05 of zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * parameter.sign()
    return net


def samples(count: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """A regression that is not solved within a few steps; fewer samples are the first of more."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(64, FEATURES + 1, generator=generator, dtype=torch.float64)[:count]
    inputs, noise = numbers[:, :FEATURES], numbers[:, FEATURES:]
    targets = inputs.sum(1, keepdim=True).sin() + 0.3 * noise
    return TensorDataset(inputs.to(dtype), targets.to(dtype))


def loader(count: int = 16, batch_size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    """The same batches in the same order, every epoch."""
    return DataLoader(samples(count, seed, dtype), batch_size=batch_size)


class Stream(IterableDataset[Any]):
    """The same samples as an iterable that does not know its length."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[i] for i in range(len(self.dataset)))


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on within an epoch after a resume, as Lightning asks of one."""

    position = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.position = self.position % len(self), 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.position = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Regression(LightningModule):
    """A regression that can be told to return ``None`` or a spoilt loss for some of its batches.

    Args:
        net: The network; a small perceptron if left out.
        make_optimizer: Makes the optimizer from the parameters.
        none_at: The batch indices at which ``training_step`` returns ``None``.
        factors: What the loss is multiplied by, by the number of the training step over the whole fit.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        make_optimizer: MakeOptimizer = sgd,
        none_at: Iterable[int] = (),
        factors: dict[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.make_optimizer = make_optimizer
        self.none_at = set(none_at)
        self.factors = factors or {}
        self.training_steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def loss(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        self.training_steps += 1
        if batch_idx in self.none_at:
            return None
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss * self.factors.get(self.training_steps - 1, 1.0)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class ValidatedRegression(Regression):
    """The same with a validation loop."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validation_loss", self.loss(batch))


class Elementwise(nn.Module):
    """A linear layer out of products and sums, which autocast leaves in float32: loss scales are exact in it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, FEATURES, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs[:, None, :] * self.weight).sum((1, 2)).unsqueeze(1)


class ManualRegression(Regression):
    """Steps by hand after every few batches."""

    def __init__(self, every: int = 1, offset: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.every, self.offset = every, offset

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_steps += 1
        loss = self.loss(batch)
        self.log("loss", loss)
        self.manual_backward(loss / self.every)
        if (batch_idx + self.offset) % self.every == self.every - 1:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class RawRegression(ManualRegression):
    """Goes behind Lightning's back: a raw backward and a raw optimizer."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_steps += 1
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class Adversaries(LightningModule):
    """Two networks with an optimizer each, where the loss of the first reaches the second, as in a GAN.

    Args:
        toggle: Whether the optimizers are toggled; without it both networks hold gradients at every step.
        every: After how many batches each of the two steps.
        offsets: At which batch of these it does so.
    """

    def __init__(self, toggle: bool, every: tuple[int, int] = (1, 1), offsets: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(FEATURES, FEATURES)
        self.critic = nn.Linear(FEATURES, 1)
        for i, layer in enumerate((self.generator, self.critic)):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(i))
            nn.init.zeros_(layer.bias)
        self.toggle, self.every, self.offsets = toggle, every, offsets
        self.gradients: list[tuple[int, Tensor, Tensor]] = []
        """For each step the index of its optimizer, and the weight and the gradient of its network before it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, _ = batch
        for index, (network, optimizer) in enumerate(
            zip((self.generator, self.critic), self.optimizers(), strict=True)
        ):
            if batch_idx % self.every[index] != self.offsets[index]:
                continue
            if self.toggle:
                self.toggle_optimizer(optimizer)
            score = self.critic(self.generator(inputs)).mean()
            loss = -score if index == 0 else score - self.critic(inputs).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.gradients.append((index, network.weight.detach().clone(), network.weight.grad.clone()))
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[Optimizer]:
        return [sgd(self.generator.parameters()), sgd(self.critic.parameters())]


class MemoryLogger(Logger):
    """Keeps what it gets as it is, with the step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        pass

    def steps(self, key: str) -> list[int]:
        return [step for step, metrics in self.rows if key in metrics]

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.rows if key in metrics]

    @property
    def logged(self) -> set[str]:
        """All keys that were logged."""
        return {key for _, metrics in self.rows for key in metrics}


class Snapshots(Callback):
    """Keeps the weights after every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append(weights_of(pl_module))


def make_trainer(path: Path, callbacks: Iterable[Callback] = (), **kwargs: Any) -> Trainer:
    """A quiet Trainer on the CPU for one epoch, that logs every step if it logs."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": path,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | kwargs))


def scaled(init_scale: float = 1024.0) -> MixedPrecision:
    """Mixed precision with a loss scale, on the CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


def fit(
    path: Path,
    model: LightningModule,
    callback: Callback | Iterable[Callback] | None = None,
    data: Iterable[Any] | None = None,
    **kwargs: Any,
) -> Trainer:
    """Fit the model and return the Trainer."""
    callbacks = [] if callback is None else [callback] if isinstance(callback, Callback) else list(callback)
    trainer = make_trainer(path, callbacks, **kwargs)
    trainer.fit(model, loader() if data is None else data)
    return trainer


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def steps_of(callback: GradientCoherentRegularization) -> int:
    """The number of decisions the callback made in its fit, with one optimizer."""
    assert callback.regularizer is not None
    return sum(callback.regularizer.state_dict()["steps"].values())
