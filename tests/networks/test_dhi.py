import torch
import torch.nn.functional as F

from networks.dhi import DenseHintInput, PatchMerging, siamese_hint


def test_published_size():
    hint = siamese_hint(320)
    assert hint[0].features == 256
    assert {name.split(".")[0] for name, _ in hint[0].named_parameters()} == {
        "initial_conv",
        *(f"layer{k}" for k in range(1, 6)),
        *(f"conv_before_res{k}" for k in range(2, 6)),
        *(f"patch_merge{k}" for k in range(1, 4)),
    }
    assert hint(torch.rand(1, 3, 64, 48)).shape == (1, 320, 8, 6)
    assert not hint(torch.rand(1, 3, 16, 16)).any()  # the last convolution starts at zero


def test_a_smaller_one_halves_less_often():
    dense = DenseHintInput(1, width=4, merges=1)
    assert dense.features == 16
    assert dense(torch.rand(2, 1, 8, 6)).shape == (2, 16, 4, 3)


def test_patches_are_gathered_column_by_column():
    torch.manual_seed(0)
    merge = PatchMerging(2)
    x = torch.randn(1, 2, 4, 4)
    patch = torch.cat([x[0, :, 2, 0], x[0, :, 3, 0], x[0, :, 2, 1], x[0, :, 3, 1]])
    expected = merge.reduction(F.layer_norm(patch, (8,)))
    assert torch.allclose(merge(x)[0, :, 1, 0], expected, atol=1e-6)
