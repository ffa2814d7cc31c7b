import httpx
import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from torch import nn

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


class ByHand(nn.Module):
    """Swin-Unet of single blocks, level by level, with the names that its authors give."""

    def __init__(self, classes, width=96, heads=(3, 6, 12, 24), tokens=56, window=7):
        super().__init__()

        def pair(level):
            dim, edge = width * 2**level, tokens // 2**level
            shifts = (0, window // 2 if edge > window else 0)
            return nn.Sequential(
                *(
                    SwinTransformerBlock(dim, (edge, edge), heads[level], None, window, shift)
                    for shift in shifts
                )
            )

        self.embed = PatchEmbed(tokens * 4, 4, 3, width, norm_layer=nn.LayerNorm, output_fmt="NHWC")
        self.down = nn.ModuleList(pair(level) for level in range(4))
        self.merging = nn.ModuleList(PatchMerging(width * 2**level) for level in range(3))
        self.norm = nn.LayerNorm(8 * width)
        self.expanding = nn.ModuleList(
            nn.Linear(2 * d, 4 * d, bias=False) for d in (4 * width, 2 * width, width)
        )
        self.expanding_norm = nn.ModuleList(nn.LayerNorm(d) for d in (4 * width, 2 * width, width))
        self.concat = nn.ModuleList(nn.Linear(2 * d, d) for d in (4 * width, 2 * width, width))
        self.up = nn.ModuleList(pair(level) for level in (2, 1, 0))
        self.norm_up = nn.LayerNorm(width)
        self.last = nn.Linear(width, 16 * width, bias=False)
        self.last_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes, bias=False)

    @staticmethod
    def spread(x, scale):
        """Features to pixels: by einops where the network reshapes."""
        import einops

        return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=scale, q=scale)

    def forward(self, image):
        x, kept = self.embed((image.repeat(1, 3, 1, 1) + 1) / 2), []
        for level in range(4):
            kept.append(x)
            x = self.down[level](x)
            x = self.merging[level](x) if level < 3 else self.norm(x)
        for step in range(3):
            x = self.expanding_norm[step](self.spread(self.expanding[step](x), 2))
            x = self.up[step](self.concat[step](torch.cat([x, kept[2 - step]], -1)))
        x = self.last_norm(self.spread(self.last(self.norm_up(x)), 4))
        return self.output(x).permute(0, 3, 1, 2)


def by_hand(network):
    """Load the weights of a Swin-Unet of full size into another construction."""
    own = ByHand(network.num_classes)
    parts = [
        (own.embed, network.encoder.patch_embed),
        *((own.down[k], network.encoder.layers[k].blocks) for k in range(4)),
        *((own.merging[k], network.encoder.layers[k + 1].downsample) for k in range(3)),
        (own.norm, network.encoder.norm),
        *((own.expanding[k], network.expand[k].expand) for k in range(3)),
        *((own.expanding_norm[k], network.expand[k].norm) for k in range(3)),
        *((own.concat[k], network.merge[k]) for k in range(3)),
        *((own.up[k], network.decoder[k].blocks) for k in range(3)),
        (own.norm_up, network.norm),
        (own.last, network.last.expand),
        (own.last_norm, network.last.norm),
    ]
    for mine, theirs in parts:
        mine.load_state_dict(theirs.state_dict())
    own.output.weight.data = network.head.weight.data[:, :, 0, 0]
    return own.eval()


def test_outputs_are_those_of_another_construction():
    """At full size, with nine classes."""
    torch.manual_seed(0)
    network = SwinUnet(1, 9).eval()
    other = by_hand(network)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in network.parameters())
    image = torch.rand(1, 1, 224, 224) * 2 - 1
    with torch.no_grad():
        logits = network(image)
        assert logits.std() > 0.01
        assert torch.allclose(logits, other(image), atol=1e-5)


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


@pytest.mark.parametrize("error", [OSError("no route"), httpx.ConnectError("no route")])
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    def create(name, pretrained):
        raise error

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(
        InputError, match=r"pretrained hub: timm/swin_tiny.*cannot be fetched.*give that file"
    ):
        small(pretrained="hub")


def test_swin_t_lands_in_encoder_and_decoder_at_full_size(tmp_path):
    """Level k of Swin-T starts level k of the encoder and the decoder's that mirrors it.

    Its third level has six blocks, of which the authors' network takes the first two.
    """
    torch.manual_seed(4)
    given = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    torch.save(given.state_dict(), tmp_path / "swin_tiny.pth")
    given = {name: value for name, value in given.state_dict().items() if value.is_floating_point()}
    network = SwinUnet(1, 9, pretrained=str(tmp_path / "swin_tiny.pth"))
    own = network.encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in given.items() if name in own)
    assert all(name in given for name, value in own.items() if value.is_floating_point())
    left = {".".join(name.split(".")[:4]) for name in given if name not in own}
    assert left == {"head.fc.weight", "head.fc.bias", *(f"layers.2.blocks.{k}" for k in (2, 3, 4, 5))}
    for step, level in enumerate((2, 1, 0)):
        for name, value in network.decoder[step].blocks.state_dict().items():
            assert torch.equal(value, own[f"layers.{level}.blocks.{name}"]), name


def test_sizes_that_do_not_fit():
    with pytest.raises(InputError, match=r"size 30: must be a multiple of 4 for patches of 2 pixels"):
        small(size=30)
    with pytest.raises(ValueError, match="the network takes 32 × 32 alone"):
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
