"""Siamese-Diffusion: while it learns, a branch that sees the image itself teaches the one that sees the mask.

Qiu et al., "Noise-Consistent Siamese-Diffusion for Medical Image Synthesis and Segmentation", CVPR 2025.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffusion.backbones.backbone import TrainingBatch
from diffusion.backbones.controlldm import ControlLDM, controlled
from diffusion.schedule import add_noise
from networks.dhi import siamese_hint

LATE = 200
"""Timesteps up to which the mask branch also learns from what the image branch has denoised."""

AUGMENTED_FROM = 1 / 3
"""Share of the training after which it does."""


class SiameseDiff(ControlLDM):
    """:class:`ControlLDM` with a dense hint encoder and the noise-consistent loss; its arguments.

    Of ``hint_channels`` the first and the number count: features double with every halving. Sampling uses
    the mask branch alone.
    """

    def _new_hint_encoder(self, hint_channels: Sequence[int]) -> nn.Module:
        outputs = self.unet.config.block_out_channels[0]
        return siamese_hint(outputs, hint_channels[0], len(hint_channels) - 1)

    def _image_output(self, x_t: Tensor, t: Tensor, prompt: Tensor, control: Sequence[Tensor]) -> Tensor:
        """Return the U-Net's output; its weights get no gradient from it, the control does."""
        weights = {name: weight.detach() for name, weight in self.unet.named_parameters()}
        return functional_call(self.unet, weights, (x_t, t), controlled(prompt, control))[0].float()

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the terms of the loss, each the mean over the batch of squared errors.

        ``mask``: ‖ε_m − ε‖², of the branch that sees the mask. ``image``: ‖ε_i − ε‖², of a copy of the U-Net
        that is not trained, under sg(c_m) + w·c_i, where c_i is the ControlNet's view of the image and w
        the share of the training done. ``consistency``: ‖ε_m − sg(ε_i)‖². ``augmented``, after a third of the
        training and for t ≤ 200: ‖ε_m(x_t') − ε‖² at x_t' = sg(x_t + √(1 − ᾱ_t)(ε − ε_i)), the image that
        the image branch sees, noised anew.
        """
        t, prompt = batch.t, self._prompts(batch)
        alpha_bar = self.alpha_bar(t)
        x_t = add_noise(batch.x_0, batch.epsilon, alpha_bar)
        mask = self.hint_encoder(self.picture(batch.mask, batch.image))
        image = self.hint_encoder(((batch.image + 1) / 2).expand(-1, 3, -1, -1))
        c_m = self._control(x_t, t, mask, prompt)
        c_i = self._control(x_t, t, image, prompt)
        both = [m.detach() + batch.progress * i for m, i in zip(c_m, c_i, strict=True)]
        of_mask = self._controlled(x_t, t, prompt, c_m)
        of_image = self._image_output(x_t, t, prompt, both)
        target = self._target(batch)
        terms = {
            "mask": self._error(of_mask, target, t),
            "image": self._error(of_image, target, t),
            "consistency": self._error(of_mask, of_image.detach(), t),
        }
        late = t <= LATE
        if batch.progress > AUGMENTED_FROM and late.any():
            seen = self._as_epsilon(of_image.detach(), x_t, t)
            again = (x_t + (1 - alpha_bar).sqrt() * (batch.epsilon - seen))[late]
            output = self._output(again, t[late], mask[late], prompt[late])
            terms["augmented"] = self._error(output, target[late], t[late]) * late.float().mean()
        return terms

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the sum of :meth:`losses`."""
        return torch.stack(list(self.losses(batch).values())).sum()
