"""Latent diffusion with a ControlNet: FairDiff and DiffBoost are settings of it.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023, on the networks of
diffusers. FairDiff (Li et al., MICCAI 2024) paints the mask in colours and trains the decoder of the U-Net
too; DiffBoost (Zhang et al., IEEE TMI 2024) draws edges and outlines and trains the ControlNet alone.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from diffusion.backbones.backbone import Backbone, Prediction, TrainingBatch
from diffusion.checkpoints import Model, described, embed, read_model, tokenizer_of
from diffusion.hints import Sobel, coloured, contour, grey_levels
from diffusion.schedule import add_noise
from errors import InputError
from networks.autoencoder import Autoencoder
from networks.hed import HED
from networks.pretrained import load_pretrained
from networks.weight_files import read_weights

STABLE_DIFFUSION_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
"""Arguments of the U-Net of Stable Diffusion 1.5; what is not named is diffusers' default."""

HED_MARK = "moduleCombine.0.bias"
"""The weight that is NaN in a HED whose weights are not known."""

TOKENIZER = "openai/clip-vit-large-patch14"
"""The tokenizer of Stable Diffusion 1.5's text encoder."""

TRAINED, SAMPLED, NEGATIVE, EMPTY = range(4)
"""Rows of the prompt embeddings. Where they are learnt only the first and the last are used."""


