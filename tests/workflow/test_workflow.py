import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evaluation.report.collect import own_budgets
from networks.pretrained import load_pretrained
from networks.segmenter import Segmenter
from workflow.experiment import check_settings, read

ROOT = Path(__file__).parents[2]
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--nolock")
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))


def run_snakemake(configfile: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [*SNAKEMAKE, "--configfile", str(configfile), "--cores", "2", *options],
        cwd=ROOT,
        env=os.environ | {"DATA_ROOT": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    return done.returncode, done.stdout + done.stderr


def snakemake(configfile: Path, *options: str) -> str:
    code, output = run_snakemake(configfile, *options)
    assert code == 0, output[-6000:]
    return output


def planned(output: str) -> dict[str, int]:
    """Jobs by rule, from the table that a dry run prints."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("job ") and "count" in line) + 2
    table = {}
    for line in lines[start:]:
        name, count = line.split()
        if name == "total":
            break
        table[name] = int(count)
    return table


def commands(output: str) -> list[list[str]]:
    """Arguments of every planned run of the application."""
    lines = [part for line in output.splitlines() for part in line.split("; ") if " cli.py " in part]
    return [shlex.split(line.split(" 2>&1")[0].split(" cli.py ")[1]) for line in lines]


PARSED: set[tuple[str, ...]] = set()
"""Command lines of experiments that were parsed, but for folders and numbers: parsing one takes a second."""
VARIED = re.compile(r"(seed|budget|seed_everything)=\d")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_plans_all_its_arms(experiment, tmp_path, parsed, monkeypatch):
    settings = read(experiment)
    check_settings(settings, experiment)
    one = f"seeds=[{settings['seeds'][0]}]"  # the others differ in the seed alone
    output = snakemake(experiment, "--dry-run", "--printshellcmds", "--config", f"runs={tmp_path}", one)
    jobs = planned(output)
    methods = len(settings["methods"])
    assert jobs["real"] == 1 + len(settings.get("real_arms", {}))
    subsets = sum("subset" in (method or {}) for method in settings["methods"].values())
    assert jobs.get("synthesis", 0) == methods - subsets
    assert jobs.get("subset", 0) == subsets
    arms = sum(len(own_budgets(method, settings["budgets"])) for method in settings["methods"].values())
    assert jobs.get("union", 0) == arms
    assert jobs["report"] == 1
    assert jobs.get("backbone", 0) == jobs.get("reference", 0) == (methods > 0)
    monkeypatch.setenv("DATA_ROOT", "/nowhere")
    lines = commands(output)
    assert len(lines) >= methods - subsets + arms
    for line in lines:
        form = tuple(
            word.split("=")[0] if str(tmp_path) in word or VARIED.search(word) else word for word in line
        )
        if form not in PARSED:
            parsed(*line)
            PARSED.add(form)


def test_nothing_is_run_without_the_images(tmp_path):
    """Snakemake deletes what a job is to make before the job can say that it has no images."""
    code, output = run_snakemake(
        ROOT / "configs/experiments/own.yaml", "--config", f"runs={tmp_path / 'runs'}"
    )
    assert code == 1
    assert "error: /nowhere is not a folder: check root" in output
    assert "Traceback" not in output
    assert {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()} <= {".keep"}


HALF = {
    "network": "miner",
    "arguments": {
        "model.init_args.method": {
            "class_path": "Mixture",
            "init_args": {
                "methods": [
                    {"class_path": "Mined", "init_args": {"miner": "{network}"}},
                    {"class_path": "Base"},
                ],
                "weights": [1, 1],
            },
        }
    },
    "configs": [],
}
"""A method that uses the network of another: half mined, half plain."""


ROUND = {"stage": "scorer", "anchor": "seed_scorer/0.5x", "joined": ["seed_scorer"]}
"""A second round: mined against what the first round's segmenter still gets wrong."""

EASY = {"subset": {"of": "miner", "tau": -1, "control": True}}
"""A subset that is the whole set, since no value is below 0."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole experiment of a few steps a stage, and the file that describes it."""
    folder = tmp_path_factory.mktemp("workflow")
    settings = yaml.safe_load((ROOT / "configs/experiments/demo.yaml").read_text())
    settings |= {"name": "tiny", "runs": str(folder), "seeds": [3], "budgets": [0.5]}
    short = {
        "trainer.max_steps": 2,
        "data.init_args.steps_per_epoch": 1,
        "data.init_args.batch_size": 4,
        "data.init_args.source.init_args.n_train": 8,
        "data.init_args.source.init_args.n_test": 8,
        "data.init_args.source.init_args.n_val": 8,
    }
    settings["methods"] = {
        "base": None,
        "miner": {"stage": "miner"},
        "seed_scorer": {"training": {"arguments": {"model.init_args.reference": None}}},
        "half": HALF,
        "round_2": ROUND | {"configs": ["configs/methods/seed_scorer.yaml"]},
        "all_mined": EASY,
    }
    settings |= {"highlight": "miner", "gain_split": "val"}
    settings["stages"] |= {
        "plain": {
            "configs": ["configs/stages/synthesis.yaml"],
            "arguments": {"data.init_args.budget": 6, "data.init_args.batch_size": 48},
        },
        "scorer": {"configs": ["configs/stages/scorer.yaml"]},
    }
    for name, stage in settings["stages"].items():
        stage["arguments"] = (
            short | stage.get("arguments", {}) if name == "plain" else stage.get("arguments", {}) | short
        )
        if name in ("synthesis", "plain"):
            for argument in ("trainer.max_steps", "data.init_args.steps_per_epoch"):
                del stage["arguments"][argument]
        if name in ("miner", "scorer", "synthesis", "plain"):
            stage["arguments"]["model.init_args.steps"] = 3
        if name == "miner":
            stage["arguments"]["model.init_args.truncate"] = 2
    configfile = folder / "tiny.yaml"
    configfile.write_text(yaml.safe_dump(settings, sort_keys=False))
    output = snakemake(configfile, "--quiet", "rules")
    return folder / "tiny", configfile, settings, output


def test_a_run_ends_with_the_table_and_the_page(tiny):
    run, _, _, output = tiny
    assert "miner 0.5×" in output
    assert str(run / "report" / "report.html") in output
    assert (run / "report" / "report.json").is_file()


def test_a_finished_run_has_nothing_to_do(tiny):
    _, configfile, _, _ = tiny
    assert "Nothing to be done" in snakemake(configfile, "--dry-run")


def test_a_changed_setting_runs_again_only_what_depends_on_it(tiny, tmp_path):
    _, _, settings, _ = tiny
    changed = yaml.safe_load(yaml.safe_dump(settings, sort_keys=False))
    changed["stages"]["miner"]["arguments"]["model.init_args.beta"] = 0.01
    configfile = tmp_path / "changed.yaml"
    configfile.write_text(yaml.safe_dump(changed, sort_keys=False))
    jobs = planned(snakemake(configfile, "--dry-run"))
    del jobs["all"]
    expected = {"settings": 1, "train_method": 1, "synthesis": 2, "subset": 1}
    expected |= {"measure": 3, "gain": 3, "union": 3, "report": 1}
    assert jobs == expected


def test_equal_length_for_all_arms(tiny):
    run, _, settings, _ = tiny
    arms = [run / "seed3" / arm for arm in ("real", *(f"{method}/0.5x" for method in settings["methods"]))]
    facts = [yaml.safe_load((arm / "weights" / "training.json").read_text()) for arm in arms]
    steps = settings["stages"]["segmenter"]["arguments"]["trainer.max_steps"]
    assert [fact["steps"] for fact in facts] == [steps] * 7
    assert [fact["n_synthetic"] for fact in facts] == [0] + [4] * 6


def test_a_later_round_works_against_the_segmenter_of_the_one_before(tiny):
    run, _, _, _ = tiny
    first, second = run / "seed3/seed_scorer", run / "seed3/round_2"
    made = [json.loads((folder / "synthetic/dataset.json").read_text()) for folder in (first, second)]
    trained = load_pretrained(first / "0.5x/weights", Segmenter)
    assert made[1]["weights"]["segmenter"] == trained.fingerprint() != made[0]["weights"]["segmenter"]
    assert made[1]["seed"] == made[0]["seed"] + 10000
    sets = yaml.safe_load((second / "0.5x/tensorboard/config.yaml").read_text())["data"]["init_args"][
        "synthetic"
    ]
    assert sets == [str(folder / "synthetic") for folder in (first, second)]


def test_a_subset_is_taken_whole(tiny):
    run, _, _, _ = tiny
    made = json.loads((run / "seed3/all_mined/synthetic/dataset.json").read_text())
    assert made["subset"] == [
        {"set": str(run / "seed3/miner/synthetic"), "key": "value", "tau": -1, "control": True, "of": 4}
    ]


def test_gain_and_features_lie_beside_each_set(tiny):
    run, _, settings, _ = tiny
    for method in settings["methods"]:
        gain = json.loads((run / f"seed3/{method}/gain.json").read_text())
        assert gain["split"] == "val"
        assert (run / f"seed3/{method}/features.npz").is_file()


def test_an_extension_trains_again_only_what_it_changes(tiny, tmp_path):
    run, configfile, settings, _ = tiny
    methods = {"base": settings["methods"]["base"], "diffaug": None}
    more = {"extends": str(configfile), "name": "more", "runs": str(run.parent), "methods": methods}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    jobs = planned(snakemake(tmp_path / "more.yaml", "--dry-run"))
    del jobs["all"]
    assert jobs == dict.fromkeys(("settings", "synthesis", "measure", "gain", "union", "report"), 1)
    for folder in ("backbone", "reference", "seed3/real", "seed3/base"):
        assert (run.parent / "more" / folder).resolve() == (run / folder).resolve()
    other = more | {"stages": {"segmenter": {"configs": [], "arguments": {}}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(other))
    jobs = planned(snakemake(tmp_path / "more.yaml", "--dry-run"))
    assert (jobs["real"], jobs["synthesis"], jobs["union"]) == (1, 2, 2)
    assert "backbone" not in jobs
    assert not (run.parent / "more/seed3/base").is_symlink()


def test_a_backbone_may_start_from_a_pretrained_one(tiny, tmp_path):
    _, _, settings, _ = tiny
    stages = settings["stages"] | {"pretrain": settings["stages"]["backbone"]}
    changed = settings | {"stages": stages, "runs": str(tmp_path)}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    output = snakemake(tmp_path / "first.yaml", "--dry-run", "--printshellcmds")
    assert planned(output)["pretrain"] == 1
    started = [line for line in output.splitlines() if "init_args.weights=" in line and "/pretrain/" in line]
    assert len(started) == 1
    assert f"--model.init_args.weights={tmp_path}/tiny/pretrain/weights" in started[0]
    assert "--trainer.default_root_dir=" + f"{tmp_path}/tiny/backbone" in started[0]


def test_a_failed_extension_ends_with_its_own_error(tmp_path):
    """Though all its folders are links to empty ones, which Snakemake wants to remove."""
    stages = {"backbone": {"arguments": {"trainer.max_steps": "many"}}}
    demo = {"extends": "configs/experiments/demo.yaml", "name": "base", "runs": str(tmp_path)}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(demo | {"stages": stages}))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"extends": f"{tmp_path}/base.yaml", "name": "more"}))
    code, output = run_snakemake(tmp_path / "more.yaml", f"{tmp_path}/more/backbone/weights/config.json")
    assert code != 0
    assert "Got value: many" in output
    assert "Traceback" not in output


def test_a_method_that_builds_on_a_later_one_is_refused(tiny, tmp_path):
    _, _, settings, _ = tiny
    changed = settings | {"methods": {"round_2": ROUND, **settings["methods"]}}
    configfile = tmp_path / "changed.yaml"
    configfile.write_text(yaml.safe_dump(changed, sort_keys=False))
    code, output = run_snakemake(configfile, "--dry-run")
    assert code != 0
    assert "round_2 builds on seed_scorer; list it before round_2" in output
