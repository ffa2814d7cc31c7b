"""Train the miner against a frozen backbone and a frozen segmenter."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from diffusion.sampler import GradientMode
from errors import InputError
from lightning_modules.checks import check_checkpoint
from lightning_modules.synthesis import SynthesisLitModule
from methods import Base, Mined
from methods.method import PROBE
from methods.mined import NoiseMode, shift_noise
from networks.miner import Miner
from networks.pretrained import load_pretrained
from objectives.rewards import clipped

_MINING_SEED = 2**32  # keeps the noise of mining apart from that of synthesis at any seed below


class MinerLitModule(SynthesisLitModule):
    """Ascends E[min(κ_up, ℓ_seg(f_ϑ(x̂), y))] − β · E[KL(N^r ‖ N(0, I))] in the miner alone.

    The defaults are the paper's setting. ``predict`` synthesises with the trained miner, as
    ``SynthesisLitModule`` does with any method.

    Args:
        backbone: folder of a trained diffusion backbone q_φ.
        anchor: folder of a trained segmenter f_ϑ.
        miner: M_ξ; by default the authors' network for the backbone's noise.
        weights: folder of a trained miner to start from.
        reward: ℓ_seg; the scale of κ_up depends on it.
        kappa_up: cap of the reward.
        beta: weight β of the KL divergence, summed over dimensions, in reward per nat.
        truncate: calls of the backbone in a training rollout, of ``steps``.
        gradient: ``stop`` (the paper's temporal stop-gradient) or ``full``.
        noise: ``fresh`` (the paper's) or ``paired``.
        steps: DDIM steps of the full schedule.
        optimizer: builds the optimiser from the miner's parameters.
        seed: with the sample's index it decides the sample's noise.

    Raises:
        InputError: a folder cannot be used, or two parts do not fit.
    """

    def __init__(
        self,
        backbone: str,
        anchor: str,
        miner: Miner | None = None,
        weights: str | None = None,
        reward: str = "bounded_ce",
        kappa_up: float = 0.5,
        beta: float = 1e-3,
        truncate: int = 10,
        gradient: GradientMode = "stop",
        noise: NoiseMode = "fresh",
        steps: int = 50,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=1e-2),
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, anchor, Base(), reward, steps, seed)
        channels = self.backbone.noise_shape((64, 64))[0]
        network = load_pretrained(weights, Miner).train() if weights else miner or Miner(channels)
        if weights and miner and network.settings() != miner.settings():
            raise InputError(
                f"model.weights {weights}: holds another architecture than model.miner "
                f"({network.settings()}, not {miner.settings()}); set model.miner to match, or leave it out"
            )
        if not 1 <= truncate <= steps:
            raise InputError(f"model.truncate {truncate}: choose 1 to {steps} of the {steps} model.steps")
        self.method = Mined(network, noise)
        if network.channels != channels:
            raise InputError(
                f"model.miner: shifts noise of {network.channels} channels, that of {backbone} has "
                f"{channels}; set its channels to match"
            )
        self.kappa_up = kappa_up
        self.beta = beta
        self.truncate = truncate
        self.gradient: GradientMode = gradient
        self.noise_mode: NoiseMode = noise
        self.optimizer = optimizer

    @property
    def miner(self) -> Miner:
        """M_ξ."""
        assert isinstance(self.method, Mined)
        return self.method.miner

    @property
    def trained(self) -> Miner:
        """The network whose weights this stage hands on."""
        return self.miner

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise unless the checkpoint holds exactly this miner."""
        check_checkpoint(self.own_state(), checkpoint["state_dict"], "miner")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the negative objective, and log what tells native from artificial."""
        noise = self.noise(batch, _MINING_SEED)
        condition = self.backbone.condition(batch["mask"])
        x_T, shifted = shift_noise(self.miner, self.sampler, noise, condition, self.noise_mode)
        latent = self.sampler.rollout(x_T, condition, self.truncate, self.gradient)
        image = self.backbone.decode(latent)
        reward = self.reward(image.clamp(-1, 1), batch["mask"])  # no gradient where the image is saturated
        kl = shifted.kl()
        objective = clipped(reward, self.kappa_up).mean() - self.beta * kl.mean()
        prior = noise.draw(PROBE).flatten(1).norm(dim=1)
        self.log_dict(
            {
                "miner/objective": objective,
                "miner/reward": reward.mean(),
                "miner/kl": kl.mean(),
                "miner/saturated": (image.abs() > 1).float().mean(),
                "miner/at_cap": (reward >= self.kappa_up).float().mean(),
                "miner/noise_norm_ratio": (x_T.flatten(1).norm(dim=1) / prior).mean(),
                "miner/mean_rms": shifted.mean.square().mean().sqrt(),
                "miner/variance_mean": shifted.variance.mean(),
            },
            batch_size=len(reward),
        )
        self.log("reward", reward.mean(), prog_bar=True, logger=False, batch_size=len(reward))
        return -objective

    @torch.no_grad()
    def preview(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return columns of a picture grid: base beside mined, from the same probe noise."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        columns = {}
        for name, method in (("base", Base()), ("mined", self.method)):
            image, _ = method.synthesize(self.request(batch))
            columns[name] = image
            self.logger_scalar(f"preview/reward_{name}", self.reward(image, batch["mask"]).mean())
        return columns

    def logger_scalar(self, name: str, value: Tensor) -> None:
        """Write a scalar outside of a training step."""
        if self.logger is not None:
            self.logger.log_metrics({name: float(value)}, step=self.global_step)

    def configure_optimizers(self) -> Any:
        """Build the optimiser of the miner's parameters."""
        return self.optimizer(list(self.miner.parameters()))
