"""The whole application from its command line, in small."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.utils import parameters_to_vector

import cli
from conftest import files_of, make_miner
from datamodules.sources import AsTrainedSource
from datamodules.sources.phantom import VERSION
from diffusion.backbones import Backbone
from errors import InputError
from networks import Miner, Segmenter
from networks.pretrained import load_pretrained, save_pretrained, training_facts

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
# An untrained segmenter finds every sample harder than the cap of 0.5, above which nothing is learnt.
MINING = ["--model.init_args.truncate=2", "--model.init_args.kappa_up=0.9"]
FEW = {"n_train": 6, "n_val": 4, "n_test": 5}
MINER = ["--model.init_args.miner=Miner", "--model.init_args.miner.init_args.channels=3"] + [
    f"--model.init_args.miner.init_args.{key}={value}"
    for key, value in {"base_width": 8, "multipliers": "[1, 2]", "pooled_levels": 1, "head_width": 8}.items()
]


def command(verb, stage, root, *args, network=None):
    """Arguments of a stage, built from the shipped files, on a handful of images."""
    files = [f"stages/{stage}", "data/phantom_longtail32", *([network] if network else [])]
    return [
        verb,
        *(f"--config={CONFIGS / file}.yaml" for file in files),
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        *(f"--data.init_args.source.init_args.{key}={value}" for key, value in FEW.items()),
        *args,
    ]


def short(steps, batch=4):
    """Two steps an epoch."""
    return [
        f"--trainer.max_steps={steps}",
        f"--data.init_args.batch_size={batch}",
        "--data.init_args.steps_per_epoch=2",
    ]


def frozen(runs, steps=3):
    return [
        f"--model.init_args.backbone={runs.backbone / 'weights'}",
        f"--model.init_args.anchor={runs.segmenter / 'weights'}",
        f"--model.init_args.steps={steps}",
    ]


SEGMENTER, BACKBONE = "segmenters/nnunet_rgb32", "backbones/segdiff_rgb32"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every stage once; the folders of their runs."""
    root = tmp_path_factory.mktemp("runs")
    names = ("backbone", "segmenter", "miner", "base", "mined", "union", "test")
    runs = SimpleNamespace(**{name: root / name for name in names})
    preview = ["--model.init_args.sampling_steps=2"]
    cli.main(command("fit", "backbone", runs.backbone, *short(4), *preview, network=BACKBONE))
    cli.main(command("fit", "segmenter", runs.segmenter, *short(4), network=SEGMENTER))
    cli.main(command("fit", "miner", runs.miner, *short(4), *frozen(runs), *MINING, *MINER))
    cli.main(command("predict", "synthesis", runs.base, *frozen(runs)))
    mined = [
        "--model.init_args.method=Mined",
        f"--model.init_args.method.init_args.miner={runs.miner / 'weights'}",
    ]
    cli.main(command("predict", "synthesis", runs.mined, *frozen(runs), *mined))
    start = f"--model.init_args.weights={runs.segmenter / 'weights'}"
    union = [start, f"--data.init_args.synthetic={runs.mined / 'synthetic'}", "--data.init_args.budget=1"]
    union += ["--test_after_fit=true"]
    cli.main(command("fit", "segmenter", runs.union, *short(4), *union, network=SEGMENTER))
    trained = f"--model.init_args.weights={runs.union / 'weights'}"
    cli.main(command("test", "segmenter", runs.test, trained, network=SEGMENTER))
    return runs


def fingerprint(folder, kind):
    return load_pretrained(folder / "weights", kind).fingerprint()


def test_each_stage_hands_weights_on(runs):
    assert training_facts(runs.backbone / "weights")["steps"] == 4
    assert training_facts(runs.miner / "weights")["steps"] == 4
    assert training_facts(runs.segmenter / "weights")["n_synthetic"] == 0
    assert 0 <= training_facts(runs.segmenter / "weights")["validation"]["val/dsc"] <= 100
    assert training_facts(runs.union / "weights")["n_synthetic"] == 6
    assert fingerprint(runs.union, Segmenter) != fingerprint(runs.segmenter, Segmenter)
    prior = load_pretrained(runs.miner / "weights", Miner)
    assert prior.mean_head[-1].weight.abs().max() > 0  # it has learnt something


def test_backbone_hands_on_the_averaged_weights(runs):
    checkpoint = torch.load(runs.backbone / "tensorboard" / "checkpoints" / "last.ckpt", weights_only=True)
    exported = load_pretrained(runs.backbone / "weights", Backbone).state_dict()
    averaged, last = (checkpoint[key] for key in ("state_dict", "current_model_state"))
    assert all(torch.equal(exported[name], averaged[f"backbone.{name}"]) for name in exported)
    assert not all(torch.equal(exported[name], last[f"backbone.{name}"]) for name in exported)


