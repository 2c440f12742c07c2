"""The proximal update hangs on the optimizer only while it trains, however training ends."""

import signal

import pytest
import torch
from lightning.pytorch import Callback

from lightning_gcsr import GradientCoherentRegularization

from .models import Regression, fit, sgd, weights_of

LR, STRENGTH = 0.1, 0.01


class StoredOptimizer(Regression):
    """Hands out the same optimizer for every fit, and raises in a batch of the first fit if told to."""

    def __init__(self, error=None) -> None:
        super().__init__(factors=dict.fromkeys(range(100), 0.0))
        self.optimizer = sgd(self.parameters())
        self.error = error

    def training_step(self, batch, batch_idx):
        if self.error is not None and batch_idx == 2:
            error, self.error = self.error, None
            raise error
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return self.optimizer


@pytest.fixture
def restored_interrupt():
    """Lightning ignores further Ctrl+C after one; the tests that follow should not."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def proximal():
    return GradientCoherentRegularization(strength=STRENGTH, gate=None, update="proximal")


def hooks(model):
    return len(model.optimizer._optimizer_step_post_hooks)


def assert_shrunk_once_a_step(model, start, steps):
    """The loss gradient vanishes, so that every weight moves by steps·lr·λ, and stops at zero."""
    expected = (start.abs() - steps * LR * STRENGTH).clamp_min(0) * start.sign()
    torch.testing.assert_close(model.net[0].weight.detach(), expected, rtol=1e-4, atol=1e-7)


class CountHooks(Callback):
    """How many hooks the optimizer had at each batch."""

    def __init__(self) -> None:
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.counts.append(hooks(pl_module))


@pytest.mark.parametrize("same_callback", [True, False])
def test_second_fit_with_the_same_optimizer_shrinks_once_a_step(tmp_path, same_callback):
    model, callback, counter = StoredOptimizer(), proximal(), CountHooks()
    start = weights_of(model)["net.0.weight"]
    fit(tmp_path, model, [callback, counter])
    assert hooks(model) == 0
    fit(tmp_path, model, [callback if same_callback else proximal(), counter])
    assert hooks(model) == 0
    assert counter.counts == [1] * 8
    assert_shrunk_once_a_step(model, start, steps=8)


def test_second_fit_with_the_gradient_update_adds_no_hook(tmp_path):
    model, counter = StoredOptimizer(), CountHooks()
    start = weights_of(model)["net.0.weight"]
    callback = GradientCoherentRegularization(strength=STRENGTH, gate=None, update="gradient")
    fit(tmp_path, model, [callback, counter])
    fit(tmp_path, model, [callback, counter])
    assert counter.counts == [0] * 8
    torch.testing.assert_close(
        start - model.net[0].weight.detach(), 8 * LR * STRENGTH * start.sign(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("same_callback", [True, False])
def test_fit_after_an_exception_shrinks_once_a_step(tmp_path, same_callback):
    model, callback = StoredOptimizer(error=ValueError("spoilt batch")), proximal()
    start = weights_of(model)["net.0.weight"]
    with pytest.raises(ValueError, match="spoilt batch"):
        fit(tmp_path, model, callback)
    assert hooks(model) == 0
    assert_shrunk_once_a_step(model, start, steps=2)
    fit(tmp_path, model, callback if same_callback else proximal())
    assert hooks(model) == 0
    assert_shrunk_once_a_step(model, start, steps=6)


@pytest.mark.usefixtures("restored_interrupt")
@pytest.mark.parametrize("same_callback", [True, False])
def test_fit_after_an_interrupt_shrinks_once_a_step(tmp_path, same_callback):
    model, callback = StoredOptimizer(error=KeyboardInterrupt()), proximal()
    start = weights_of(model)["net.0.weight"]
    with pytest.raises(SystemExit):
        fit(tmp_path, model, callback)
    assert hooks(model) == 0
    fit(tmp_path, model, callback if same_callback else proximal())
    assert hooks(model) == 0
    assert_shrunk_once_a_step(model, start, steps=6)


class FailsAtStart(Callback):
    """Raises when ours has already prepared its work."""

    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("no luck")


def test_no_hook_stays_where_another_callback_fails_at_the_start(tmp_path):
    model = StoredOptimizer()
    with pytest.raises(RuntimeError, match="no luck"):
        fit(tmp_path, model, [proximal(), FailsAtStart()])
    assert hooks(model) == 0


def test_steps_after_the_fit_are_not_regularized(tmp_path):
    model = StoredOptimizer()
    fit(tmp_path, model, proximal())
    end = weights_of(model)
    model.optimizer.zero_grad()
    model.optimizer.step()
    torch.testing.assert_close(weights_of(model), end, rtol=0, atol=0)


def test_hooks_of_others_stay(tmp_path):
    model, calls = StoredOptimizer(), []
    model.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    fit(tmp_path, model, proximal())
    assert hooks(model) == 1
    assert len(calls) == 4
