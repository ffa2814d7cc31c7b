import json

import pytest

from conftest import make_backbone
from datamodules.sources.synthetic import SyntheticSet
from diffusion.sampler import Sampler
from errors import InputError
from evaluation.foresight import GLANCES, SIGNALS, foresight, main
from methods import DiffAug
from networks.pretrained import load_pretrained, save_pretrained
from networks.scorer import Scorer
from networks.segmenter import Segmenter


def test_the_whole_schedule_foretells_all(plain_samples, weights):
    backbone = make_backbone().freeze()
    anchor = load_pretrained(weights.segmenter, Segmenter).freeze()
    rows = foresight(
        SyntheticSet(plain_samples), Sampler(backbone, 2), anchor, Scorer(width=4, inputs="noise").eval()
    )
    by_kind = {(row["kind"], row["signal"], row["calls"]): row["spearman"] for row in rows}
    assert all(row["spearman_within"] is None for row in rows)  # two samples of each of six masks
    assert by_kind["estimate", None, 2] > 0.97  # only rounding to 8 bits lies between
    assert [key for key in by_kind if key[0] == "estimate"] == [("estimate", None, 1), ("estimate", None, 2)]
    assert len([key for key in by_kind if key[0] == "glance"]) == len(SIGNALS) * len(GLANCES)
    assert ("scorer", None, 0) in by_kind
    assert all(-1 <= value <= 1 for value in by_kind.values())
    assert by_kind["scorer", None, 0] < 0.9  # it has learnt nothing


def test_command(plain_samples, weights, tmp_path, capsys):
    output = tmp_path / "foresight.json"
    save_pretrained(Scorer(width=4), tmp_path / "scorer", {})
    arguments = {
        "set": plain_samples,
        "backbone": weights.backbone,
        "anchor": weights.segmenter,
        "scorer": tmp_path / "scorer",
        "steps": 2,
        "output": output,
    }
    main([f"--{key}={value}" for key, value in arguments.items()])
    figures = json.loads(output.read_text())
    assert (figures["n"], figures["steps"]) == (12, 2)
    assert len(figures["rows"]) == 2 + len(SIGNALS) * len(GLANCES) + 1
    assert "estimate, calls 2: ρ = " in capsys.readouterr().out


def test_what_it_cannot_tell_is_refused(plain_samples, made_by, weights):
    anchor = load_pretrained(weights.segmenter, Segmenter).freeze()
    with pytest.raises(InputError, match="made by diffaug"):
        foresight(SyntheticSet(made_by(DiffAug())), Sampler(make_backbone().freeze(), 2), anchor)
    with pytest.raises(InputError, match="another backbone"):
        foresight(SyntheticSet(plain_samples), Sampler(make_backbone(seed=5).freeze(), 2), anchor)