def test_training_can_end_with_its_test(runs):
    """On the weights handed on, as by a command of its own."""
    for name in ("test.json", "test_cases.csv"):
        assert (runs.union / name).read_bytes() == (runs.test / name).read_bytes()


def test_a_stage_without_a_test_cannot_end_with_one(tmp_path):
    with pytest.raises(InputError, match="test_after_fit: DiffusionLitModule has no test"):
        cli.main(
            command("fit", "backbone", tmp_path / "run", *short(2), "--test_after_fit=true", network=BACKBONE)
        )
    assert not (tmp_path / "run" / "weights").exists()


def test_runs_keep_to_their_folders(runs):
    for name in ("backbone", "segmenter", "miner", "union"):
        written = files_of(getattr(runs, name))
        tops = {file.split("/")[0] for file in written}
        tested = {"test.json", "test_cases.csv"} if name == "union" else set()
        assert tops - {".weights.best"} == {"weights", "tensorboard"} | tested, name
        assert "tensorboard/config.yaml" in written
        assert any("tfevents" in file for file in written)
        assert any(file.endswith("last.ckpt") for file in written)
    assert "synthetic/manifest.jsonl" in files_of(runs.base)
    assert not (REPOSITORY / "lightning_logs").exists()


def test_synthetic_sets_note_the_networks_they_were_made_with(runs):
    prints = {
        "backbone": fingerprint(runs.backbone, Backbone),
        "segmenter": fingerprint(runs.segmenter, Segmenter),
        "miner": fingerprint(runs.miner, Miner),
    }
    for name, networks in (
        ("base", ("backbone", "segmenter")),
        ("mined", ("backbone", "segmenter", "miner")),
    ):
        facts = json.loads((getattr(runs, name) / "synthetic" / "dataset.json").read_text())
        assert facts["weights"] == {network: prints[network] for network in networks}
        assert (facts["n"], facts["method"]) == (6, "base" if name == "base" else "miner")


def test_test_scores_are_those_of_the_given_weights(runs):
    report = json.loads((runs.test / "test.json").read_text())
    assert (report["dataset"], report["dataset_version"]) == ("phantom-polyp", VERSION)
    assert set(report["test_sets"]) == {"test", "test_uniform", "test_shift"}
    assert all(score["n_cases"] == 5 for score in report["test_sets"].values())
    assert all(0 <= score["dsc"] <= 100 for score in report["test_sets"].values())
    assert report["segmenter_fingerprint"] == fingerprint(runs.union, Segmenter)
    assert (report["n_real"], report["n_synthetic"], report["steps"]) == (6, 6, 4)
    assert report["protocol"]["protocol"].startswith("paper")
    lines = (runs.test / "test_cases.csv").read_text().splitlines()
    assert lines[0] == "test set,case,class,dsc,asd"
    assert len(lines) == 1 + 3 * 5  # one class, three test sets
    assert lines[1].startswith("test,test-00000,polyp,")


def test_another_protocol_is_an_argument(runs, tmp_path, capsys):
    args = [f"--model.init_args.weights={runs.union / 'weights'}", "--model.protocol", "nnunet"]
    cli.main(command("test", "segmenter", tmp_path, *args, network=SEGMENTER))
    report = json.loads((tmp_path / "test.json").read_text())
    before = json.loads((runs.test / "test.json").read_text())
    assert report["protocol"]["protocol"].startswith("nnunet")
    for name, scores in report["test_sets"].items():
        assert scores["dsc"] == pytest.approx(
            before["test_sets"][name]["dsc"]
        )  # images are cases of their own
        assert 0 <= scores["nsd"] <= 100
        assert scores["hd95"] >= 0
    printed = capsys.readouterr().out
    assert "NSD" in printed
    assert "only reference empty: DSC 0; NSD 0; ASD = diagonal" in printed


def test_predicting_again_gives_the_same_files(runs, tmp_path):
    cli.main(command("predict", "synthesis", tmp_path, *frozen(runs)))
    again, first = (files_of(root / "synthetic") for root in (tmp_path, runs.base))
    same = {name for name in first if first[name] == again[name]}
    assert set(first) - same == {"manifest.jsonl", "dataset.json"}  # they note the time


