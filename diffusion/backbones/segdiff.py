"""SegDiff in pixel space: the mask is concatenated to the noisy image, or its features are added to it.

Konz et al., "Anatomically-Controllable Medical Image Generation with Segmentation-Guided Diffusion
Models", MICCAI 2024, concatenate. Amit et al., "SegDiff: Image Segmentation with Diffusion Probabilistic
Models", 2021, add an encoder of what is given to the U-Net's first layer; there it is the image that is
given, and the mask that is made.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusion.backbones.backbone import Backbone, Prediction, TrainingBatch
from diffusion.checkpoints import Model, described, read_pixel_folder
from diffusion.schedule import add_noise
from errors import InputError
from networks.rrdb import RRDBNet

HIDDEN = -1.0
"""Value of all mask channels where the mask is hidden: no class has it."""


class FirstLayer(nn.Module):
    """The U-Net's first layer over the image, plus features that stand in the channels behind it."""

    def __init__(self, image: nn.Conv2d) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        """Map [x_t, features] ``(B, C + F, H, W)`` to ``(B, F, H, W)``."""
        channels = self.image.in_channels
        return self.image(x[:, :channels]) + x[:, channels:]


class SegDiff(Backbone):
    """A diffusers ``UNet2DModel`` that sees the mask.

    Args:
        image_channels: channels of the images.
        num_classes: classes of the masks, background included.
        mask_encoding: ``index`` is one channel of value class / 255, as Konz et al. have it;
            ``onehot`` is a channel per foreground class, which learns faster from scratch.
        block_out_channels: features of each level; the default is the published network.
        layers_per_block: residual layers a level.
        attention_levels: which levels (0 is the finest) have self-attention.
        norm_num_groups: groups of the GroupNorm; must divide every level's features.
        beta_schedule: ``linear`` or ``scaled_linear``.
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        train_steps: timesteps T of the schedule.
        clip_sample: clip every x̂_0 to [−1, 1] while sampling, as diffusers does by default.
        unconditional: share of training samples whose mask is hidden, for guidance; the published model
            has none.
        guidance: w of classifier-free guidance, ε_∅ + w·(ε_y − ε_∅) (Ho & Salimans, 2022); 1 is none.
            More makes the image follow its mask more closely, for twice the work of a call.
        fusion: ``concat`` gives the U-Net [x_t, mask]; ``sum`` adds features of the mask, from residual dense
            blocks, to those of its first layer.
        encoder_width: features inside that encoder.
        encoder_blocks: its blocks of three dense blocks each.
        prediction: what the network predicts, ``epsilon`` as published, or ``v``.
        snr_gamma: γ of min-SNR weighting of the training loss; None weights all timesteps alike, as
            published. After a short training the images of a model of ``v`` with γ = 5 follow their masks
            much better.
        start: folder that the published code has written (``unet/`` and ``scheduler/``): its network,
            schedule and weights take the place of the arguments that describe them; None starts anew.

    Raises:
        InputError: guidance is asked of a model that has never seen a hidden mask, an argument is out of its
            range, or ``start`` cannot be used.
    """

    ignore_for_config = ["snr_gamma", "start"]  # of no account once it is trained

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        num_classes: int = 2,
        mask_encoding: Literal["index", "onehot"] = "index",
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (4,),
        norm_num_groups: int = 32,
        beta_schedule: Literal["linear", "scaled_linear"] = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        train_steps: int = 1000,
        clip_sample: bool = True,
        unconditional: float = 0.0,
        guidance: float = 1.0,
        fusion: Literal["concat", "sum"] = "concat",
        encoder_width: int = 64,
        encoder_blocks: int = 3,
        prediction: Prediction = "epsilon",
        snr_gamma: float | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= unconditional < 1:
            raise InputError(f"unconditional {unconditional}: must be at least 0 and below 1, such as 0.1")
        if guidance != 1 and unconditional == 0:
            raise InputError(
                f"guidance {guidance}: needs a model trained with unconditional above 0, such as 0.1"
            )
        self.unconditional = unconditional
        self.guidance = guidance
        if start is not None and (fusion, mask_encoding) != ("concat", "index"):
            raise InputError(
                "start: the published network has fusion concat and mask_encoding index; set these, "
                "as in configs/backbones/segdiff_konz.yaml"
            )
        self.mask_encoding = mask_encoding
        self.num_classes = num_classes
        self.fusion = fusion
        mask_channels = 1 if mask_encoding == "index" else num_classes - 1
        architecture: dict[str, Any] = {
            "image_channels": image_channels,
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "attention_levels": tuple(attention_levels),
            "norm_num_groups": norm_num_groups,
        }
        schedule: dict[str, Any] = {
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "train_steps": train_steps,
            "clip_sample": clip_sample,
            "prediction": prediction,
        }
        weights = None
        if start is not None:
            architecture, found, weights = read_pixel_folder(start)
            schedule = self._adopted(schedule, found)
            self.register_to_config(**architecture, **schedule)
        self._set_loss(schedule.pop("prediction"), snr_gamma)
        self.image_channels = architecture["image_channels"]
        self.clip_sample = schedule.pop("clip_sample")
        self._register_schedule(**schedule)
        levels = range(len(architecture["block_out_channels"]))
        attentive = architecture["attention_levels"]
        self.unet = UNet2DModel(
            in_channels=self.image_channels + (mask_channels if fusion == "concat" else 0),
            out_channels=self.image_channels,
            block_out_channels=architecture["block_out_channels"],
            layers_per_block=architecture["layers_per_block"],
            norm_num_groups=architecture["norm_num_groups"],
            down_block_types=tuple("AttnDownBlock2D" if i in attentive else "DownBlock2D" for i in levels),
            up_block_types=tuple(
                "AttnUpBlock2D" if i in attentive else "UpBlock2D" for i in reversed(levels)
            ),
        )
        if fusion == "sum":
            features = architecture["block_out_channels"][0]
            self.unet.conv_in = FirstLayer(self.unet.conv_in)
            self.encoder = RRDBNet(mask_channels, features, encoder_width, encoder_blocks)
        if weights is not None:
            self.unet.load_state_dict(weights)

    def model(self) -> Model:
        """Return the network as that of the folders that the published code writes.

        Raises:
            InputError: it sees the mask in another way than the published one.
        """
        if (self.fusion, self.mask_encoding) != ("concat", "index"):
            raise InputError(
                f"fusion {self.fusion}, mask_encoding {self.mask_encoding}: the published code has concat "
                "and index alone; train a network with these"
            )
        weights = {"unet": dict(self.unet.state_dict())}
        return Model({"unet": described(self.unet)}, weights, self.schedule())

    def noise_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (C, H, W): the noise lives in pixel space.

        Raises:
            InputError: the size cannot be halved from level to level.
        """
        levels = len(self.unet.config.block_out_channels)
        factor = 2 ** (levels - 1)
        if any(side % factor for side in size):
            raise InputError(
                f"images of {size[0]} × {size[1]} pixels: a U-Net of {levels} levels needs sides that are "
                f"multiples of {factor}; set the size of the data to such, or give the backbone fewer "
                "block_out_channels"
            )
        return (self.image_channels, *size)

    def condition(self, mask: Tensor, image: Tensor | None = None) -> Tensor:
        """Return the mask channels ``(B, M, H, W)``, or features of them ``(B, F, H, W)``.

        With features and guidance those of a hidden mask follow: ``(B, 2F, H, W)``.
        """
        channels = self._channels(mask)
        if self.fusion == "concat" or self.guidance == 1:
            return self._seen(channels)
        return torch.cat([self._seen(channels), self._seen(torch.full_like(channels, HIDDEN))], dim=1)

    def _channels(self, mask: Tensor) -> Tensor:
        if self.mask_encoding == "index":
            return mask.unsqueeze(1).float() / 255
        return F.one_hot(mask, self.num_classes)[..., 1:].permute(0, 3, 1, 2).float()

    def _seen(self, channels: Tensor) -> Tensor:
        """Return what the U-Net sees of mask channels."""
        return channels if self.fusion == "concat" else self.encoder(channels)

    def epsilon(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return ε_φ(x_t, t | y), float32 ``(B, C, H, W)``."""
        if self.guidance == 1:
            return self._as_epsilon(self._output(x_t, t, condition), x_t, t)
        if self.fusion == "concat":
            seen, hidden = condition, torch.full_like(condition, HIDDEN)
        else:
            seen, hidden = condition.chunk(2, dim=1)
        both = self._output(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([seen, hidden]))
        return self._as_epsilon(self._guided(both), x_t, t)

    def _output(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.unet(torch.cat([x_t, condition], dim=1), t, return_dict=False)[0].float()

    def encode(self, image: Tensor) -> Tensor:
        """Return the image itself."""
        return image

    def decode(self, latent: Tensor) -> Tensor:
        """Return the latent itself: it is the image."""
        return latent

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the mean squared error on ε (Ho et al., NeurIPS 2020, equation 14), or on v."""
        x_t = add_noise(batch.x_0, batch.epsilon, self.alpha_bar(batch.t))
        hide = (batch.chance < self.unconditional).view(-1, 1, 1, 1)
        seen = self._seen(torch.where(hide, HIDDEN, self._channels(batch.mask)))
        return self._error(self._output(x_t, batch.t, seen), self._target(batch), batch.t)
