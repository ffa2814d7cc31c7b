import json
from dataclasses import asdict, replace

import pytest

from errors import InputError
from evaluation.report.collect import Row
from evaluation.table import (
    arms_table,
    class_tables,
    correlations,
    differences_table,
    grand_table,
    main,
    measures_table,
    together,
    with_rare,
    without,
)


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


SETS = [
    {"method": "base", "seed": 0, "adversariality": 0.1, "fid": 0.002, "kl": 0.0, "calls_per_image": 50.0},
    {"method": "base", "seed": 1, "adversariality": 0.3, "fid": 0.004, "kl": 0.0, "calls_per_image": 50.0},
    {"method": "best", "seed": 0, "adversariality": 0.5, "fid": None, "kl": None, "calls_per_image": 200.0},
]
BEST = [row(88.0, "best", 1), row(89.0, "best", 1, 1), row(70.0, "nnunet")]


def test_arms_beside_their_sets():
    table = arms_table([*ACDC, *BEST], SETS, "test")
    heads = ("Δ base", "95 % interval", "adversariality", "FID × 10³", "KL, nats", "calls")
    assert table.columns == ("Arm", "DSC, test", "Δ real", *heads)
    assert table.cells == [
        ("real", "81.00 ± 1.41", "", "", "", "", "", "", ""),
        ("base 1×", "84.50 ± 2.12", "+3.50 ± 0.71", "", "", "0.200", "3.00", "0.0", "50"),
        ("best 1×", "88.50 ± 0.71", "+7.50 ± 0.71", "+4.00 ± 1.41", "–", "0.500", "", "", "200"),
        ("nnunet", "70.00 ± –", "−10.00 ± –", "", "", "", "", "", ""),
    ]
    best_first = arms_table([*ACDC, *BEST], SETS, "test", best_first=True)
    assert best_first.methods == ["best", "base", "real", "nnunet"]
    assert sorted(best_first.cells) == sorted(table.cells)
    three = [*ACDC, row(81.0, seed=2), row(84.0, "base", 1, 2), *BEST, row(90.0, "best", 1, 2)]
    # differences 5, 3, 6: mean 14/3, sd √(7/3), half width 4.3027 sd / √3
    assert arms_table(three, [], "test").cells[2] == (
        *("best 1×", "89.00 ± 1.00", "+8.00 ± 1.00", "+4.67 ± 1.53", "[+0.87, +8.46]"),
    )
    with pytest.raises(InputError, match="test set etis: is unknown; choose from test"):
        arms_table(ACDC, SETS, "etis")


def test_harder_is_better_where_masks_are_kept():
    """Hard sets that miss their masks turn the order round."""
    facts = {
        "a": (0.1, 98.0, 80.0),
        "b": (0.2, 97.0, 82.0),
        "c": (0.3, 95.0, 83.0),
        "wrong": (0.9, 30.0, 60.0),
    }
    rows = [row(dsc, name, 3, seed) for name, (*_, dsc) in facts.items() for seed in (0, 1)]
    sets = [{"method": m, "adversariality": a, "mask_fidelity": f} for m, (a, f, _) in facts.items()]
    note = "Spearman's ρ of DSC and adversariality, 3×: "
    faithful = "+1.00 over the 3 with a mask fidelity of 95 or more."
    assert correlations(rows, sets, "test") == [f"{note}−0.20 over all 4 sets, {faithful}"]
    assert correlations([*rows, *ACDC], sets, "test") == correlations(rows, sets, "test")
    assert correlations(rows, [one for one in sets if one["method"] != "b"], "test") == [
        f"{note}−0.50 over all 3 sets."
    ]
    assert correlations(rows, [], "test") == []


def test_rare_is_what_most_plain_samples_do_not_show():
    def made(method, **counts):
        return {"method": method, "modes": {"histogram": counts}}

    sets = [made("base", dark=1, bright=3), made("base", dark=5, bright=4), made("mined", dark=3, bright=1)]
    untold = {"method": "sdedit", "modes": None}
    assert [one.get("rare") for one in with_rare([*sets, untold])] == [0.25, 5 / 9, 0.75, None]
    assert with_rare([*sets[2:], untold]) == [*sets[2:], untold]
    rows = [row(80.0 + one, name, 3) for one, name in enumerate("abc")]
    rare = [{"method": name, "rare": share} for name, share in zip("abc", (0.9, 0.5, 0.7), strict=True)]
    assert correlations(rows, rare, "test") == [
        "Spearman's ρ of DSC and share of rare appearances, 3×: −0.50 over all 3 sets."
    ]