def test_segmenting_with_what_was_trained(runs, tmp_path):
    trained = f"--model.init_args.weights={runs.union / 'weights'}"
    cli.main(command("predict", "prediction", tmp_path, trained, network=SEGMENTER))
    folder = tmp_path / "predictions"
    assert {
        path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()
    } == dict.fromkeys(("test", "test_uniform", "test_shift"), FEW["n_test"])


def test_segmenting_images_with_the_weights_and_nothing_else(runs, tmp_path):
    weights, images = runs.union / "weights", runs.mined / "synthetic" / "images"

    def given(root, trained=weights, *more):
        return [
            "predict",
            f"--config={CONFIGS / 'stages' / 'prediction.yaml'}",
            f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            f"--model.weights={weights}",
            "--data.source=AsTrainedSource",
            f"--data.source.weights={trained}",
            *more,
        ]

    cli.main(given(tmp_path / "run", weights, f"--data.images={images}"))
    folder = tmp_path / "run" / "predictions"
    assert {path.name for path in (folder / "images").iterdir()} == {path.name for path in images.iterdir()}
    made = json.loads((folder / "predictions.json").read_text())
    assert made["segmenter_fingerprint"] == fingerprint(runs.union, Segmenter)
    assert (made["class_names"], made["size"]) == (["background", "polyp"], [32, 32])
    new = tmp_path / "new"
    refused(new, given(new), "has no test set here", "data.images")
    with pytest.raises(InputError, match=r"has no images of phantom-polyp.* itself; take it to predict"):
        AsTrainedSource(str(weights)).dataset("val")
    untold = tmp_path / "untold"
    shutil.copytree(weights, untold)
    facts = training_facts(weights)
    del facts["size"]
    (untold / "training.json").write_text(json.dumps(facts))
    refused(new, given(new, untold), "training.json: does not say size")


def test_segmenting_without_weights(tmp_path):
    refused(tmp_path, command("predict", "prediction", tmp_path), "model.segmenter: is not given")
    arguments = command("predict", "prediction", tmp_path, network=SEGMENTER)
    refused(tmp_path, arguments, "model.weights", "trained segmenter")


def test_what_has_learnt_nothing_is_neither_tested_nor_sampled_with(runs, tmp_path):
    refused(tmp_path, command("test", "segmenter", tmp_path, network=SEGMENTER), "trained segmenter")
    untrained = ["--model=MinerLitModule", *frozen(runs), *MINER, "--model.init_args.truncate=2"]
    refused(tmp_path, command("predict", "synthesis", tmp_path, *untrained), "model.weights", "trained miner")


def test_predictions_that_nobody_would_write_are_refused(runs, tmp_path):
    weights = f"--model.init_args.weights={runs.miner / 'weights'}"
    arguments = command("predict", "miner", tmp_path, *frozen(runs, steps=10), weights, *MINER)
    refused(tmp_path, arguments, "trainer.callbacks", "synthesis.yaml")


def test_the_miner_of_a_checkpoint_is_noted(runs, tmp_path):
    checkpoint = f"--ckpt_path={runs.miner / 'tensorboard' / 'checkpoints' / 'last.ckpt'}"
    args = ["--model=MinerLitModule", *frozen(runs), *MINER, "--model.init_args.truncate=2", checkpoint]
    cli.main(command("predict", "synthesis", tmp_path, *args))
    facts = json.loads((tmp_path / "synthetic" / "dataset.json").read_text())
    assert facts["weights"]["miner"] == fingerprint(runs.miner, Miner)


def test_resuming_from_the_last_checkpoint(runs, tmp_path):
    checkpoint = runs.miner / "tensorboard" / "checkpoints" / "last.ckpt"
    args = [*short(6), *frozen(runs), *MINING, *MINER, f"--ckpt_path={checkpoint}"]
    done = cli.main(command("fit", "miner", tmp_path, *args))
    assert done.trainer.global_step == 6
    assert training_facts(tmp_path / "weights")["steps"] == 6
    assert fingerprint(tmp_path, Miner) != fingerprint(runs.miner, Miner)
    wide = [arg.replace("base_width=8", "base_width=16") for arg in args]
    with pytest.raises(InputError, match="another miner"):
        cli.main(command("fit", "miner", tmp_path / "wide", *wide))


# --------------------------------------------------------------------------------- wrong input


def refused(root, arguments, *fragments):
    """The run ends with one line that has all fragments, and writes nothing."""
    with pytest.raises(InputError) as caught:
        cli.main(arguments)
    message = str(caught.value)
    assert re.search("(?s)" + ".*".join(re.escape(str(part)) for part in fragments), message), message
    assert "\n" not in message.strip()
    assert list(files_of(root)) == []


