"""Every shipped YAML is parsed with partners that it can run with; new files are found by themselves."""

from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"


def shipped(kind):
    return sorted((CONFIGS / kind).glob("*.yaml"))


KINDS = ("stages", "data", "segmenters", "autoencoders", "backbones", "miners", "methods", "plans")
STAGES, DATA, SEGMENTERS, AUTOENCODERS, BACKBONES, MINERS, METHODS, PLANS = (shipped(kind) for kind in KINDS)
FOLDERS = ["--model.init_args.backbone=weights/b", "--model.init_args.anchor=weights/s"]


def stage(name):
    return CONFIGS / "stages" / f"{name}.yaml"


def verb(stage_file):
    return "predict" if stage_file.stem in ("synthesis", "prediction") else "fit"


def partners(stage_file):
    """Files and arguments that a stage needs beside data."""
    given = yaml.safe_load(stage_file.read_text())
    model = given["model"]["class_path"]
    if model == "AutoencoderLitModule":
        return [AUTOENCODERS[0]], []
    if model == "DiffusionLitModule":
        return [BACKBONES[0]], []
    if given["data"]["class_path"] == "ScoredDataModule":
        return [], [*FOLDERS, "--data.init_args.plain=weights/p"]
    if model == "SegLitModule":
        return [CONFIGS / "segmenters" / "nnunet_rgb32.yaml"], []
    return [], FOLDERS


@pytest.fixture
def parse(parsed):
    """Return a function that parses a command line of config files and arguments."""
    return lambda verb, files, *args: parsed(verb, *(f"--config={file}" for file in files), *args)


def assert_took(given, parsed, where=""):
    """Every value of a YAML file is in the parsed configuration."""
    for key, value in given.items():
        found = parsed[key]
        if isinstance(value, dict):
            assert_took(value, found, f"{where}.{key}")
        elif key == "class_path":
            assert found.split(".")[-1] == value.split(".")[-1], f"{where}.{key}"
        elif isinstance(value, list) and not any(isinstance(item, dict) for item in value):
            assert list(found) == value, f"{where}.{key}"
        elif not isinstance(value, list):
            assert found == value, f"{where}.{key}"


def test_every_kind_is_looked_at():
    """Experiments are read by the workflow, not by the command line."""
    assert {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"experiments"} == set(KINDS)
    assert all([STAGES, DATA, SEGMENTERS, AUTOENCODERS, BACKBONES, MINERS, METHODS, PLANS])


PAIRS = [
    *((stage_file, DATA[0]) for stage_file in STAGES),
    *((stage("segmenter"), data) for data in DATA[1:]),
]
"""Each stage, and each data set: a source is the same argument of every data module."""


@pytest.mark.parametrize(("stage_file", "data"), PAIRS, ids=lambda f: f.stem)
def test_stages_and_data(parse, stage_file, data):
    files, args = partners(stage_file)
    config = parse(verb(stage_file), [stage_file, data, *files], *args)
    assert_took(yaml.safe_load(stage_file.read_text())["trainer"], config["trainer"])
    assert_took(yaml.safe_load(data.read_text()), config)


@pytest.mark.parametrize("segmenter", SEGMENTERS, ids=lambda f: f.stem)
def test_segmenters(parse, segmenter):
    config = parse("fit", [stage("segmenter"), DATA[0], segmenter])
    assert_took(yaml.safe_load(segmenter.read_text()), config)


@pytest.mark.parametrize("plan", PLANS, ids=lambda f: f.stem)
def test_plans(parse, plan):
    config = parse("fit", [stage("segmenter"), DATA[0], CONFIGS / "segmenters" / "nnunet.yaml", plan])
    assert_took(yaml.safe_load(plan.read_text()), config)


@pytest.mark.parametrize("autoencoder", AUTOENCODERS, ids=lambda f: f.stem)
def test_autoencoders(parse, autoencoder):
    config = parse("fit", [stage("autoencoder"), DATA[0], autoencoder])
    assert_took(yaml.safe_load(autoencoder.read_text()), config)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda f: f.stem)
def test_backbones(parse, backbone):
    config = parse("fit", [stage("backbone"), DATA[0], backbone])
    assert_took(yaml.safe_load(backbone.read_text()), config)


@pytest.mark.parametrize("miner", MINERS, ids=lambda f: f.stem)
def test_miners(parse, miner):
    config = parse("fit", [stage("miner"), DATA[0], miner], *FOLDERS)
    assert_took(yaml.safe_load(miner.read_text()), config)


@pytest.mark.parametrize("method", METHODS, ids=lambda f: f.stem)
def test_methods(parse, method):
    given = yaml.safe_load(method.read_text())
    name = given["model"]["init_args"]["method"]["class_path"]
    network = {"Mined": "miner", "SeedScorer": "scorer"}.get(name)
    flags = [f"--model.init_args.method.{network}=weights/n"] if network else []
    config = parse("predict", [stage("synthesis"), DATA[0], method], *FOLDERS, *flags)
    assert_took(given, config)


@pytest.mark.parametrize("stage_file", STAGES, ids=lambda f: f.stem)
def test_one_argument_moves_the_whole_run(parse, stage_file):
    """Relative paths of callbacks start at ``default_root_dir``; the logger follows it."""
    files, args = partners(stage_file)
    config = parse(
        verb(stage_file), [stage_file, DATA[0], *files], *args, "--trainer.default_root_dir=elsewhere"
    )
    assert config["trainer"]["default_root_dir"] == "elsewhere"
    if config["trainer"]["logger"]:
        assert config["trainer"]["logger"]["init_args"]["save_dir"] == "elsewhere"


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {max_stepz: 3}",
        "data: {init_args: {source: {init_args: {sise: 32}}}}",
        "model: {class_path: Nope}",
    ],
)
def test_misspelt_configurations_do_not_parse(parse, tmp_path, text):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text)
    with pytest.raises(pytest.fail.Exception):
        parse("fit", [stage("segmenter"), DATA[0], SEGMENTERS[0], wrong])