def test_command_for_sets(tmp_path, capsys):
    polyps = tmp_path / "polyps.json"
    polyps.write_text(json.dumps({"rows": [asdict(one) for one in POLYPS], "synthetic_sets": []}))
    main([str(polyps), "--sets"])
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Arm")]
    assert [head.split(" | ")[1] for head in heads] == ["DSC, a", "DSC, b"]
    main([str(polyps), "--sets", "--test-set", "a", "--best-first"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| miner 3×", "| real"]
    with pytest.raises(InputError, match="test set etis: is unknown"):
        main([str(polyps), "--sets", "--test-set", "etis"])


def by_class(dsc, segmenter, seed, asd=None):
    scores = {"dsc": dsc, "asd": asd, "n_cases": 8, "dsc/ring": dsc + 2, "dsc/core": dsc - 2, "asd/ring": 1.5}
    return replace(row(dsc, seed=seed), segmenter=segmenter, scores=scores)


def test_classes_of_several_segmenters():
    rows = [by_class(80.0 + seed, name, seed) for name in ("NNUNet", "SwinUnet") for seed in (0, 2)]
    tables = class_tables([*rows, *POLYPS], "test", ["dsc", "asd"])
    assert list(tables) == [("acdc", "dsc"), ("acdc", "asd")]
    assert tables["acdc", "dsc"].columns == ("Segmenter", "Arm", "mean", "ring", "core")
    assert tables["acdc", "dsc"].cells == [
        (name, "real", "81.00 ± 1.41", "83.00 ± 1.41", "79.00 ± 1.41") for name in ("NNUNet", "SwinUnet")
    ]
    assert tables["acdc", "asd"].cells[0] == ("NNUNet", "real", "–", "1.50 ± 0.00", "–")
    alone = class_tables(rows[:2], "test", ["dsc"])["acdc", "dsc"]
    assert alone.columns == ("Arm", "mean", "ring", "core")
    with pytest.raises(InputError, match=r"measure hd: is unknown; choose from dsc, asd$"):
        class_tables(rows, "test", ["hd"])
    with pytest.raises(InputError, match="polyps, a: no scores by class"):
        class_tables(POLYPS, "a", ["dsc"])


def test_command_for_classes(tmp_path, capsys):
    path = tmp_path / "acdc.json"
    path.write_text(json.dumps({"rows": [asdict(by_class(80.0, "NNUNet", 0, 2.0))]}))
    main([str(path), "--classes", "dsc", "asd"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("acdc")] == ["acdc, test: dsc", "acdc, test: asd"]
    assert "| real | 2.00 ± – | 1.50 ± – | – |" in lines


def test_differences_to_any_arm():
    """Paired by seed; the arm has its own budget, whatever that of the others."""
    three = [*ACDC, row(81.0, seed=2), row(84.0, "base", 1, 2), *BEST[:2], row(90.0, "best", 1, 2)]
    plain = [row(dsc, "all_plain", 8, seed) for seed, dsc in enumerate((85.0, 85.0, 88.0))]
    table = differences_table([*three, *plain], "test", "all_plain/8x")
    assert table.columns[1] == "ΔDSC to all_plain 8×, test"
    assert table.cells == [
        ("real", "−5.00 ± 2.00", "[−9.97, −0.03]"),  # −5, −3, −7: 4.3027 · 2 / √3 = 4.97
        ("base 1×", "−1.67 ± 2.52", "[−7.92, +4.58]"),  # −2, 1, −4
        ("best 1×", "+3.00 ± 1.00", "[+0.52, +5.48]"),  # 3, 4, 2
    ]
    turned = differences_table([*three, *plain], "test", "best/1x")
    assert dict(zip(turned.methods, turned.cells, strict=True))["all_plain"][1:] == (
        "−3.00 ± 1.00",
        "[−5.48, −0.52]",
    )
    with pytest.raises(InputError, match="arm base/3x: is unknown; choose from real, base/1x, best/1x, all_"):
        differences_table([*three, *plain], "test", "base/3x")


def test_experiments_are_no_seeds_of_one_another(tmp_path, capsys):
    paths = []
    for name, dsc in (("one", 80.0), ("two", 90.0)):
        paths.append(tmp_path / f"{name}.json")
        scored = replace(row(dsc), scores={"dsc": dsc, "dsc/a": dsc})
        paths[-1].write_text(json.dumps({"rows": [asdict(scored)], "synthetic_sets": []}))
    with pytest.raises(InputError, match="real of seed 0 is in two of the experiments"):
        main([*map(str, paths), "--classes", "dsc"])
    main([*map(str, paths), "--sets"])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("**")] == [f"**{p}**" for p in paths]


def test_seeds_of_several_experiments_are_taken_together(tmp_path, capsys):
    """Three pairs in place of two, in the arms of both: +3, +4 and +5.5."""
    other = [row(84.0, seed=7), row(89.5, "base", 1, 7), row(99.0, "best", 1, 7)]
    sets = [{"method": "base", "seed": 7, "fid": 1.0}, {"method": "best", "seed": 7, "fid": 2.0}]
    rows, found = together([(ACDC, []), (other, sets)])
    assert rows == [*ACDC, *other[:2]]
    assert found == sets[:1]
    paths = []
    for name, kept in (("one", ACDC), ("two", other)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"rows": [asdict(one) for one in kept]}))
    main([*map(str, paths), "--together", "--against", "real"])
    printed = capsys.readouterr().out
    assert "| base 1× | +4.17 ± 1.26 | [+1.04, +7.29] |" in printed  # 4.3027 · 1.2583 / √3 = 3.13
    assert "best" not in printed
    with pytest.raises(InputError, match="seed 0 is in two of the experiments"):
        main([*map(str, paths[:1] * 2), "--together"])
    with pytest.raises(InputError, match="no arm is in all"):
        together([(ACDC[:2], []), (other[1:], [])])


