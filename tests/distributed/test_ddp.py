"""Two processes with different data make the decisions and the weights of one with all of it."""

import csv

import pytest
from integration.models import MemoryLogger, Regression, fit, largest_difference, mlp, momentum, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gcsr import GradientCoherentRegularization

from .workers import DECISIONS, EPOCHS, RESUMED, RUNS, WORLD, batches_of, train

pytestmark = [
    pytest.mark.distributed,
    # Twelve steps are too few to arrive; what matters is that all miss by the same.
    pytest.mark.filterwarnings(r"ignore:gcsr. \d+\.\d % of the (weights|groups) are zero at the end:UserWarning"),
]

STEPS = 6 * EPOCHS


@pytest.fixture
def found(processes):
    """The results of each process for every run."""
    return [process["all_runs"] for process in processes]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_result_of_one(tmp_path, found, name):
    alone = train(tmp_path, {key: value for key, value in RUNS[name].items() if key != "static_graph"})
    steps = STEPS // RUNS[name].get("accumulate", 1)
    assert alone["steps"] == {"net.0.weight": steps}
    for process in found:
        assert process[name]["steps"] == alone["steps"]
        assert largest_difference(process[name]["weights"], alone["weights"]) < 1e-12
        assert process[name]["log"].keys() == alone["log"].keys()
        for key, values in alone["log"].items():
            assert len(values) == steps
            assert process[name]["log"][key] == pytest.approx(values, rel=0, abs=1e-7)
    injected = alone["log"]["gcsr/injected"]
    if RUNS[name]["callback"]["gate"] is not None and "target" not in name:
        assert 0 < sum(injected) < steps  # the gate both opened and shut


@pytest.mark.parametrize("name", RUNS)
def test_all_processes_decide_alike_to_the_last_bit(found, name):
    first, second = (process[name] for process in found)
    assert first["log"] == second["log"]
    assert same(first["weights"], second["weights"])


def test_kept_zeros_are_those_of_one_process(tmp_path, found):
    """They are taken down halfway, and at the end they are zero still while no other weight is."""
    alone = train(tmp_path, RUNS["averaged, zeros kept"])
    zeros = {name: weight == 0 for name, weight in alone["weights"].items() if weight.dim() > 1}
    assert 0 < sum(int(zero.sum()) for zero in zeros.values()) < 40
    for process in (process["averaged, zeros kept"] for process in found):
        assert same(process["zeros"], alone["zeros"])
        assert same(process["zeros"], zeros)
        assert same({name: process["weights"][name] == 0 for name in zeros}, zeros)


def test_a_process_alone_would_decide_otherwise(tmp_path):
    """The data of the processes differ enough for the tests above to notice gradients that are not reduced."""
    whole = train(tmp_path, {"callback": DECISIONS["direction, model"]})["log"]["gcsr/coherence"]
    logger = MemoryLogger()
    model = Regression(net=mlp().double(), make_optimizer=momentum)
    callback = GradientCoherentRegularization(strength=0.05, **DECISIONS["direction, model"])
    fit(tmp_path, model, callback, batches_of(0, WORLD), precision="64-true", max_epochs=EPOCHS, logger=logger)
    differences = [abs(a - b) for a, b in zip(logger.values("gcsr/coherence"), whole, strict=True)]
    assert min(differences) > 1e-6


def test_numbers_are_logged_once_and_are_there_in_each_process(processes, folder):
    first, second = (process["logging"] for process in processes)
    assert first == second
    assert {"gcsr/injected", "sparsity/model", "sparsity/parameter/net.0.weight", "compression/ratio"} <= first.keys()
    assert first["sparsity/model"] > 0

    [path] = (folder / "logging").rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for key in ("gcsr/injected", "sparsity/model", "loss"):
        assert [int(row["step"]) for row in rows if row[key]] == list(range(1, STEPS, 2))
    last = [float(row["sparsity/model"]) for row in rows if row["sparsity/model"]][-1]
    assert last == pytest.approx(first["sparsity/model"])


def test_one_process_shows_what_all_of_them_know(processes, folder):
    first, second = (process["shown"] for process in processes)
    assert "weights are zero" in first["output"]
    assert "net.2.weight" in first["output"]
    assert second["output"] == ""
    assert first["summary"] == second["summary"]
    assert first["tables"].keys() == second["tables"].keys() >= {"sparsity", "gcsr/injected"}
    for key, table in first["tables"].items():
        assert table.shape == (2, STEPS) or key.startswith("plot/")
        assert same({key: table}, {key: second["tables"][key]})

    [path] = (folder / "shown").rglob("*tfevents*")
    events = EventAccumulator(str(path)).Reload()
    for key in ("layers/sparsity", "layers/gcsr/injected", "layers/weights"):
        assert [image.step for image in events.Images(key)][:2] == [5, 11]
    assert {"custom_scalars__config__", "summary/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("target")])
def test_a_target_makes_zeros(tmp_path, found, name):
    alone = train(tmp_path, RUNS[name])
    strengths = alone["log"]["gcsr/strength"]
    assert any(strengths)
    zeros = {key: weight == 0 for key, weight in alone["weights"].items() if weight.dim() > 1}
    assert 0 < sum(int(zero.sum()) for zero in zeros.values()) < 40
    for process in found:
        assert process[name]["log"]["gcsr/strength"] == pytest.approx(strengths, rel=1e-9)
        assert same({key: process[name]["weights"][key] == 0 for key in zeros}, zeros)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_gives_the_weights_of_the_uninterrupted_one(tmp_path, processes, name):
    """The delay ends after the resume, so the step count must have come along, to each process; so the strength."""
    alone = train(tmp_path, {"callback": RESUMED[name]})
    for process in (process["resumed"][name] for process in processes):
        assert process["steps"] == alone["steps"] == {"net.0.weight": STEPS}
        assert largest_difference(process["weights"], alone["weights"]) < 1e-12


@pytest.mark.parametrize(
    ("name", "file"), [("best", "best/epoch=0-step=6.safetensors"), ("last", "last/model.safetensors")]
)
def test_each_process_finds_the_compressed_file_with_the_weights(processes, folder, name, file):
    for process in (process["compressed"][name] for process in processes):
        assert process["path"] == str(folder / "compressed" / file)
        assert same(process["loaded"], process["weights"])
