"""Sharded weights, FSDP2 and tensor parallelism on four processes, give the result of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.models import largest_difference, same

from lightning_gcsr import Gate

from .sharded_workers import (
    LIGHTNING_MESHES,
    LIGHTNING_RUNS,
    MESHES,
    RESUMED,
    RUNS,
    STEPS,
    WORK,
    WORLD,
    fitted,
    loop,
    network,
    shown_by,
    trained,
)
from .workers import in_processes

pytestmark = [
    pytest.mark.distributed,
    # Twelve steps are too few to arrive; what matters is that all miss by the same.
    pytest.mark.filterwarnings(r"ignore:gcsr. \d+\.\d % of the weights are zero at the end:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def processes(folder: Path) -> list[dict[str, Any]]:
    return in_processes(folder, WORLD, WORK)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_loop_gives_the_result_of_one_process(processes, mesh, name):
    alone = loop(network(), 0, 1, **RUNS[name])
    for process in processes:
        found = process["loops"][mesh, name]
        assert largest_difference(found["weights"], alone["weights"]) < 1e-12
        for key in ("coherence", "injected", "grad_norm", "penalty_grad_norm", "by parameter", "penalty"):
            torch.testing.assert_close(
                torch.tensor(found[key]), torch.tensor(alone[key]), rtol=1e-6, atol=1e-7, equal_nan=True
            )
        assert found["norms"] == pytest.approx(alone["norms"])
        assert found["spans"] == pytest.approx(alone["spans"])
        for key in ("counts", "bytes", "sparsity"):
            assert found[key] == alone[key]


def test_the_runs_tell_open_gates_from_shut_ones():
    for name, kwargs in RUNS.items():
        injected = loop(network(), 0, 1, **kwargs)["injected"]
        if kwargs["gate"] is not None and "fan-in" not in name:
            assert 0 < sum(injected) < STEPS, name


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", RUNS)
def test_a_step_sends_once_and_once_more_for_a_report_or_where_averages_decide_together(processes, mesh, name):
    gate = RUNS[name]["gate"]
    together = gate is not None and not gate.by_element
    averages = gate is not None and (gate.averaging > 0 or gate.uses_previous_gradient)
    for process in processes:
        assert process["loops"][mesh, name]["sent"] == [1 if together and not averages else 2] * STEPS


def test_group_lasso_on_whole_groups_gives_the_result_of_one_process(processes):
    alone = loop(network(), 0, 1, penalty="group_lasso", gate=Gate(scope="parameter"))
    for process in processes:
        found = process["loops"]["FSDP2", "group lasso"]
        assert largest_difference(found["weights"], alone["weights"]) < 1e-12
        assert found["penalty"] == pytest.approx(alone["penalty"])


def test_groups_that_are_cut_apart_are_refused(processes):
    for process in processes:
        assert "`exclude`" in process["refusals"]["inputs"]
        assert "'0.weight', which is sharded along dimension 0" in process["refusals"]["inputs"]
        assert "'2.weight', which is sharded along dimension 1" in process["refusals"]["outputs"]


def test_penalty_of_a_replicated_parameter_with_sharded_input_is_added_once(processes):
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    x = torch.arange(24, dtype=torch.float64).view(8, 3) / 24
    (x @ weight.t()).square().sum().backward()
    expected = weight.grad + 0.5 * weight.detach().sign()
    for process in processes:
        found = process["replicated_parameter_with_sharded_input"]
        assert found["was partial"]
        torch.testing.assert_close(found["gradient"], expected)
        assert found["grad_norm"] == pytest.approx(float(weight.grad.norm()))


def test_a_gradient_that_is_not_finite_on_one_process_shuts_the_gates_of_all(processes):
    for process in processes:
        for found in process["nonfinite"].values():
            assert found["nonfinite_steps"] == 1
            assert not any(value for key, value in found.items() if key != "nonfinite_steps")


@pytest.mark.parametrize("name", LIGHTNING_RUNS)
def test_model_parallel_strategy_gives_the_result_of_one_process(tmp_path, processes, name):
    alone = trained(tmp_path, {}, 0, 1, **LIGHTNING_RUNS[name])
    first = processes[0]["through_lightning"][name]
    steps = 2 * STEPS // LIGHTNING_RUNS[name].get("accumulate", 1)
    for process in processes:
        found = process["through_lightning"][name]
        assert found["steps"] == alone["steps"] == {"net.0.weight": steps}
        assert largest_difference(found["weights"], alone["weights"]) < 1e-12
        assert found["log"].keys() == alone["log"].keys()
        for key, values in alone["log"].items():
            assert found["log"][key] == pytest.approx(values, rel=1e-6, abs=1e-7), key
        assert same(found["weights"], first["weights"])
        assert found["log"] == first["log"]


@pytest.mark.parametrize("mesh", LIGHTNING_MESHES)
def test_table_and_images_of_sharded_weights_are_those_of_one_process(tmp_path, processes, mesh):
    alone = shown_by(tmp_path, {}, 0, 1)
    assert 0 < float(alone["summary"][-1][3].rstrip("%")) < 100
    for rank, process in enumerate(processes):
        found = process["shown"][mesh]
        assert found["output"] == (alone["output"] if rank == 0 else "")
        assert found["summary"] == alone["summary"]
        assert found["counts"] == alone["counts"]
        assert found["tables"].keys() == alone["tables"].keys()
        assert same(found["tables"], alone["tables"])


def test_kept_zeros_of_sharded_weights_are_those_of_one_process(tmp_path, processes):
    """Exactly zero, and their number has not changed since the penalty stopped."""
    alone = trained(tmp_path, {}, 0, 1, **LIGHTNING_RUNS["averaged, zeros kept"])
    sparsity = alone["log"]["sparsity/model"]
    assert 0 < sparsity[STEPS - 1] < 1
    assert sparsity[STEPS - 1 :] == [sparsity[-1]] * (STEPS + 1)
    for process in processes:
        found = process["through_lightning"]["averaged, zeros kept"]["weights"]
        for name, weight in alone["weights"].items():
            assert torch.equal(found[name] == 0, weight == 0)


@pytest.mark.parametrize("name", [name for name in LIGHTNING_RUNS if name.startswith("target")])
def test_a_target_makes_zeros_of_sharded_weights(tmp_path, processes, name):
    alone = trained(tmp_path, {}, 0, 1, **LIGHTNING_RUNS[name])
    strengths = alone["log"]["gcsr/strength"]
    assert any(strengths)
    assert 0.2 < alone["log"]["sparsity/model"][-1] < 1
    for process in processes:
        found = process["through_lightning"][name]
        assert found["log"]["gcsr/strength"] == pytest.approx(strengths, rel=1e-9)
        for key, weight in alone["weights"].items():
            assert torch.equal(found["weights"][key] == 0, weight == 0)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_sharded_run_is_the_uninterrupted_one_bit_by_bit(processes, name):
    for process in processes:
        expected, found = (process["resumed"][name, run] for run in ("uninterrupted", "resumed"))
        assert 0 < sum(int((weight == 0).sum()) for weight in expected["weights"].values()) < 280
        assert same(found["weights"], expected["weights"])
        assert expected["kept"]
        assert same(found["kept"], expected["kept"])
        assert not found["anew"]


@pytest.mark.parametrize("name", ["averages", "in one file"])
def test_a_checkpoint_is_resumed_on_another_mesh(processes, name):
    for process in processes:
        expected, found = (process["resumed"][name, run] for run in ("uninterrupted", "sharded otherwise"))
        assert largest_difference(found["weights"], expected["weights"]) < 1e-12


def test_a_checkpoint_in_one_file_is_resumed_on_one_process(tmp_path, processes, folder):
    found = fitted(tmp_path, "in one file", {}, ckpt_path=folder / "resumed" / "in one file")
    expected = processes[0]["resumed"]["in one file", "uninterrupted"]
    assert largest_difference(found["weights"], expected["weights"]) < 1e-12


def test_a_checkpoint_that_knows_nothing_of_sharded_weights_warns(processes):
    for rank, process in enumerate(processes):
        messages = process["resumed"]["in one file", "forgotten"]["anew"]
        assert len(messages) == (rank == 0)
        assert all("'net.0.weight', 'net.2.weight', 'net.4.weight'" in message for message in messages)
