import pytest
import yaml

from errors import InputError
from workflow.experiment import check_settings, numbers, read, resolved

BASE = {
    "name": "base",
    "data": "d.yaml",
    "methods": {"base": None, "mine": {"stage": "miner"}},
    "embedding": ["base", "mine"],
    "highlight": "base",
    "sweeps": {"n": {1: "base", 2: "mine"}, "m": {1: "base"}},
    "seeds": [0],
    "stages": {
        "segmenter": {"configs": ["s.yaml", "net.yaml"], "arguments": {"steps": 10, "size": 1}},
        "miner": {"configs": ["m.yaml"]},
    },
}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return str(path)


def test_data_comes_after_the_first_file_of_every_stage():
    stages = resolved(
        BASE | {"stages": BASE["stages"] | {"plain": {"configs": ["p.yaml"], "data": "e.yaml"}}}
    )["stages"]
    assert stages["segmenter"] == {
        "configs": ["s.yaml", "d.yaml", "net.yaml"],
        "arguments": {"steps": 10, "size": 1},
    }
    assert stages["miner"] == {"configs": ["m.yaml", "d.yaml"], "arguments": {}}
    assert stages["plain"]["configs"] == ["p.yaml", "e.yaml"]


def test_without_data_the_files_are_those_given():
    settings = {"stages": {"miner": {"configs": ["m.yaml", "net.yaml"]}}, "methods": {}}
    assert resolved(settings)["stages"]["miner"]["configs"] == ["m.yaml", "net.yaml"]


def test_an_extension_says_only_what_it_changes(base, tmp_path):
    changes = {"name": "more", "methods": {"mine": None, "other": {"stage": "scorer"}}, "data": "new.yaml"}
    changes |= {"extends": base, "stages": {"segmenter": {"arguments": {"steps": 20}}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(changes))
    more = read(tmp_path / "more.yaml")
    assert (more["name"], more["seeds"], more["embedding"]) == ("more", [0], ["mine"])
    assert (more["highlight"], more["sweeps"]) == (None, {"n": {2: "mine"}})  # base is gone
    assert more["methods"] == {"mine": {"stage": "miner"}, "other": {"stage": "scorer"}}
    assert more["stages"]["segmenter"] == {
        "configs": ["s.yaml", "new.yaml", "net.yaml"],
        "arguments": {"steps": 20, "size": 1},
    }
    again = resolved({"extends": str(tmp_path / "more.yaml"), "name": "again"})
    assert again == more | {"name": "again", "extends": str(tmp_path / "more.yaml")}


def test_null_takes_an_argument_of_a_stage_back(base):
    more = resolved({"extends": base, "stages": {"segmenter": {"arguments": {"size": None, "depth": 3}}}})
    assert more["stages"]["segmenter"]["arguments"] == {"steps": 10, "depth": 3}


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: does not exist"):
        resolved({"extends": str(tmp_path / "nowhere.yaml"), "name": "x"})


def methods(tmp_path, base, given, **more):
    return resolved({"extends": base, "name": "more", "methods": given, "budgets": [1, 3]} | more)["methods"]


def test_a_method_goes_over_what_the_extended_experiment_has_under_its_name(base, tmp_path):
    given = {"mine": {"training": {"arguments": {"a": 1}}}}
    assert methods(tmp_path, base, given) == {"mine": {"stage": "miner", "training": {"arguments": {"a": 1}}}}


def test_a_method_may_be_like_another(base, tmp_path):
    given = {
        "mine": {"configs": ["x.yaml"], "arguments": {"a": {"b": 1}, "c": 2}},
        "same": {"like": "mine", "arguments": {"a": {"d": 3}}},
        "ag_1": {"like": "ag", "arguments": {"scale": 1}},
    }
    like = methods(tmp_path, base, given)
    assert like["same"] == {
        "stage": "miner",
        "configs": ["x.yaml"],
        "arguments": {"a": {"b": 1, "d": 3}, "c": 2},
    }
    assert like["mine"]["arguments"] == {"a": {"b": 1}, "c": 2}
    assert like["ag_1"] == {"configs": ["configs/methods/ag.yaml"], "arguments": {"scale": 1}}
    with pytest.raises(InputError, match="method same is to be like nothing, which is neither listed"):
        methods(tmp_path, base, {"same": {"like": "nothing"}})


def test_the_default_is_had_by_its_name(base, tmp_path):
    stages = {"plain": {"configs": [], "arguments": {"data.init_args.budget": 12}}}
    found = methods(tmp_path, base, {"all_plain": None, "glance_learnt": None}, stages=stages)
    assert found["all_plain"] == {"subset": {"of": "plain", "tau": -1}, "budgets": [12]}
    reference = found["glance_learnt"]["arguments"]["model.init_args.method.init_args.reference"]
    assert reference == "{arms}/all_plain/12x/weights"
    with pytest.raises(InputError, match=r"names \{all_plain\}, but there is no method all_plain"):
        methods(tmp_path, base, {"glance_learnt": None}, stages=stages)
    with pytest.raises(InputError, match=r"give stages.plain the argument data\.init_args\.budget"):
        methods(tmp_path, base, {"all_plain": None})


def test_an_argument_may_name_a_network_or_an_arm(base, tmp_path):
    names = ["{mine}", "{mine_training}", "{arms}/mine/1x/weights", "{network}"]
    found = methods(tmp_path, base, {"mine": None, "other": {"arguments": {"x": names}}})["other"]
    assert found["arguments"]["x"] == [
        "{arms}/mine/3x/weights",
        "{arms}/mine_training/weights",
        "{arms}/mine/1x/weights",
        "{network}",
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"buget": [3]}, "more: has unknown settings buget; choose among backbone, budgets"),
        ({"methods": {"mine": {"colour": 1}}}, r"more: methods\.mine has unknown settings colour"),
        ({"stages": {"miner": {"argument": {}}}}, r"more: stages\.miner has unknown settings argument;"),
        ({"real_arms": {"more": {"stage": "miner"}}}, r"more: real_arms\.more has unknown settings stage"),
        ({"methods": ["mine"]}, "more: methods must be a mapping"),
        ({"stages": {"miner": "m.yaml"}}, r"more: stages\.miner must be a mapping of its settings"),
    ],
)
def test_settings_that_nothing_reads_are_refused(base, settings, reason):
    with pytest.raises(InputError, match=reason):
        resolved({"extends": base, "name": "more"} | settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fid_source": "train"}, "fid_source train: may be backbone"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": ["one"]}, "seeds must be a list"),
        ({"seeds": [0.5]}, "seeds must be a list"),
        ({"seeds": "012"}, "seeds must be a list"),
        ({"seeds": [0, 0]}, "each must be another one"),
        ({"seeds": [-1]}, "none negative"),
        ({"budgets": 3}, "budgets must be a list"),
        ({"budgets": ["3x"]}, "budgets must be a list"),
        ({"budgets": [0, 3]}, "must be positive"),
    ],
)
def test_seeds_and_budgets_that_cannot_be(settings, reason):
    given = {"methods": {"base": None}, "backbone": "SegDiff", "seeds": ["0", 1], "budgets": [1, 2.5]}
    check_settings(given | {"seeds": numbers(given["seeds"])}, "own.yaml")
    given |= settings
    with pytest.raises(InputError, match=rf"own\.yaml: .*{reason}"):
        check_settings(given | {"seeds": numbers(given["seeds"])}, "own.yaml")
