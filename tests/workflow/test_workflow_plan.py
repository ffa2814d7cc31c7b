import copy
from pathlib import Path

import pytest

from errors import InputError
from workflow.experiment import over, read
from workflow.plan import Plan, arguments

EXPERIMENT = Path("configs/experiments/longtail.yaml")


@pytest.fixture
def settings(tmp_path):
    return copy.deepcopy(read(EXPERIMENT)) | {"runs": str(tmp_path)}


def test_what_a_method_builds_on(settings):
    settings["methods"]["round_2"] = {
        "configs": [],
        "anchor": "miner/3x",
        "joined": ["glance_learnt"],
        "arguments": {"x": "{arms}/best_of_4/1x/weights"},
        "training": {"arguments": {"y": ["{arms}/glance_scorer_training/weights"]}},
    }
    plan = Plan(settings)
    assert plan.needs("round_2") == ["best_of_4/1x", "glance_scorer_training"]
    assert plan.others("round_2") == ["miner", "best_of_4", "glance_scorer", "glance_learnt"]
    assert plan.needs("glance_learnt") == ["all_plain/16x"]
    assert plan.stages_of("glance_learnt") == {"reference", "backbone", "segmenter", "synthesis"}
    assert plan.stages_of("glance_scorer_16") == plan.stages_of("glance_learnt") | {"glance_scorer"}
    assert plan.stages_of("all_plain") == plan.stages_of("glance_learnt") | {"plain"}


@pytest.mark.parametrize(
    ("stage", "touched"),
    [
        ("miner", {"miner"}),
        ("plain", {"all_plain", "glance_learnt"}),
        ("glance_scorer", {"glance_scorer", "glance_scorer_16"}),
        ("synthesis", {"base", "miner", "all_plain", "glance_learnt", "glance_scorer", "glance_scorer_16"}),
    ],
)
def test_a_stage_changes_the_key_of_what_depends_on_it_alone(settings, stage, touched):
    names = ["base", "miner", "all_plain", "glance_learnt", "glance_scorer", "glance_scorer_16"]

    def keys():
        plan = Plan(settings)
        return {name: plan.key("segmenter", "synthesis", *plan.method_layers(name)) for name in names}

    before = keys()
    settings["stages"][stage]["arguments"]["model.init_args.steps"] = 7
    assert {name for name, key in keys().items() if key != before[name]} == touched


def test_a_changed_stage_is_shared_by_none_that_depends_on_it(settings):
    base = copy.deepcopy(settings)
    settings |= {"name": "more", "seeds": [0]}
    settings["methods"]["other"] = {"configs": []}
    settings["stages"]["miner"]["arguments"]["trainer.max_steps"] = 7
    Plan(settings).share(base)
    run = Path(settings["runs"], "more")
    linked = {path.name for path in run.glob("seed0/*")}
    assert {"base", "glance_scorer_training", "real", "plain"} <= linked
    assert not {"miner", "miner_training", "native_miner", "other"} & linked
    assert (run / "real").is_symlink()  # real images, which the report shows beside what is shared
    settings["stages"]["reference"]["arguments"]["trainer.max_steps"] = 7  # which measures every set
    Plan(settings).share(base)
    assert {path.name for path in run.glob("seed0/*")} == {"real", "plain"}
    assert not (run / "real").exists()


def test_real_arms_are_shared_with_what_works_with_them(settings):
    base = copy.deepcopy(settings)
    settings["real_arms"] = base["real_arms"] = {
        "many": {"arguments": {"x": 1}},
        "few": {"arguments": {"x": 1}},
    }
    told = {"configs": [], "arguments": {"reference": "{arms}/many/weights"}}
    settings["methods"]["told"] = base["methods"]["told"] = told
    settings |= {"name": "more", "seeds": [0]}

    def linked():
        Plan(settings).share(base)
        return {path.name for path in Path(settings["runs"], "more").glob("seed0/*")}

    assert {"real", "many", "few", "told"} <= linked()
    settings["real_arms"] = base["real_arms"] | {"many": {"arguments": {"x": 2}}}
    assert {"real", "few", "base"} <= linked()
    assert not {"many", "told"} & linked()


def test_a_changed_real_arm_changes_the_key_of_what_works_with_it(settings):
    settings["real_arms"] = {"many": {"arguments": {"x": 1}}}
    settings["methods"]["told"] = {"configs": [], "anchor": "many"}

    def keys():
        plan = Plan(settings)
        return [plan.key("segmenter", *plan.method_layers(name)) for name in ("told", "base")]

    before = keys()
    settings["real_arms"]["many"]["arguments"]["x"] = 2
    after = keys()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_links_lead_to_the_experiment_that_is_extended_now(settings):
    """Not to the one that it extended before, nor to where the project once was."""
    more = Plan(settings | {"name": "more", "seeds": [0]})
    real = Path(more.run, "seed0/real")
    for name in ("first", "second"):
        more.share(settings | {"name": name})
        assert real.resolve() == Path(settings["runs"], name, "seed0/real").resolve()
        assert not real.readlink().is_absolute()
    real.unlink()
    real.symlink_to("/where/it/once/was")
    more.share(settings | {"name": "second"})
    assert real.resolve().is_dir()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({}, "method new has no configs, and there is no configs/methods/new.yaml"),
        ({"configs": [], "stage": "magic"}, "method new is trained by stage magic; choose miner"),
        ({"configs": [], "network": "base"}, "method new takes the network of base, which trains none"),
        ({"subset": {"of": "base"}}, "subset of method new needs of and tau"),
        ({"subset": {"of": "base", "tau": 0}, "budgets": [1, 3]}, "taken whole: give one budget"),
        ({"configs": [], "anchor": "nobody/3x"}, "method new builds on nobody; list it before new"),
    ],
)
def test_contradictions_are_refused(settings, method, reason):
    settings["methods"]["new"] = method
    with pytest.raises(InputError, match=reason):
        Plan(settings)


def test_a_network_trained_against_another_anchor_has_another_key(settings):
    def key(anchor):
        settings["methods"]["round_2"] = {"configs": [], "stage": "miner", "anchor": anchor}
        plan = Plan(settings)
        return plan.key(*plan.training_layers("round_2"))

    assert len({key(anchor) for anchor in ("real", "base/1x", "base/3x")}) == 3


def test_absent_stages_are_named(settings):
    del settings["stages"]["synthesis"], settings["stages"]["glance_scorer"]
    with pytest.raises(InputError, match="longtail: stages lacks glance_scorer, synthesis"):
        Plan(settings)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"stages": {"segmentor": {"configs": []}}},
            "stages has segmentor, which is none; choose among reference",
        ),
        (
            {"stages": {"miner": {"configs": ["no.yaml"]}}},
            r"stages\.miner takes no\.yaml, which does not exist",
        ),
        ({"methods": {"base": {"configs": ["no.yaml"]}}}, r"methods\.base takes no\.yaml"),
        (
            {"methods": {"miner": {"training": {"configs": ["no.yaml"]}}}},
            r"methods\.miner\.training takes no",
        ),
        ({"real_arms": {"flipped": {"configs": ["no.yaml"]}}}, r"real_arms\.flipped takes no\.yaml"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_planned(settings, changed, reason):
    with pytest.raises(InputError, match=reason):
        Plan(over(settings, changed))


def test_values_are_written_as_yaml_reads_them():
    line = arguments(
        {"configs": ["a.yaml"], "arguments": {"x": None, "y": [1, "b"], "z": "text"}}, flags="--f=1"
    )
    assert line == """--config a.yaml --f=1 '--x=null' '--y=[1, "b"]' '--z=text'"""
