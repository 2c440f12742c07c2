"""Study files: the runs that they ask for, the keys of runs, and what is said of a file that is wrong."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from grid import Run, Study, StudyFileError, read_study
from methods import SETTINGS, Method
from networks import NETWORKS
from problems import Problem

from .conftest import STUDY

PROBLEM: dict[str, Any] = {"data": "digits", "network": "deep_mlp", "epochs": 2, "lr": 0.02}
PLAIN: dict[str, Any] = {"method": "plain", "penalty": "l1", "update": "proximal", "strength": 0.01}
CONTENT: dict[str, Any] = {"name": "tiny", "problems": [PROBLEM], "seeds": [0, 1], "methods": [{"method": "none"}]}


def read(folder: Path, **changes: Any) -> Study:
    """The study of this content, with some of it changed."""
    return read_text(folder, yaml.safe_dump(CONTENT | changes))


def read_text(folder: Path, text: str) -> Study:
    path = folder / "study.yaml"
    path.write_text(text)
    return read_study(path)


# -- the committed files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_studies_are_read(path: Path) -> None:
    study = read_study(path)
    assert study.name == path.stem
    keys = {run.key for run in study.runs}
    assert len(keys) == len(study.runs) > 10
    assert any(run.method.method == "none" for run in study.runs)
    for run in study.runs:
        assert Run.from_key(run.key) == run
    # Whatever is run, no penalty is run from the same seeds: gains are counted seed by seed.
    baselines = {(run.problem, run.seed) for run in study.runs if run.method.method == "none"}
    assert {(run.problem, run.seed) for run in study.runs} == baselines
    # What a study asks for is told apart for people, too.
    assert len({run.title for run in study.runs}) == len(study.runs)


# -- grids -----------------------------------------------------------------------------------------------------------


def test_lists_are_a_grid(tmp_path: Path) -> None:
    block = PLAIN | {"strength": [0.1, 0.2, 0.3], "update": ["proximal", "gradient"]}
    study = read(
        tmp_path, methods=[{"method": "none"}, block], problems=[PROBLEM, PROBLEM | {"network": "lenet_300_100"}]
    )
    assert study.name == "tiny"
    assert len(study.runs) == 2 * 2 * (1 + 6)
    found = {(r.problem.network, r.method.strength, r.method.update, r.seed) for r in study.runs}
    networks = ("deep_mlp", "lenet_300_100")
    wanted = set(itertools.product(networks, (0.1, 0.2, 0.3), ("proximal", "gradient"), (0, 1)))
    assert found == wanted | set(itertools.product(networks, (None,), (None,), (0, 1)))


def test_a_seed_comes_after_the_other(tmp_path: Path) -> None:
    study = read(tmp_path, seeds=[4, 2, 9], methods=[PLAIN | {"strength": [0.1, 0.2]}])
    assert [run.seed for run in study.runs] == [4, 4, 2, 2, 9, 9]


def test_a_method_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    study = read(tmp_path, seeds=[0, 1, 2], methods=[{"method": "none"}, PLAIN | {"seeds": [2, 0]}])
    found = [(run.method.method, run.seed) for run in study.runs]
    assert found == [("none", 0), ("plain", 0), ("none", 1), ("none", 2), ("plain", 2)]


def test_headline_names_methods_of_the_study(tmp_path: Path) -> None:
    title = Method(**PLAIN).title
    assert read(tmp_path, methods=[PLAIN], headline=[title]).headline == [title]
    with pytest.raises(
        StudyFileError, match=r"`headline` must be one of .*got headline='L1 plain proximl'\. Did you mean"
    ):
        read(tmp_path, methods=[PLAIN], headline=["L1 plain proximl"])


def test_repeats_are_one_run(tmp_path: Path) -> None:
    blocks = [
        PLAIN | {"strength": [0.1, 0.2]},
        PLAIN | {"strength": 0.2, "delay": 0.0},
        PLAIN | {"strength": [0.1, 0.1]},
    ]
    study = read(tmp_path, methods=blocks, seeds=[0, 1, 0], problems=[PROBLEM, PROBLEM | {"momentum": 0.9}])
    assert [(run.method.strength, run.seed) for run in study.runs] == [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)]


@pytest.mark.parametrize("networks", ["lenet_300_100", ["lenet_300_100"]])
def test_a_method_may_be_for_some_networks(networks: object, tmp_path: Path) -> None:
    problems = [PROBLEM, PROBLEM | {"network": "lenet_300_100"}]
    study = read(tmp_path, problems=problems, methods=[{"method": "none"}, PLAIN | {"networks": networks}], seeds=[0])
    found = [(run.problem.network, run.method.method) for run in study.runs]
    assert found == [("deep_mlp", "none"), ("lenet_300_100", "none"), ("lenet_300_100", "plain")]


@pytest.mark.parametrize("seeds", [3, 0])
def test_one_seed_needs_no_list(seeds: int, tmp_path: Path) -> None:
    assert [run.seed for run in read(tmp_path, seeds=seeds).runs] == [seeds]


# -- keys ------------------------------------------------------------------------------------------------------------


def test_key_is_the_same_with_defaults_spelled_out() -> None:
    short = Run(Problem(**PROBLEM), Method(**PLAIN), 0)
    problem = Problem(**PROBLEM, momentum=0.9, batch_size=128, train_images=None, augment=None)
    method = Method(**PLAIN, coherence=None, strength_scale="uniform", delay=0, warmup=0.0, polish=0, compression=None)
    assert Run(problem, method, 0).key == short.key
    assert json.loads(short.key) == {"problem": PROBLEM, "method": PLAIN, "seed": 0}


def test_key_tells_runs_apart() -> None:
    run = Run(Problem(**PROBLEM), Method(**PLAIN), 0)
    others = [
        Run(run.problem, run.method, 1),
        Run(run.problem, Method(**PLAIN, warmup=0.1), 0),
        Run(run.problem, Method(), 0),
        Run(Problem(**PROBLEM, augment="crop"), run.method, 0),
    ]
    assert len({other.key for other in others} | {run.key}) == 5


def test_equal_runs_have_one_key() -> None:
    """However their numbers are written: a study file with 10 for 10.0 must not do its runs again."""
    one = Run(Problem(**PROBLEM | {"lr": 1}), Method("magnitude_pruning", compression=10), 0)
    other = Run(Problem(**PROBLEM | {"lr": 1.0}), Method("magnitude_pruning", compression=10.0), 0)
    assert one == other
    assert one.key == other.key


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        pytest.param({"seed": 3}, ["'seed' in a study", "name, problems, seeds, methods", "mean 'seeds'"], id="name"),
        pytest.param(
            {"problems": [PROBLEM, PROBLEM | {"epoch": 3}]},
            ["'epoch' in problems, entry 2", "batch_size", "train_images", "mean 'epochs'"],
            id="name in a problem",
        ),
        pytest.param(
            {"methods": [{"method": "none"}, PLAIN | {"polishing": 1}]},
            ["'polishing' in methods, entry 2", "coherence", "compression", "mean 'polish'"],
            id="name in a method",
        ),
        pytest.param(
            {"methods": [{"method": "plane"}]},
            ["methods, entry 1: `method` must be one of", *map(repr, SETTINGS), "method='plane'", "mean 'plain'"],
            id="method",
        ),
        pytest.param(
            {"problems": [PROBLEM | {"network": "lenet"}]},
            ["problems, entry 1: `network` must be one of", *map(repr, NETWORKS), "network='lenet'"],
            id="network",
        ),
        pytest.param(
            {"problems": [PROBLEM | {"data": "mnist"}]},
            ["problems, entry 1: `data` must be one of", "'digits'", "'folder:NAME'", "data='mnist'"],
            id="data",
        ),
        pytest.param(
            {"problems": [PROBLEM | {"data": 5}]},
            ["problems, entry 1", "`data`", "'digits'", "5"],
            id="data of a wrong type",
        ),
        pytest.param(
            {"methods": [PLAIN | {"networks": ["lenet_5"]}]},
            ["networks (methods, entry 1)", "'deep_mlp'", "'lenet_5'"],
            id="network that no problem has",
        ),
        pytest.param(
            {"methods": [PLAIN | {"strength": []}]}, ["`strength`", "empty", "methods, entry 1"], id="empty list"
        ),
        pytest.param({"methods": []}, ["`methods` must be given"], id="no methods"),
        pytest.param({"problems": []}, ["`problems` must be given"], id="no problems"),
        pytest.param({"seeds": []}, ["`seeds` must be given"], id="no seeds"),
        pytest.param({"name": None}, ["`name` must be given"], id="no name"),
        pytest.param({"seeds": [0, -1]}, ["`seeds` must be an integer of at least 0", "-1"], id="negative seed"),
        pytest.param({"seeds": ["one"]}, ["`seeds` must be an integer", "'one'"], id="seed in letters"),
        pytest.param({"seeds": [1.5]}, ["`seeds` must be an integer", "1.5"], id="seed with a fraction"),
        pytest.param({"seeds": [True]}, ["`seeds` must be an integer", "True"], id="seed that is true"),
        pytest.param(
            {"problems": [{"data": "digits", "network": "deep_mlp", "lr": 0.1}]},
            ["`epochs` must be given in problems, entry 1"],
            id="problem without epochs",
        ),
        pytest.param({"problems": ["digits"]}, ["entry 1 of `problems`", "'digits'"], id="problem that is a word"),
        pytest.param({"methods": ["none"]}, ["entry 1 of `methods`", "'none'"], id="method that is a word"),
        pytest.param({"problems": 5}, ["`problems`", "list"], id="problems that are a number"),
        pytest.param({"methods": 5}, ["`methods`", "list"], id="methods that are a number"),
        pytest.param({"problems": PROBLEM}, ["`problems`"], id="problems that are one"),
        pytest.param(
            {"methods": [{"method": "plain", "strength": 0.1, "update": "proximal"}]},
            ["methods, entry 1: `penalty` must be given with method='plain', got penalty=None"],
            id="missing setting",
        ),
        pytest.param(
            {"methods": [PLAIN | {"strength": [0.1, -1]}]}, ["methods, entry 1: `strength`", "strength=-1"], id="value"
        ),
        pytest.param(
            {"methods": [PLAIN | {"strength": [[0.1, 0.2]]}]},
            ["methods, entry 1: `strength`", "[0.1, 0.2]"],
            id="nested",
        ),
        pytest.param({"methods": [{7: 1, "method": "none"}]}, ["methods, entry 1", "7"], id="a number for a name"),
    ],
)
def test_mistake_is_named_with_its_place(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(StudyFileError) as error:
        read(tmp_path, **changes)
    message = str(error.value)
    assert str(tmp_path / "study.yaml") in message
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["name", "problems", "seeds", "methods"])
def test_missing_part_is_named(name: str, tmp_path: Path) -> None:
    left = {key: value for key, value in CONTENT.items() if key != name}
    with pytest.raises(StudyFileError, match=rf"study\.yaml: `{name}` must be given\. See .*digits_smoke\.yaml"):
        read_text(tmp_path, yaml.safe_dump(left))


@pytest.mark.parametrize("text", ["", "- digits\n- deep_mlp\n", "study", "7"])
def test_file_without_names_is_refused(text: str, tmp_path: Path) -> None:
    message = r"study\.yaml must hold name, problems, seeds, methods, headline, title; see .*digits_smoke\.yaml"
    with pytest.raises(StudyFileError, match=message):
        read_text(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["name: [tiny", "name: tiny\n\tseeds: 1", "methods: *nothing", "!!python/name:os.system"]
)
def test_file_that_is_no_yaml_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"The study file .*study\.yaml cannot be read: "):
        read_text(tmp_path, text)


def test_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"\xff\xfe\x00name: \x80")
    for path in (tmp_path / "study.yaml", tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(StudyFileError) as error:
            read_study(path)
        assert f"The study file {path} cannot be read" in str(error.value)
