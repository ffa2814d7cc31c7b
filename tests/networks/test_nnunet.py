import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from safetensors.torch import load_file
from torch import nn

from conftest import make_segmenter
from errors import InputError
from networks import NNUNet
from networks.nnunet import pooling_strides
from networks.pretrained import load_pretrained, save_pretrained


def plain_network(in_channels, num_classes, features, strides):
    """nnU-Net's 2D network as its own package builds it."""
    return PlainConvUNet(
        in_channels,
        len(features),
        features,
        nn.Conv2d,
        3,
        strides,
        2,
        num_classes,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def z_score(image):
    return (image - image.mean((1, 2, 3), keepdim=True)) / (image.std((1, 2, 3), keepdim=True) + 1e-5)


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("patch", "stages"), [((256, 256), 7), ((64, 64), 5), ((32, 32), 4), ((224, 224), 6), ((64, 32), 4)]
)
def test_stages_of_a_patch(patch, stages):
    strides = pooling_strides(patch)
    assert len(strides) == stages
    assert strides[0] == (1, 1)


def test_short_edges_stop_pooling_first():
    """An edge is halved alone from 12 pixels up, together with the other one from 8."""
    assert pooling_strides((64, 32)) == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert pooling_strides((96, 32)) == [(1, 1), (2, 2), (2, 2), (2, 2), (2, 1)]


def test_patches_that_cannot_be_halved_are_refused():
    with pytest.raises(InputError, match="patch_size 7 × 7: too small"):
        NNUNet(patch_size=(7, 7))


def test_every_weight_learns_without_deep_supervision():
    """Where one had no gradient DDP would stop in the second step."""
    network = make_segmenter(deep_supervision=False).train()
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_published_network_at_256():
    with torch.device("meta"):
        ours = NNUNet(in_channels=3, num_classes=2, patch_size=(256, 256))
        theirs = plain_network(3, 2, [32, 64, 128, 256, 512, 512, 512], [1, 2, 2, 2, 2, 2, 2])
    assert count(ours) == count(theirs)
    assert count(ours) == pytest.approx(33.47e6, rel=2e-4)


@pytest.mark.parametrize("size", [32, 64])
def test_outputs_are_those_of_the_package(size):
    ours = NNUNet(3, 4, (size, size), base_features=4, max_features=16)
    stages = {32: 4, 64: 5}[size]
    theirs = plain_network(3, 4, [4, 8, 16, 16, 16][:stages], [1] + [2] * (stages - 1))
    assert count(ours) == count(theirs)
    missing, unexpected = theirs.load_state_dict(ours.network.state_dict(), strict=False)
    assert unexpected == []
    # What is missing are second names of tensors that were loaded under their first.
    loaded = {theirs.state_dict()[key].data_ptr() for key in ours.network.state_dict()}
    assert all(theirs.state_dict()[key].data_ptr() in loaded for key in missing)
    image = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        for mine, reference in zip(ours.train()(image), theirs.train()(z_score(image)), strict=True):
            assert torch.equal(mine, reference)


def test_no_weight_is_saved_twice(tmp_path):
    segmenter = make_segmenter()
    save_pretrained(segmenter, tmp_path / "net", {})
    saved = load_file(next((tmp_path / "net").glob("*.safetensors")))
    assert sum(tensor.numel() for tensor in saved.values()) == count(segmenter)


def test_save_load_and_copy_keep_the_outputs(tmp_path):
    segmenter = make_segmenter(seed=1).eval()
    save_pretrained(segmenter, tmp_path / "net", {})
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = segmenter(image)
        assert torch.equal(load_pretrained(tmp_path / "net", NNUNet)(image), expected)
        twin = copy.deepcopy(segmenter)
        assert torch.equal(twin(image), expected)
        for p in twin.parameters():
            p.zero_()
        assert twin(image).abs().max() == 0  # the copy shares no weight with the original ...
        assert torch.equal(segmenter(image), expected)  # ... nor the original with the copy


def test_deep_supervision_only_while_training():
    segmenter = make_segmenter()
    image = torch.rand(1, 3, 32, 32)
    trained = segmenter.train()(image)
    assert [tuple(level.shape[2:]) for level in trained] == [(32, 32), (16, 16), (8, 8)]
    logits = segmenter.eval()(image)
    assert isinstance(logits, torch.Tensor)
    assert torch.equal(logits, trained[0])  # InstanceNorm has no other mode
    assert isinstance(make_segmenter(deep_supervision=False).train()(image), torch.Tensor)


def test_gradient_flows_to_the_image_through_the_normalisation():
    """Finite differences, and the invariance that a z-score must have."""
    segmenter = make_segmenter().double().eval()
    torch.manual_seed(0)
    image = (torch.rand(1, 3, 32, 32, dtype=torch.double) * 2 - 1).requires_grad_()
    probe = torch.randn(1, 2, 32, 32, dtype=torch.double)

    def value(x):
        return (segmenter(x) * probe).sum()

    gradient = torch.autograd.grad(value(image), image)[0]
    direction, step = torch.randn_like(image), 1e-6
    with torch.no_grad():
        slope = (value(image + step * direction) - value(image - step * direction)) / (2 * step)
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3)
        assert value(0.4 * image + 0.3).item() == pytest.approx(value(image).item(), rel=1e-3)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-6 * gradient.abs().sum().item())


@pytest.mark.parametrize("size", [(33, 32), (32, 36), (20, 20)])
def test_sizes_that_do_not_divide_raise(size):
    with pytest.raises(ValueError, match=f"{size[0]} × {size[1]}"):
        make_segmenter()(torch.rand(1, 3, *size))


def test_features_are_the_deepest_map():
    segmenter = make_segmenter().eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = segmenter.network.encoder(z_score(image))[-1]
        assert torch.equal(segmenter.features(image), expected)
    assert expected.shape == (2, 8, 4, 4)