def test_classes_can_be_left_out():
    scores = {"dsc": 60.0, "asd": 2.0, "n_cases": 8, "dsc/a": 80.0, "dsc/b": 70.0, "dsc/c": 30.0}
    scores |= {"asd/a": 1.0, "asd/b": None, "asd/c": 3.0}
    (one,) = without([replace(row(60.0), scores=scores)], ["c"])
    assert (one.dsc, one.asd, one.classes) == (75.0, 1.0, ["a", "b"])
    kept = {key: value for key, value in scores.items() if not key.endswith("/c")}
    assert one.scores == kept | {"dsc": 75.0, "asd": 1.0}
    with pytest.raises(InputError, match="class d: acdc has no scores of it; it has a, b"):
        without([one], ["d"])
    with pytest.raises(InputError, match="acdc: no class is left"):
        without([one], ["a", "b"])
    with pytest.raises(InputError, match=r"class a: acdc has no scores of it; make its report\.json anew"):
        without([row(60.0)], ["a"])


def test_command_for_differences(tmp_path, capsys):
    path = tmp_path / "acdc.json"
    path.write_text(json.dumps({"rows": [asdict(by_class(80.0 + seed, "NNUNet", seed)) for seed in (0, 1)]}))
    main([str(path), "--without", "core"])
    assert "| none | real | 82.50 ± 0.71 |" in capsys.readouterr().out
    path.write_text(json.dumps({"rows": [asdict(one) for one in ACDC]}))
    main([str(path), "--against", "real"])
    assert "| base 1× | +3.50 ± 0.71 | – |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(path), "--against", "real", "--sets"])
    assert "--sets: not allowed with argument --against" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "is missing; make it"), ("[]", "no report"), ("{", "no report")]
)
def test_runs_without_a_report(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report/report.json").write_text(content)
    with pytest.raises(InputError, match=problem):
        main([str(tmp_path)])


def test_any_figure_of_the_sets_may_be_asked_for():
    sets = [
        {"method": "base", "noise": {"norm": {"z": -1.0}}, "gain": {"all": {"gain": 0.0012345}}},
        {"method": "base", "noise": {"norm": {"z": 2.0}}, "gain": {"all": {"gain": 0.0012345}}},
        {"method": "ag", "noise": None, "gain": {"all": {"gain": -0.002}}},
    ]
    table = measures_table(sets, ["noise.norm.z", "gain.all.gain"])
    assert table.cells == [("base", "0.5 ± 2.1", "0.00123 ± 0"), ("ag", "", "−0.002 ± –")]
    with pytest.raises(InputError, match=r"noise\.norm: no synthetic set of the report has a number there"):
        measures_table(sets, ["noise.norm"])
