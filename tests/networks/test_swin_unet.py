import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer

from errors import InputError
from networks import SwinUnet
from networks.pretrained import load_pretrained, save_pretrained
from original import draw, fixture, normal

SMALL = {"size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


def small(**changes):
    torch.manual_seed(0)
    return SwinUnet(3, 2, **SMALL | changes)


def drawn(network):
    floats = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
    kept = {name: draw(name, list(value.shape)) for name, value in floats.items() if "attn_mask" not in name}
    assert not network.load_state_dict(kept, strict=False).unexpected_keys
    return network.eval()


def test_it_answers_as_the_authors_code():
    """Every 997th logit of theirs for 224 × 224 pixels, five classes, eight features."""
    network = drawn(SwinUnet(3, 5, 224, embed_dim=8, num_heads=(1, 1, 2, 2)))
    with torch.no_grad():
        logits = network(normal("image", (2, 3, 224, 224)).clamp(-1, 1))
    assert logits.shape == (2, 5, 224, 224)
    assert torch.allclose(logits.flatten()[::997], torch.tensor(fixture("swin_unet")["output"]), atol=1e-4)


def test_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in SwinUnet(1, 9).parameters()) == 27_168_900


def test_grey_images_are_repeated():
    network = small().eval()
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
        assert network.features(grey).shape == (2, 16, 8, 8)


@pytest.mark.parametrize("layout", ["timm", "authors"])
def test_weights_of_imagenet_start_encoder_and_decoder(layout, tmp_path):
    torch.manual_seed(3)
    source = SwinTransformer(32, 2, 3, 10, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    weights = {k: v for k, v in source.state_dict().items() if "attn_mask" not in k}
    if layout == "authors":  # merging stands at the end of a level, the head is one layer
        weights = {
            k.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): v
            for k, v in weights.items()
        }
        torch.save({"model": weights}, tmp_path / "swin.pth")
    else:
        torch.save(weights, tmp_path / "swin.pth")
    network = small(pretrained=str(tmp_path / "swin.pth"))
    own, given = network.encoder.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in own if name in given)
    assert any(name.startswith("layers.1.downsample.reduction") for name in own)
    for name, value in network.decoder[0].blocks.state_dict().items():
        assert torch.equal(value, given[f"layers.0.blocks.{name}"]), name
    save_pretrained(network, tmp_path / "weights", {})
    assert load_pretrained(tmp_path / "weights", SwinUnet).fingerprint() == network.fingerprint()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"layers.0.blocks.0.norm1.weight": torch.ones(4)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: \d+ of the encoder's weights are missing"):
        small(pretrained=str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match=r"nowhere.pth: no such checkpoint file"):
        small(pretrained=str(tmp_path / "nowhere.pth"))


def test_the_hub_is_asked_for_the_authors_weights(monkeypatch):
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return SwinTransformer(32, 2, 3, 10, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)

    monkeypatch.setattr(timm, "create_model", create)
    small(pretrained="hub")
    assert asked == [("swin_tiny_patch4_window7_224.ms_in1k", True)]


def test_sizes_that_do_not_fit():
    with pytest.raises(InputError, match=r"size 30: must be a multiple of 4 for patches of 2 pixels"):
        small(size=30)
    with pytest.raises(ValueError, match="the network takes 32²"):
        small()(torch.zeros(1, 3, 64, 64))


def test_it_learns():
    network = small(drop_path=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    torch.manual_seed(1)
    mask = torch.zeros(8, 32, 32, dtype=torch.long)
    for k in range(8):
        mask[k, k : k + 12, 10:20] = 1
    image = (mask[:, None].float() - 0.5).expand(-1, 3, -1, -1) + 0.1 * torch.randn(8, 3, 32, 32)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(network(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