def test_missing_weights(runs, tmp_path):
    for argument in ("backbone", "anchor"):
        args = [*short(2), *frozen(runs), f"--model.init_args.{argument}={tmp_path / 'nowhere'}"]
        refused(tmp_path / "run", command("fit", "miner", tmp_path / "run", *args), tmp_path / "nowhere")
    mined = [
        "--model.init_args.method=Mined",
        f"--model.init_args.method.init_args.miner={tmp_path / 'nowhere'}",
    ]
    arguments = command("predict", "synthesis", tmp_path / "run", *frozen(runs), *mined)
    refused(tmp_path / "run", arguments, tmp_path / "nowhere")


def test_a_bad_mask_of_another_hospital_is_found_before_training(tmp_path):
    for place in ("here", "there"):
        for folder in ("images", "masks"):
            (tmp_path / place / folder).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), (i, len(place), 9)).save(tmp_path / place / "images" / f"{i}.png")
            Image.new("L", (32, 32), i % 2).save(tmp_path / place / "masks" / f"{i}.png")
    Image.new("L", (32, 32), 7).save(tmp_path / "there" / "masks" / "5.png")
    source = {
        "class_path": "FolderSource",
        "init_args": {
            "name": "own",
            "root": str(tmp_path / "here"),
            "size": 32,
            "channels": 3,
            "class_names": ["background", "lesion"],
            "threshold": None,
            "fractions": {"train": 0.5, "val": 0.25, "test": 0.25},
            "tests": {"elsewhere": {"root": str(tmp_path / "there")}},
        },
    }
    data = tmp_path / "own.yaml"
    data.write_text(json.dumps({"data": {"init_args": {"source": source}}}))
    files = [f"--config={CONFIGS / name}.yaml" for name in ("stages/segmenter", SEGMENTER)]
    run = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", *short(2)]
    with pytest.raises(InputError, match=r"there/masks/5\.png"):
        cli.main(["fit", files[0], f"--config={data}", files[1], *run])
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_there(runs, tmp_path):
    trained = f"--model.init_args.weights={runs.union / 'weights'}"
    for verb, stage in (("fit", "segmenter"), ("test", "segmenter"), ("predict", "prediction")):
        given = [trained, f"--ckpt_path={tmp_path / 'no.ckpt'}"]
        arguments = command(verb, stage, tmp_path, *given, network=SEGMENTER)
        refused(tmp_path, arguments, "no.ckpt: does not exist")


def test_a_training_that_starts_anew_beside_the_checkpoint_of_another_says_so(tmp_path):
    fit = command("fit", "segmenter", tmp_path, *short(2), network=SEGMENTER)
    with warnings.catch_warnings(record=True) as first:
        cli.main(fit)
    with pytest.warns(UserWarning, match=r"last\.ckpt: an earlier training .*--ckpt_path=last"):
        cli.main(fit)
    with warnings.catch_warnings(record=True) as resumed:
        cli.main([*fit, "--trainer.max_steps=4", "--ckpt_path=last"])
    assert not any("an earlier training" in str(each.message) for each in (*first, *resumed))


def test_segmenter_for_other_channels(tmp_path):
    args = [*short(2), "--model.init_args.segmenter.init_args.in_channels=1"]
    arguments = command("fit", "segmenter", tmp_path, *args, network=SEGMENTER)
    refused(tmp_path, arguments, "model.segmenter", "1 channels")


def test_backbone_for_other_classes(tmp_path):
    args = [*short(2), "--model.init_args.backbone.init_args.num_classes=3"]
    refused(
        tmp_path, command("fit", "backbone", tmp_path, *args, network=BACKBONE), "model.backbone", "3 classes"
    )


@pytest.mark.parametrize(("verb", "stage"), [("fit", "miner"), ("predict", "synthesis")])
def test_networks_for_other_classes(runs, tmp_path, verb, stage):
    cardiac = "--data.init_args.source.init_args.family=cardiac"
    extra = short(2) if verb == "fit" else []
    arguments = command(verb, stage, tmp_path, *frozen(runs), "--model.init_args.steps=10", cardiac, *extra)
    refused(tmp_path, arguments, "model.backbone", "channels")


def test_miner_for_other_channels(runs, tmp_path):
    args = [*short(2), *frozen(runs, steps=10), *MINER, "--model.init_args.miner.init_args.channels=1"]
    refused(tmp_path, command("fit", "miner", tmp_path, *args), "model.miner", "1 channels")


def test_unknown_reward(runs, tmp_path):
    args = [*short(2), *frozen(runs, steps=10), "--model.init_args.reward=lce"]
    refused(tmp_path, command("fit", "miner", tmp_path, *args), "lce", "bounded_ce")


