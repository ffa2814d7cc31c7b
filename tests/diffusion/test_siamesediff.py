import pytest
import torch

from benchmarks.siamese_step import deep_copied
from conftest import latent_batch, make_controlldm
from diffusion.backbones import SiameseDiff, TrainingBatch
from diffusion.checkpoints import layout
from original import fixture, inputs


@pytest.fixture
def batch():
    return latent_batch(make_siamese(), t=[0, 200, 201, 999])


def make_siamese(**changes):
    return make_controlldm(kind=SiameseDiff, **{"learn": "decoder", **changes})


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 1.0])
def test_loss_is_that_of_deep_copies_term_by_term(batch, progress):
    ours, theirs = make_siamese(), make_siamese()
    example = TrainingBatch(**batch, progress=progress)
    terms, expected = ours.losses(example), deep_copied(theirs, example)
    assert terms.keys() == expected.keys()
    assert ("augmented" in terms) == (progress > 1 / 3)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for name, value in expected.items():
        ours.zero_grad(), theirs.zero_grad()
        terms[name].backward(retain_graph=True)
        value.backward(retain_graph=True)
        for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            given = torch.zeros_like(a) if a.grad is None else a.grad
            wanted = torch.zeros_like(b) if b.grad is None else b.grad
            assert torch.allclose(given, wanted, rtol=1e-3, atol=1e-6), (name, key)
    assert ours.training_loss(example).item() == pytest.approx(sum(expected.values()).item(), rel=1e-5)


def test_the_image_branch_teaches_the_controlnet_and_not_the_unet(batch):
    backbone = make_siamese()
    backbone.losses(TrainingBatch(**batch, progress=0.5))["image"].backward()
    assert all(p.grad is None for p in backbone.unet.parameters())
    assert any(p.grad is not None and p.grad.any() for p in backbone.controlnet.parameters())
    assert any(p.grad is not None and p.grad.any() for p in backbone.hint_encoder.parameters())


@pytest.mark.parametrize("learn", ["control", "decoder", "all"])
def test_gradient_checkpointing_changes_nothing(batch, learn):
    """The U-Net is called with its own weights and with detached ones; each call comes again."""
    plain, thrifty = (make_siamese(learn=learn, gradient_checkpointing=on).train() for on in (False, True))
    losses = [net.training_loss(TrainingBatch(**batch, progress=0.5)) for net in (plain, thrifty)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("step", ["300", "2000"])
def test_loss_and_gradients_are_those_of_the_authors_code(step, originals, tokenizer):
    told, given = fixture("siamesediff")["losses"][step], inputs()
    backbone = SiameseDiff(start=str(originals["siamesediff"]), tokenizer=str(tokenizer))
    heads = backbone.unet.config.attention_head_dim
    assert heads == [1, 1]  # the file does not say; the authors' tiny network had four
    backbone = SiameseDiff(start=str(originals["siamesediff"]), tokenizer=str(tokenizer), heads=4)
    backbone._prompts = lambda batch: given["prompt"]
    batch = TrainingBatch(
        given["image"],
        given["mask"],
        given["x"],
        given["epsilon"],
        given["t"],
        torch.ones(3),
        progress=int(step) / 3000,
    )
    terms = backbone.losses(batch)
    terms["augmented"] = terms.get("augmented", torch.zeros(()))
    expected = told["terms"][:3]  # the fourth is written before samples with t > 200 are left out
    expected.append(told["loss"] - sum(expected))
    assert [term.item() for term in terms.values()] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    loss = sum(terms.values())
    assert loss.item() == pytest.approx(told["loss"], rel=1e-5)
    loss.backward()
    shape = layout.Shape(2, 1, (False, True))
    names = {
        "unet": (layout.UNET, layout.unet_names(shape)),
        "controlnet": (layout.CONTROL, layout.control_names(shape)),
        "hint_encoder": (layout.CONTROL, layout.dhi_names()),
    }
    compared = 0
    for part, (prefix, pairs) in names.items():
        weights = dict(getattr(backbone, part).named_parameters())
        for new, old in layout.renamed(weights, list(pairs), back=True).items():
            if prefix + old in told["gradient_norms"]:
                norm = weights[new].grad.norm().item()
                assert norm == pytest.approx(told["gradient_norms"][prefix + old], rel=1e-3), new
                compared += 1
    assert compared == len(told["gradient_norms"]) > 200
