import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import make_segmenter
from datamodules.sources import PhantomSource
from datamodules.sources.configured import read_source
from datamodules.sources.phantom import MODE_NAMES
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation import synthetic as module
from evaluation.distribution import diversity, features_of, kid, precision_recall, vendi
from evaluation.fid import EncoderFeatures, fid
from evaluation.fidelity import adversariality, mask_fidelity
from evaluation.modes import mode_histogram
from evaluation.synthetic import main, measure, write_examples
from networks.pretrained import save_pretrained

PHANTOM = {"family": "polyp", "size": 32, "n_train": 6, "n_val": 4, "n_test": 5}
N = 4


@pytest.fixture
def made(tmp_path):
    """Files of a measurement: a synthetic set of noise, a segmenter, and a config that names phantoms."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "synthetic"
    lines = []
    for i in range(N):
        files = {kind: f"{kind}s/{i:06d}.png" for kind in ("image", "mask")}
        for kind, file in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            size, top = ((32, 32, 3), 256) if kind == "image" else ((32, 32), 2)
            Image.fromarray(rng.integers(0, top, size, dtype=np.uint8)).save(folder / file)
        entry = {
            "index": i,
            "source_mask": f"train-{i % 2:05d}",
            "value": i / 10,
            "kl": 2.0 * i,
            "seconds": 0.5,
            "calls": 50.0,
        }
        lines.append(json.dumps(entry | files) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    facts = {"method": "miner", "backbone": "SegDiff", "seed": 3, "reward": "bounded_ce"}
    (folder / "dataset.json").write_text(json.dumps(facts))

    save_pretrained(make_segmenter().eval(), tmp_path / "weights", {})
    source = {"class_path": "PhantomSource", "init_args": PHANTOM}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"init_args": {"source": source}}}))
    return SimpleNamespace(set=folder, weights=tmp_path / "weights", config=config)


def test_measure_is_means_over_the_samples_and_the_distance(made, source):
    extractor = EncoderFeatures(make_segmenter(), "reference")
    synthetic, real = SyntheticSet(made.set), source.dataset("test")
    figures = measure(synthetic, real, extractor)
    images = [torch.stack([s[i]["image"] for i in range(len(s))]) for s in (real, synthetic)]
    assert figures.pop("fid") == pytest.approx(fid([images[0]], [images[1]], extractor))
    assert figures.pop("adversariality") == pytest.approx(0.15)
    samples, modes = figures.pop("samples"), figures.pop("modes")
    assert samples == {"mode": mode_histogram(real, synthetic).predicted.tolist()}
    assert sum(modes["histogram"].values()) == N
    features = [features_of(dataset, extractor) for dataset in (real, synthetic)]
    precision, recall = precision_recall(*features)
    assert 0 <= precision <= 1
    assert figures == {
        "kid": kid(*features),
        "precision": precision,
        "recall": recall,
        "diversity": diversity(features[1]),
        "vendi": vendi(features[1]),
        "method": "miner",
        "backbone": "SegDiff",
        "seed": 3,
        "n": N,
        "reward": "bounded_ce",
        "fid_extractor": "reference",
        "seconds_per_image": 0.5,
        "calls_per_image": 50.0,
        "kl": 3.0,
        "values": [0.0, 0.1, 0.2, 0.3],
    }


def test_judge_and_anchor_are_asked_where_they_are_given(made, source):
    synthetic, real = SyntheticSet(made.set), source.dataset("test")
    judge, anchor = make_segmenter(seed=1), make_segmenter(seed=2)
    figures = measure(synthetic, real, EncoderFeatures(make_segmenter()), judge, anchor)
    dsc, rewards = mask_fidelity(synthetic, judge), adversariality(synthetic, anchor)
    assert figures["judge"] == f"NNUNet {judge.fingerprint()[:8]}"
    assert figures["anchor"] == f"NNUNet {anchor.fingerprint()[:8]}"
    assert figures["mask_fidelity"] == pytest.approx(float(dsc.mean()))
    assert figures["samples"]["mask_fidelity"] == dsc.tolist()
    assert figures["rewards"] == {name: pytest.approx(float(value.mean())) for name, value in rewards.items()}
    assert figures["samples"]["rewards"] == {name: value.tolist() for name, value in rewards.items()}
    assert figures["values"] == rewards["bounded_ce"].tolist()
    assert figures["adversariality"] == pytest.approx(float(rewards["bounded_ce"].mean()))


def test_noise_is_compared_with_the_prior_where_it_was_kept(made, source):
    (made.set / "noise").mkdir()
    rng = np.random.default_rng(0)
    shift = np.array([0, 0.5, 0], np.float32)[:, None, None]
    for i in range(N):
        x_T = rng.standard_normal((3, 32, 32), np.float32) + shift
        np.save(made.set / "noise" / f"{i:06d}.npy", x_T)
    figures = measure(SyntheticSet(made.set), source.dataset("test"), EncoderFeatures(make_segmenter()))[
        "noise"
    ]
    assert set(figures) == {"norm", "mean", "variance", "low_frequencies"}
    assert figures["mean"]["value"] == pytest.approx(0.5, abs=0.06)
    assert figures["mean"]["z"] == pytest.approx(0.5 * (N * 32 * 32) ** 0.5, abs=4)
    assert abs(figures["variance"]["z"]) < 4
    assert figures["norm"]["value"] == pytest.approx((1 + 0.25 / 3) ** 0.5, abs=0.02)
    assert figures["low_frequencies"]["z"] > 10


def test_modes_are_learnt_from_the_split_that_shows_them(made, source):
    synthetic = SyntheticSet(made.set)
    shown = PhantomSource(**PHANTOM | {"n_test": 60}).dataset("test_uniform")
    extractor = EncoderFeatures(make_segmenter())
    figures = measure(synthetic, source.dataset("test"), extractor, modes=shown, mode_names=source.mode_names)
    assert list(figures["modes"]["histogram"]) == ["bright", "dark", "striped", "rim", "speckled"]
    numbered = measure(synthetic, source.dataset("test"), extractor, modes=shown)["modes"]["histogram"]
    assert dict(zip("01234", figures["modes"]["histogram"].values(), strict=True)) == numbered
    assert figures["modes"]["accuracy"] > 0.9
    counts, shares = figures["modes"]["histogram"], figures["modes"]["precision"]
    inside = sum(counts[mode] * shares[mode] for mode in counts if counts[mode])
    assert inside / sum(counts.values()) == pytest.approx(figures["precision"])
    unlabelled = [{key: s[key] for key in ("image", "mask")} for s in (shown[i] for i in range(5))]
    assert "modes" not in measure(synthetic, unlabelled, extractor)


def test_what_a_small_set_leaves_undefined_is_null(made, source):
    figures = measure(
        SyntheticSet(made.set, count=1), source.dataset("test"), EncoderFeatures(make_segmenter())
    )
    figures.pop("fid")  # NaN
    assert [figures[key] for key in ("kid", "precision", "recall", "diversity")] == [None] * 4
    assert figures["vendi"] == pytest.approx(1)
    assert "NaN" not in json.dumps(figures)


def test_source_is_the_one_of_the_config(made):
    source = read_source(made.config)
    assert isinstance(source, PhantomSource)
    assert len(source.dataset("test")) == PHANTOM["n_test"]


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "no such file"), ("data: {}", "has no data"), ("[]", "has no data")]
)
def test_config_without_a_source(tmp_path, content, problem):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=problem):
        read_source(path)


def test_examples_are_the_images_that_the_masks_came_from(made, source, tmp_path):
    train = source.dataset("train")
    write_examples(SyntheticSet(made.set), train, tmp_path / "examples")
    files = sorted((tmp_path / "examples").iterdir())
    assert [f.name for f in files] == ["train-00000.png", "train-00001.png"]
    pixels = torch.from_numpy(np.array(Image.open(files[1]))).permute(2, 0, 1)
    torch.testing.assert_close(pixels / 127.5 - 1, train[1]["image"])


def test_grey_examples(made, tmp_path):
    source = PhantomSource("cardiac", size=32, n_train=6, n_val=4, n_test=5)
    write_examples(SyntheticSet(made.set), source.dataset("train"), tmp_path / "examples")
    assert Image.open(tmp_path / "examples/train-00000.png").mode == "L"


def test_command_writes_the_figures_and_the_examples(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "inception", lambda weights: None)
    output, examples = tmp_path / "synthetic.json", tmp_path / "examples"
    arguments = {
        "set": made.set,
        "config": made.config,
        "split": "val",
        "encoder": made.weights,
        "examples": examples,
        "features": tmp_path / "features.npz",
        "output": output,
    }
    main([f"--{key}={value}" for key, value in arguments.items()])
    figures = json.loads(output.read_text())
    segmenter = make_segmenter()
    real = read_source(made.config).dataset("val")
    networks = EncoderFeatures(segmenter), segmenter
    assert figures == measure(SyntheticSet(made.set), real, *networks, mode_names=MODE_NAMES)
    assert figures["fid_extractor"] == f"NNUNet encoder {segmenter.fingerprint()[:8]}"
    assert len(list(examples.iterdir())) == 2
    with np.load(tmp_path / "features.npz") as features:
        expected = features_of(SyntheticSet(made.set), EncoderFeatures(segmenter))
        np.testing.assert_allclose(features["synthetic"], expected, rtol=1e-5)
        assert features["real"].shape == (len(real), expected.shape[1])
    assert "miner seed 3: 4 samples, adversariality 0.1500 (bounded_ce)" in capsys.readouterr().out


def test_command_takes_a_judge_an_anchor_and_a_split_of_modes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "inception", lambda weights: None)
    networks = {name: make_segmenter(seed=i).eval() for i, name in enumerate(("judge", "anchor"), 1)}
    for name, network in networks.items():
        save_pretrained(network, tmp_path / name, {})
    arguments = {
        "set": made.set,
        "config": made.config,
        "encoder": made.weights,
        "judge": tmp_path / "judge",
        "anchor": tmp_path / "anchor",
        "mode-split": "test_uniform",
        "output": tmp_path / "synthetic.json",
    }
    main([f"--{key}={value}" for key, value in arguments.items()])
    source = read_source(made.config)
    given = source.dataset("test"), EncoderFeatures(make_segmenter()), *networks.values()
    modes = source.dataset("test_uniform")
    expected = measure(SyntheticSet(made.set), *given, modes, mode_names=source.mode_names)
    assert json.loads((tmp_path / "synthetic.json").read_text()) == expected
    for same in ({"judge": tmp_path / "anchor"}, {"anchor": made.weights}):
        with pytest.raises(InputError, match="is the encoder or the judge too"):
            main([f"--{key}={value}" for key, value in (arguments | same).items()])


def test_command_names_a_missing_set(made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "inception", lambda weights: None)
    arguments = ["--config", str(made.config), "--encoder", str(made.weights), "--output", "unused.json"]
    with pytest.raises(InputError, match="no complete synthesised set"):
        main(["--set", str(tmp_path / "absent"), *arguments])