def test_budget_without_synthetic(tmp_path):
    args = [*short(2), "--data.init_args.budget=1"]
    refused(tmp_path, command("fit", "segmenter", tmp_path, *args, network=SEGMENTER), "budget", "synthetic")


def test_budget_beyond_the_set(runs, tmp_path):
    folder = runs.base / "synthetic"
    args = [*short(2), f"--data.init_args.synthetic={folder}", "--data.init_args.budget=2"]
    refused(tmp_path, command("fit", "segmenter", tmp_path, *args, network=SEGMENTER), folder, "12")


def test_synthetic_set_that_is_none(tmp_path):
    args = [*short(2), f"--data.init_args.synthetic={tmp_path / 'nowhere'}"]
    refused(tmp_path, command("fit", "segmenter", tmp_path, *args, network=SEGMENTER), tmp_path / "nowhere")


def test_foreign_folder_in_the_way(runs, tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "synthetic"))):
        cli.main(command("predict", "synthesis", tmp_path, *frozen(runs)))
    assert files_of(tmp_path) == {"synthetic/thesis.txt": b"years of work"}


# -------------------------------------------------------------------------------- two processes


def two_processes(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for key in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        environment.pop(key, None)
    done = subprocess.run(
        [sys.executable, "cli.py", *arguments, "--trainer.devices=2", "--trainer.strategy=ddp"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_synthesise_the_same_set(runs, tmp_path):
    """Seven samples, so that the shares are unequal; one a batch, so that no sum is ordered otherwise."""
    args = [*frozen(runs, steps=2), "--data.init_args.batch_size=1", "--data.init_args.budget=1.167"]
    cli.main(command("predict", "synthesis", tmp_path / "one", *args))
    two_processes(command("predict", "synthesis", tmp_path / "two", *args))
    one, two = (files_of(tmp_path / name / "synthetic") for name in ("one", "two"))
    assert set(one) == set(two)
    assert len(one) == 3 * 7 + 2
    assert [name for name in one if one[name] != two[name]] == ["dataset.json", "manifest.jsonl"]
    entries = [[json.loads(line) for line in files["manifest.jsonl"].splitlines()] for files in (one, two)]
    for first, second in zip(*entries, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_two_processes_train_a_segmenter_and_test_it(tmp_path):
    args = [*short(4, batch=2), "--test_after_fit=true"]
    two_processes(command("fit", "segmenter", tmp_path, *args, network=SEGMENTER))
    tested = json.loads((tmp_path / "test.json").read_text())
    cli.main(
        command(
            "test",
            "segmenter",
            tmp_path / "again",
            f"--model.init_args.weights={tmp_path / 'weights'}",
            network=SEGMENTER,
        )
    )
    again = json.loads((tmp_path / "again" / "test.json").read_text())
    for name, scores in again["test_sets"].items():
        assert tested["test_sets"][name] == pytest.approx(scores, rel=1e-4)


def test_two_processes_mine_as_one_does_with_twice_the_batch(runs, tmp_path):
    """The same items each step, gradients averaged: the weights agree to rounding."""
    start = tmp_path / "start"
    save_pretrained(make_miner(trained=True), start, {})
    plain = ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.init_args.lr=0.1"]
    args = [*frozen(runs), *MINING, *plain, f"--model.init_args.weights={start}"]
    cli.main(command("fit", "miner", tmp_path / "one", *short(3, batch=4), *args))
    two_processes(command("fit", "miner", tmp_path / "two", *short(3, batch=2), *args))
    first, one, two = (
        load_pretrained(folder, Miner)
        for folder in (start, *(tmp_path / n / "weights" for n in ("one", "two")))
    )
    before, single, double = (parameters_to_vector(net.parameters()) for net in (first, one, two))
    assert (single - double).norm() < 1e-2 * (single - before).norm()


def test_two_processes_validate_a_scorer_as_one_does(runs, tmp_path):
    """On all masks held out, of which neither process has more than half; 9 are not shared evenly."""
    still = ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.init_args.lr=0"]
    args = [*frozen(runs, steps=2), *still, "--data.init_args.n_val=9"]
    cli.main(command("fit", "glance_scorer", tmp_path / "one", *short(2, batch=4), *args))
    two_processes(command("fit", "glance_scorer", tmp_path / "two", *short(2, batch=2), *args))
    one, two = (training_facts(tmp_path / name / "weights")["validation"] for name in ("one", "two"))
    assert {"scorer/val_pearson", "scorer/val_top_eighth"} <= set(one)
    assert two == pytest.approx(one, rel=1e-3)