class ControlLDM(Backbone):
    """A U-Net in the latent space of a VAE, steered by a ControlNet that reads the mask.

    Args:
        image_channels: channels of the images; grey ones are repeated for a VAE of three channels.
        num_classes: classes of the masks, background included.
        unet_config: arguments of ``UNet2DConditionModel``; None is the network of Stable Diffusion 1.5.
        vae_config: arguments of ``AutoencoderKL``; None is that of ``start`` or ``autoencoder``.
        hint: what the ControlNet reads of the mask: ``palette``, a colour a class, or ``contour``.
        palette: RGB in [0, 1] of each class; None goes from black to white in even steps.
        edges: edges of the real image that are added to the hint: ``none``, ``sobel``, or ``hed``, by the
            network that DiffBoost's authors use. With edges the samples are variations of real images;
            without them a mask is enough.
        hint_channels: features of each level of the hint encoder, one more than the VAE has halvings.
        tokens: length of a prompt embedding.
        learn: what is trained: ``control`` (the ControlNet), ``decoder`` (and the decoder of the U-Net), or
            ``all`` (both networks and the embeddings of the prompt and of the empty one, which guidance
            then leads away from; for training from nothing).
        prompt_dropout: share of training samples that get the empty prompt.
        guidance: w of classifier-free guidance away from the negative prompt; 1 is none. Under it the
            networks are called with a batch of two for each sample.
        prediction: what the U-Net predicts: ``epsilon`` or ``v`` (Salimans & Ho, ICLR 2022).
        snr_gamma: γ of min-SNR weighting of the training loss; None weights all timesteps alike.
        beta_schedule: ``linear`` or ``scaled_linear``.
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        train_steps: timesteps T of the schedule.
        prompt: what the images are, for the text encoder that comes with ``start``.
        sampling_prompt: another prompt for sampling, or several with the weights that their embeddings are
            mixed with; None is ``prompt``.
        negative_prompt: what guidance leads away from.
        gradient_checkpointing: trade a third more time for a training that needs much less memory.
        start: what to start from: a Stable Diffusion folder of diffusers or its id on the hub, with or
            without a ControlNet, or a checkpoint file of the original repositories; None starts anew. What
            it says of its schedule and prediction takes the place of arguments at their default.
        tokenizer: folder or id of CLIP's tokenizer, where ``start`` has none.
        heads: attention heads of the U-Net of an original checkpoint, which does not say; None is Stable
            Diffusion's 8, or one for each 64 features where prompts have not 768.
        autoencoder: folder of a trained VAE, where there is no ``start``.
        hed: file of weights for ``edges: hed``, ``network-bsds500.pth``; needed once, they are handed on.

    Raises:
        InputError: an argument is out of its range, two contradict each other, or ``start`` or
            ``autoencoder`` cannot be used.
    """

    ignore_for_config = [
        *("start", "tokenizer", "heads", "autoencoder", "hed"),  # where weights came from
        *("gradient_checkpointing", "snr_gamma"),  # of no account once it is trained
    ]
    spacing = "leading"
    steps_offset = 1
    contexts: Tensor

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        num_classes: int = 2,
        unet_config: dict[str, Any] | None = None,
        vae_config: dict[str, Any] | None = None,
        hint: Literal["palette", "contour"] = "palette",
        palette: Sequence[Sequence[float]] | None = None,
        edges: Literal["none", "sobel", "hed"] = "none",
        hint_channels: Sequence[int] = (16, 32, 96, 256),
        tokens: int = 77,
        learn: Literal["control", "decoder", "all"] = "decoder",
        prompt_dropout: float = 0.0,
        guidance: float = 9.0,
        prediction: Prediction = "epsilon",
        snr_gamma: float | None = None,
        beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        train_steps: int = 1000,
        prompt: str = "",
        sampling_prompt: str | Mapping[str, float] | None = None,
        negative_prompt: str = "",
        gradient_checkpointing: bool = False,
        start: str | None = None,
        tokenizer: str = TOKENIZER,
        heads: int | None = None,
        autoencoder: str | None = None,
        hed: str | None = None,
    ) -> None:
        super().__init__()
        if palette is not None and len(palette) != num_classes:
            raise InputError(f"palette: has {len(palette)} colours for {num_classes} classes; give one each")
        if not 0 <= prompt_dropout < 1:
            raise InputError(f"prompt_dropout {prompt_dropout}: must be at least 0 and below 1, such as 0.05")
        if start is not None and autoencoder is not None:
            raise InputError("start and autoencoder: choose one; what one starts from has its own VAE")
        if start is None and autoencoder is None and vae_config is None:
            raise InputError(
                "autoencoder: there is no VAE; give the folder of a trained one, or start from a model"
            )
        self.image_channels = image_channels
        self.num_classes = num_classes
        self.hint_kind = hint
        self.palette = palette or grey_levels(num_classes)
        self.edges = edges
        self.prompt_dropout = prompt_dropout
        self.guidance = guidance
        self.learnt_prompts = learn == "all"
        schedule: dict[str, Any] = {
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "train_steps": train_steps,
            "prediction": prediction,
        }
        model = None if start is None else read_model(start, heads)
        if model is not None:
            schedule = self._adopted(schedule, model.schedule)
            self.register_to_config(**schedule)
        self._set_loss(schedule.pop("prediction"), snr_gamma)
        self._register_schedule(**schedule)
        self.final_alpha = 1 - schedule["beta_start"]  # ᾱ_0, where the original sampler ends
        trained_vae = None if autoencoder is None else load_pretrained(autoencoder, Autoencoder).vae
        if model is not None:
            unet_config, vae_config = (_settings(model.configs[part]) for part in ("unet", "vae"))
        elif trained_vae is not None:
            vae_config = _settings(trained_vae.config)
        self.unet = UNet2DConditionModel(**unet_config or STABLE_DIFFUSION_UNET)
        self.vae = AutoencoderKL(**vae_config or {})
        self.register_to_config(
            unet_config=_settings(self.unet.config), vae_config=_settings(self.vae.config)
        )
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._check_fit(hint_channels, image_channels)
        self.controlnet = ControlNetModel.from_unet(
            self.unet, conditioning_embedding_out_channels=tuple(hint_channels)
        )
        # The hint is encoded once a batch, not at every step: its encoder stands beside the ControlNet.
        self.controlnet.controlnet_cond_embedding = nn.Identity()
        self.hint_encoder = self._new_hint_encoder(hint_channels)
        width = self.unet.config.cross_attention_dim
        self.contexts = nn.Parameter(0.02 * torch.randn(4, tokens, width))
        if trained_vae is not None:
            self.vae.load_state_dict(trained_vae.state_dict())
        if start is not None and model is not None:
            self._take(model)
            mixes = [prompt, sampling_prompt or prompt, negative_prompt, ""]
            self.contexts = nn.Parameter(embed(model, mixes, tokenizer_of(start, tokenizer)))
            self.register_to_config(tokens=self.contexts.shape[1])
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(_checkpointed)
            self.controlnet.enable_gradient_checkpointing(_checkpointed)
        self.edge_detector = _edge_detector(edges, hed)
        self.requires_grad_(learn == "all")
        for part in (self.vae, self.edge_detector):
            part.requires_grad_(False)
        for part in (self.controlnet, self.hint_encoder):
            part.requires_grad_(True)
        if learn == "decoder":
            for part in (self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out):
                part.requires_grad_(True)

    def _check_fit(self, hint_channels: Sequence[int], image_channels: int) -> None:
        """Raise unless images, hint, VAE and U-Net fit each other."""
        if 2 ** (len(hint_channels) - 1) != self.factor:
            raise InputError(
                f"hint_channels {list(hint_channels)}: halve the mask {len(hint_channels) - 1} times, the "
                f"VAE its images {self.factor.bit_length() - 1} times; give one level more than those"
            )
        if self.vae.config.latent_channels != self.unet.config.in_channels:
            raise InputError(
                f"unet_config: reads {self.unet.config.in_channels} channels, the VAE makes "
                f"{self.vae.config.latent_channels}; set in_channels and out_channels to match"
            )
        if self.vae.config.in_channels not in (image_channels, 3) or image_channels not in (1, 3):
            raise InputError(
                f"image_channels {image_channels}: the VAE reads {self.vae.config.in_channels}; give 1 or 3"
            )

    def _take(self, model: Model) -> None:
        """Load the weights of a model; a ControlNet that it lacks starts as the U-Net's encoder.

        Raises:
            InputError: the model's hint encoder is another one than this backbone's.
        """
        self.unet.load_state_dict(model.weights["unet"])
        self.vae.load_state_dict(model.weights["vae"])
        control = model.weights.get("controlnet")
        if control is None:
            kept = self.controlnet.state_dict()
            copied = {key: value for key, value in model.weights["unet"].items() if key in kept}
            self.controlnet.load_state_dict(kept | copied)
            return
        inside = "controlnet_cond_embedding."
        hint = {key.removeprefix(inside): value for key, value in control.items() if key.startswith(inside)}
        self.controlnet.load_state_dict({k: v for k, v in control.items() if not k.startswith(inside)})
        wanted, found = self.hint_encoder.state_dict(), model.weights.get("hint", hint)
        if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in found.items()}:
            raise InputError(
                f"start: its ControlNet reads hints by another encoder than {type(self).__name__} "
                f"({min(found)}, not {min(wanted)}, or of other features); set the class or hint_channels to "
                "match"
            )
        self.hint_encoder.load_state_dict(found)

    def model(self) -> Model:
        """Return the networks as those of a diffusers folder; without text encoder."""
        inside = "controlnet_cond_embedding."
        hint = self.hint_encoder.state_dict()
        control = dict(self.controlnet.state_dict())
        stock = isinstance(self.hint_encoder, ControlNetConditioningEmbedding)
        if stock:
            control |= {inside + key: value for key, value in hint.items()}
        parts = {"unet": self.unet, "controlnet": self.controlnet, "vae": self.vae}
        weights = {"unet": dict(self.unet.state_dict()), "controlnet": control}
        weights |= {} if stock else {"hint": dict(hint)}
        configs = {name: described(part) for name, part in parts.items()}
        return Model(configs, weights | {"vae": dict(self.vae.state_dict())}, self.schedule())

    def stock_controlnet(self) -> ControlNetModel:
        """Return a ControlNet that encodes its hint itself, as pipelines of diffusers expect it."""
        controlnet = copy.deepcopy(self.controlnet)
        controlnet.controlnet_cond_embedding = self.hint_encoder
        return controlnet

    def _new_hint_encoder(self, hint_channels: Sequence[int]) -> nn.Module:
        """Return what maps pictures ``(B, 3, H, W)`` to features like those of the U-Net's first layer."""
        return ControlNetConditioningEmbedding(
            self.unet.config.block_out_channels[0], block_out_channels=tuple(hint_channels)
        )

    def noise_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (C, H / f, W / f) for a VAE that divides the size by f.

        Raises:
            InputError: the size is no multiple of f.
        """
        if any(side % self.factor for side in size):
            raise InputError(
                f"images of {size[0]} × {size[1]} pixels: the VAE needs sides that are multiples of "
                f"{self.factor}; set the size of the data to such"
            )
        return (self.vae.config.latent_channels, size[0] // self.factor, size[1] // self.factor)

    def picture(self, mask: Tensor, image: Tensor | None) -> Tensor:
        """Return what the ControlNet reads, ``(B, 3, H, W)`` in [0, 1].

        Raises:
            InputError: it reads edges of real images, and there are none, or nothing that finds them.
        """
        hint = coloured(mask, self.palette) if self.hint_kind == "palette" else contour(mask)
        if self.edges != "none":
            if image is None:
                raise InputError(
                    f"edges {self.edges}: the backbone reads edges of real images, and there are only masks "
                    "here; use a backbone with edges none"
                )
            hint = (hint + self._edges(image)).clamp(max=1)
        return hint.expand(-1, 3, -1, -1)

    def _edges(self, image: Tensor) -> Tensor:
        """Return edges of images ``(B, 1, H, W)``.

        Raises:
            InputError: the network that finds them has no weights.
        """
        if self.edge_detector.state_dict().get(HED_MARK, torch.zeros(())).isnan().any():
            raise InputError("edges hed: its network has no weights; give hed, such as network-bsds500.pth")
        return self.edge_detector(image)

    def condition(self, mask: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        """Return the encoded ``hint`` ``(B, F, H / f, W / f)``, and ``prompt`` and ``negative`` (1, L, D)."""
        wanted, unwanted = (TRAINED, EMPTY) if self.learnt_prompts else (SAMPLED, NEGATIVE)
        return {
            "hint": self.hint_encoder(self.picture(mask, image)),
            "prompt": self.contexts[wanted][None],
            "negative": self.contexts[unwanted][None],
        }

    def epsilon(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Return ε_φ(x_t, t | y), float32 ``(B, C, h, w)``."""
        hint, count = condition["hint"], len(x_t)
        prompt = condition["prompt"].expand(count, -1, -1)
        if self.guidance == 1:
            return self._as_epsilon(self._output(x_t, t, hint, prompt), x_t, t)
        negative = condition["negative"].expand(count, -1, -1)
        both = self._output(
            torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([hint, hint]), torch.cat([prompt, negative])
        )
        return self._as_epsilon(self._guided(both), x_t, t)

    def _control(self, x_t: Tensor, t: Tensor, hint: Tensor, prompt: Tensor) -> list[Tensor]:
        """Return what the ControlNet adds to the U-Net's skips, and last to its middle."""
        down, middle = self.controlnet(
            x_t, t, encoder_hidden_states=prompt, controlnet_cond=hint, return_dict=False
        )
        return [*down, middle]

    def _controlled(self, x_t: Tensor, t: Tensor, prompt: Tensor, control: Sequence[Tensor]) -> Tensor:
        """Return the U-Net's output under a control."""
        return self.unet(x_t, t, **controlled(prompt, control))[0].float()

    def _output(self, x_t: Tensor, t: Tensor, hint: Tensor, prompt: Tensor) -> Tensor:
        return self._controlled(x_t, t, prompt, self._control(x_t, t, hint, prompt))

    def _prompts(self, batch: TrainingBatch) -> Tensor:
        """Return the prompt of each training sample ``(B, L, D)``; some are empty."""
        dropped = batch.chance < self.prompt_dropout
        return self.contexts[torch.where(dropped, EMPTY, TRAINED)]

    def encode(self, image: Tensor) -> Tensor:
        """Return the mean of q(z | image), scaled as the diffusion model sees it."""
        image = image.expand(-1, self.vae.config.in_channels, -1, -1)
        return self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Return images for latents; where a gradient is asked for, one is held in memory at a time."""
        latent = latent / self.vae.config.scaling_factor
        if torch.is_grad_enabled() and latent.requires_grad:
            return torch.cat([checkpoint(self._decoded, z[None], use_reentrant=False) for z in latent])
        return self._decoded(latent)

    def _decoded(self, latent: Tensor) -> Tensor:
        image = self.vae.decode(latent, return_dict=False)[0].float()
        return image.mean(1, keepdim=True) if self.image_channels == 1 else image

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the mean squared error on ε, or on v."""
        x_t = add_noise(batch.x_0, batch.epsilon, self.alpha_bar(batch.t))
        hint = self.hint_encoder(self.picture(batch.mask, batch.image))
        output = self._output(x_t, batch.t, hint, self._prompts(batch))
        return self._error(output, self._target(batch), batch.t)


