import numpy as np
import pytest

from conftest import files_of
from datamodules import twins
from errors import InputError


@pytest.mark.parametrize(("dataset", "form"), twins.FORMS)
def test_twins_depend_on_the_seed_alone(tmp_path, dataset, form):
    cases = 10 if dataset == "polyps" else 5
    a, b, c = (twins.write_twin(dataset, form, tmp_path / str(k), cases, 32, seed=k // 2) for k in range(3))
    assert files_of(a) == files_of(b)
    assert files_of(a).keys() == files_of(c).keys()
    assert files_of(a) != files_of(c)


@pytest.mark.parametrize(("dataset", "classes"), [("acdc", 4), ("synapse", 9), ("mmwhs", 8)])
def test_volumes_hold_every_class_and_differ(dataset, classes):
    volumes = [
        twins.twin_volume(dataset, k, 48, variant=k % 2 if dataset != "synapse" else 0) for k in range(4)
    ]
    for volume in volumes:
        assert volume.image.shape == volume.label.shape == (twins.DEPTH, 48, 42)
        assert np.unique(volume.label).tolist() == list(range(classes))
        slices = {plane.tobytes() for plane in volume.image}
        assert len(slices) == twins.DEPTH
        sizes = (volume.label > 0).sum((1, 2))
        assert sizes[0] < sizes[twins.DEPTH // 2] > sizes[-1]
    assert len({volume.image.tobytes() for volume in volumes}) == len(volumes)


def test_command(tmp_path, capsys):
    arguments = ["--dataset", "acdc", "--form", "wsl4mis", "--output", str(tmp_path / "a")]
    twins.main([*arguments, "--cases", "5", "--size", "32"])
    assert "70 files of 5 phantom cases" in capsys.readouterr().out
    with pytest.raises(InputError, match="not an empty folder"):
        twins.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("acdc", "dicom"), "no twin is acdc, dicom; there are acdc, nifti"),
        (("acdc", "nifti", "x", 4), "cases is 4"),
        (("synapse", "btcv", "x", 50), "ask for 30 at most"),
        (("acdc", "nifti", "x", 5, 16), "size is 16"),
    ],
)
def test_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        twins.write_twin(*arguments, **({} if len(arguments) > 2 else {"output": "x"}))


def test_volumes_of_no_data_set():
    with pytest.raises(InputError, match="dataset is 'polyps'"):
        twins.twin_volume("polyps", 0)
