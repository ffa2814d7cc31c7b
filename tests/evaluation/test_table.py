import json
from dataclasses import asdict

import pytest

from errors import InputError
from evaluation.report.collect import Row
from evaluation.table import grand_table, main


def row(dsc, method="real", budget=0, seed=0, dataset="acdc", test_set="test"):
    backbone = "SegDiff" if budget else "none"
    return Row(dataset, test_set, backbone, "NNUNet", method, budget, seed, dsc, 1.0, 24, 0)


ACDC = [row(80.0), row(82.0, seed=1), row(83.0, "base", 1), row(86.0, "base", 1, 1)]
POLYPS = [
    *(
        row(dsc, seed=seed, dataset="polyps", test_set=name)
        for name in "ab"
        for seed, dsc in enumerate((60, 61))
    ),
    *(row(70.0, "miner", 3, seed, "polyps", "a") for seed in (0, 1)),
]


def test_experiments_stand_side_by_side():
    table = grand_table([ACDC, POLYPS])
    assert table.columns == (
        "Backbone",
        "Arm",
        "acdc, NNUNet: test",
        "polyps, NNUNet: a",
        "polyps, NNUNet: b",
    )
    assert table.cells == [
        ("none", "real", "81.00 ± 1.41", "60.50 ± 0.71", "60.50 ± 0.71"),
        ("SegDiff", "base 1×", "84.50 ± 2.12 (+3.50 ± 0.71)", "–", "–"),
        ("SegDiff", "miner 3×", "–", "70.00 ± 0.00 (+9.50 ± 0.71)", "–"),
    ]
    assert grand_table([ACDC, POLYPS], ["b"]).columns[2:] == ("polyps, NNUNet: b",)


def test_what_cannot_stand_in_one_table_is_refused():
    with pytest.raises(InputError, match=r"none real on acdc, NNUNet: test: two experiments differ"):
        grand_table([ACDC, [row(79.0), row(82.0, seed=1)]])
    with pytest.raises(InputError, match="test set etis: is unknown; choose from test"):
        grand_table([ACDC], ["etis"])


def test_command(tmp_path, capsys):
    (tmp_path / "acdc" / "report").mkdir(parents=True)
    content = {"rows": [asdict(one) for one in ACDC]}
    (tmp_path / "acdc/report/report.json").write_text(json.dumps(content))
    (tmp_path / "polyps.json").write_text(json.dumps({"rows": [asdict(one) for one in POLYPS]}))
    main([str(tmp_path / "acdc"), str(tmp_path / "polyps.json"), "--test-set", "a", "--test-set", "test"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| Backbone | Arm | acdc, NNUNet: test | polyps, NNUNet: a |"
    assert lines[3] == "| SegDiff | base 1× | 84.50 ± 2.12 (+3.50 ± 0.71) | – |"


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "is missing; make it"), ("[]", "no report"), ("{", "no report")]
)
def test_runs_without_a_report(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report/report.json").write_text(content)
    with pytest.raises(InputError, match=problem):
        main([str(tmp_path)])