def controlled(prompt: Tensor, control: Sequence[Tensor]) -> dict[str, Any]:
    """Return the arguments of a call of the U-Net under a control."""
    return {
        "encoder_hidden_states": prompt,
        "down_block_additional_residuals": tuple(control[:-1]),
        "mid_block_additional_residual": control[-1],
        "return_dict": False,
    }


def _checkpointed(block: nn.Module, *arguments: Any) -> Any:
    """Call a block and keep none of its activations; the backward pass calls it again, with the same weights.

    They are handed over because those of a call by ``functional_call`` are no longer in place then.
    """
    return checkpoint(functional_call, block, dict(block.named_parameters()), arguments, use_reentrant=False)


def _edge_detector(edges: str, hed: str | None) -> nn.Module:
    """Return what finds the edges of images.

    Raises:
        InputError: the weights cannot be read, or are another network's.
    """
    if edges != "hed":
        if hed is not None:
            raise InputError(f"hed {hed}: is of use with edges hed only")
        return Sobel()
    detector = HED()
    if hed is None:  # until those of a trained backbone are loaded
        detector.state_dict()[HED_MARK].fill_(torch.nan)
        return detector
    try:
        detector.load_state_dict(read_weights(hed))
    except RuntimeError as error:
        raise InputError(f"hed {hed}: holds another network than HED; give network-bsds500.pth") from error
    return detector


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a diffusers network is built with."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
