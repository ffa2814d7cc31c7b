import pytest
import yaml

from errors import InputError
from workflow.experiment import read, resolved

BASE = {
    "name": "base",
    "data": "d.yaml",
    "methods": {"base": None, "mine": {"stage": "miner"}},
    "embedding": ["base", "mine"],
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
    settings = {"stages": {"miner": {"configs": ["m.yaml", "net.yaml"]}}}
    assert resolved(settings)["stages"]["miner"]["configs"] == ["m.yaml", "net.yaml"]


def test_an_extension_says_only_what_it_changes(base, tmp_path):
    changes = {"name": "more", "methods": {"mine": None, "other": {"stage": "scorer"}}, "data": "new.yaml"}
    changes |= {"extends": base, "stages": {"segmenter": {"arguments": {"steps": 20}}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(changes))
    more = read(tmp_path / "more.yaml")
    assert (more["name"], more["seeds"], more["embedding"]) == ("more", [0], ["mine"])
    assert more["methods"] == {"mine": {"stage": "miner"}, "other": {"stage": "scorer"}}
    assert more["stages"]["segmenter"] == {
        "configs": ["s.yaml", "new.yaml", "net.yaml"],
        "arguments": {"steps": 20, "size": 1},
    }
    again = resolved({"extends": str(tmp_path / "more.yaml"), "name": "again"})
    assert again == more | {"name": "again", "extends": str(tmp_path / "more.yaml")}


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: does not exist"):
        resolved({"extends": str(tmp_path / "nowhere.yaml"), "name": "x"})
