"""On a CUDA device: mixed precision with a real loss scale, fused optimizers, and no synchronization in a step."""

import pytest
import torch

from lightning_gcsr import CoherentRegularizer, CompressionMonitor, Gate, GradientCoherentRegularization

from .models import THIS_STEP, MemoryLogger, Regression, loader, make_trainer, mlp, samples, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DECISIONS = [
    {"gate": Gate("direction", scope="model")},
    {"gate": Gate("agreement", scope="parameter")},
    {"gate": Gate("agreement", scope="element")},
    {"gate": Gate("agreement", scope="element", averaging=0.98, tolerance=0.1)},
    {"gate": Gate("temporal", scope="element")},
    {"gate": None},
]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_training_on_the_device_decides_and_stays_finite(tmp_path, precision, fused, update):
    logger = MemoryLogger()
    model = Regression(make_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=fused))
    callback = GradientCoherentRegularization(strength=0.05, update=update, **THIS_STEP)
    trainer = make_trainer(
        tmp_path,
        [callback, CompressionMonitor()],
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_epochs=5,
        logger=logger,
    )
    trainer.fit(model, loader())
    assert all(weight.isfinite().all() for weight in weights_of(model).values())
    injected = logger.values("gcsr/injected")
    assert len(injected) == 20
    assert 0 < sum(injected) < 20
    if update == "proximal":
        assert logger.values("sparsity/model")[-1] > 0


@pytest.mark.parametrize("decision", DECISIONS, ids=str)
@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_step_never_synchronizes_with_the_host(decision, penalty, update):
    net = mlp().cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    regularizer = CoherentRegularizer(net, penalty, strength=0.05, update=update, **decision)
    x, y = (tensor.cuda() for tensor in samples().tensors)
    scale = torch.full((), 1024.0, device="cuda")
    for _ in range(3):
        optimizer.zero_grad()
        (torch.nn.functional.mse_loss(net(x), y) * scale).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for wanted in (False, True):
                regularizer.before_step(optimizer, loss_scale=scale, report=wanted)
            regularizer.after_step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_device_gives_the_weights_of_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        net = mlp().double().to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        regularizer = CoherentRegularizer(net, strength=0.05, update="proximal")
        x, y = (tensor.to(device) for tensor in samples(dtype=torch.float64).tensors)
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            regularizer.before_step(optimizer)
            optimizer.step()
            regularizer.after_step(optimizer)
        results.append([parameter.detach().cpu() for parameter in net.parameters()])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-9, atol=1e-12)
