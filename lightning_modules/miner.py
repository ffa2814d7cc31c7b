"""Train the miner against a frozen backbone and a frozen segmenter."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from datamodules.sources import Source
from diffusion.sampler import GradientMode
from errors import InputError, require
from lightning_modules.checks import check_checkpoint, check_image_set, check_trained
from lightning_modules.synthesis import SynthesisLitModule
from methods import Base, Mined, Request
from methods.method import PROBE
from methods.mined import NoiseMode, draw, propose
from networks.gaussian import ShiftedGaussian
from networks.miner import Miner
from networks.pretrained import frozen, load_pretrained
from networks.response import SIGNAL
from networks.scorer import Scorer
from networks.segmenter import Segmenter
from objectives.nativeness import controlled_beta, next_log_beta, overlap, score_function
from objectives.rewards import REWARDS, Transform, clipped, reducible

_MINING_SEED = 2**32  # keeps the noise of mining apart from that of synthesis at any seed below

MiningGradient = Literal["stop", "full", "score_function"]


class MinerLitModule(SynthesisLitModule):
    """Ascends E[min(κ_up, ℓ_seg(f_ϑ(x̂), y))] − β · E[KL(N^r ‖ N(0, I))] in the miner alone.

    The defaults are the paper's setting; every other option is a way to keep the miner native.
    ``predict`` synthesises with the trained miner, as ``SynthesisLitModule`` does with any method.

    Args:
        backbone: folder of a trained diffusion backbone q_φ.
        anchor: folder of a trained segmenter f_ϑ.
        miner: M_ξ; by default the authors' network for the backbone's noise. Its own options say what
            it reads and whether the variance may move.
        weights: folder of a trained miner to start from.
        reward: ℓ_seg; the scale of κ_up depends on it.
        kappa_up: cap of the reward.
        beta: weight β of the KL divergence, summed over dimensions, in reward per nat; with a budget
            what β starts from.
        kl_budget: nats of KL divergence to spend; a controller moves β so that this much is spent.
        kl_rate: gain of that controller's integral part, a step.
        keep_norm: rescale the shifted noise to the norm of its draw.
        truncate: calls of the backbone in a training rollout, of ``steps``.
        glance: 0, or the calls of a glance (:meth:`Sampler.glance`) that takes the rollout's place: it
            shows nearly the finished image, at a fraction of the calls.
        signal: ᾱ at which a glance reads the noise, be it climbed or read by the miner, which remembers it.
        gradient: ``stop`` (the paper's temporal stop-gradient), ``full`` (through the backbone), or
            ``score_function`` (REINFORCE with antithetic draws; no gradient of anything frozen).
        noise: ``fresh`` (the paper's) or ``paired``.
        reference: folder of a stronger segmenter; the reward is then the reducible
            φ(ℓ_anchor) − λ·φ(ℓ_reference), in whose units κ_up caps it.
        reducible: λ.
        transform: φ, ``log`` or ``none``; of no account without a reference.
        elites: 0, or N ≥ 2: learn the noise of the hardest of N plain draws a mask, by likelihood,
            instead of climbing the reward.
        scorer: folder of a seed scorer whose prediction is climbed in one call of the backbone, instead
            of the segmenter's loss on a rollout. κ_up then caps the prediction, in the scorer's units.
        others: folders of miners already trained; the shift is kept apart from theirs.
        diversity: weight of that term, the mean squared cosine to the others' shifts.
        steps: DDIM steps of the full schedule.
        optimizer: builds the optimiser from the miner's parameters.
        seed: with the sample's index it decides the sample's noise.

    Raises:
        InputError: a folder cannot be used, two parts do not fit, or options contradict each other.
    """

    frozen_parts = ("backbone", "anchor", "reference", "scorer", "others")
    log_beta: Tensor

    def __init__(
        self,
        backbone: str,
        anchor: str,
        miner: Miner | None = None,
        weights: str | None = None,
        reward: str = "bounded_ce",
        kappa_up: float = 0.5,
        beta: float = 1e-3,
        kl_budget: float | None = None,
        kl_rate: float = 0.02,
        keep_norm: bool = False,
        truncate: int = 10,
        glance: int = 0,
        signal: float = SIGNAL,
        gradient: MiningGradient = "stop",
        noise: NoiseMode = "fresh",
        reference: str | None = None,
        reducible: float = 1.0,
        transform: Transform = "log",
        elites: int = 0,
        scorer: str | None = None,
        others: Sequence[str] = (),
        diversity: float = 0.1,
        steps: int = 50,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=1e-2),
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, anchor, Base(), reward, steps, seed, signal)
        channels = self.backbone.noise_shape((64, 64))[0]
        network = load_pretrained(weights, Miner).train() if weights else miner or Miner(channels)
        if weights and miner:
            miner.begin_at(network.signal)
        if weights and miner and network.settings() != miner.settings():
            raise InputError(
                f"model.weights {weights}: holds another architecture than model.miner "
                f"({network.settings()}, not {miner.settings()}); set model.miner to match, or leave it out"
            )
        if not weights and network.signal == SIGNAL:
            network.begin_at(signal)
        fix = f"choose 1 to {steps} of the {steps} model.steps"
        require(1 <= truncate <= steps, "model.truncate", truncate, fix)
        require(glance >= 0, "model.glance", glance, "choose at least 1 call of the backbone, or 0")
        if network.channels != channels:
            raise InputError(
                f"model.miner: shifts noise of {network.channels} channels, that of {backbone} has "
                f"{channels}; set its channels to match"
            )
        if network.num_classes not in (0, self.backbone.num_classes):
            raise InputError(
                f"model.miner: reads masks of {network.num_classes} classes, {backbone} has "
                f"{self.backbone.num_classes}; set its num_classes to match, or to 0 to read no mask"
            )
        budgeted = kl_budget is not None
        fix = "must be a positive number of nats, or null"
        require(kl_budget is None or kl_budget > 0, "model.kl_budget", kl_budget, fix)
        fix = "must be positive under a kl_budget, and never negative"
        require(beta > 0 or (beta == 0 and not budgeted), "model.beta", beta, fix)
        require(elites == 0 or elites >= 2, "model.elites", elites, "choose at least 2 draws, or 0")
        if gradient == "score_function" and noise == "paired":
            raise InputError(
                "model.gradient score_function needs model.noise fresh: with paired noise the shift itself "
                "depends on the draw, and its likelihood says nothing about the gradient"
            )
        if elites and scorer:
            raise InputError("model.elites and model.scorer: choose one of the two")
        self.started = weights is not None
        self.method = Mined(network, noise, keep_norm)
        self.reference = None if reference is None else frozen(reference, Segmenter)  # type: ignore[type-abstract]
        self.scorer = None if scorer is None else frozen(scorer, Scorer)
        self.others = torch.nn.ModuleList(frozen(other, Miner) for other in others)
        self.reducible = reducible
        self.transform: Transform = transform
        self.kappa_up = kappa_up
        self.kl_budget = kl_budget
        self.kl_rate = kl_rate
        self.elites = elites
        self.diversity = diversity
        self.truncate = truncate
        self.glance = glance
        self.gradient: MiningGradient = gradient
        self.optimizer = optimizer
        self.register_buffer("log_beta", torch.tensor(math.log(beta) if beta else -math.inf))

    @property
    def miner(self) -> Miner:
        """M_ξ."""
        assert isinstance(self.method, Mined)
        return self.method.miner

    @property
    def trained(self) -> Miner:
        """The network whose weights this stage hands on."""
        return self.miner

    def check_data(self, source: Source) -> None:
        """Raise unless all frozen networks fit the images."""
        super().check_data(source)
        if self.reference is not None:
            check_image_set(source, self.reference, "model.reference")

    def check_trained(self, ckpt_path: str | Path | None) -> None:
        """Raise unless there are weights to sample with, or a checkpoint is to be loaded."""
        check_trained(self.started or ckpt_path, "miner")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise unless the checkpoint holds exactly this miner."""
        check_checkpoint(self.own_state(), checkpoint["state_dict"], "miner")

    def _reward(self, image: Tensor, mask: Tensor) -> Tensor:
        reward = self.reward(image, mask)
        if self.reference is None:
            return reward
        learnt = REWARDS[self.reward_name](self.reference(image).float(), mask)
        return reducible(reward, learnt, self.reducible, self.transform)

    def _judge(self, x_T: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        """Return the reward of initial noises ``(B,)``, and the estimate that it was read from."""
        if self.scorer is not None:
            response = self.sampler.response(x_T, request.condition, self.scorer)
            return self.scorer.predict(response, request.mask), None
        gradient: GradientMode = "full" if self.gradient == "full" else "stop"
        if self.glance:
            latent = self.sampler.glance(x_T, request.condition, self.glance, gradient)
        else:
            latent = self.sampler.rollout(x_T, request.condition, self.truncate, gradient)
        image = self.backbone.decode(latent)
        return self._reward(image.clamp(-1, 1), request.mask), image  # no gradient where it is saturated

    def _elite(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return the noise of the hardest of N plain draws of each mask, and its reward."""
        with torch.no_grad():
            draws = [request.proposal(2 + k) for k in range(self.elites)]  # 0 is the probe
            rewards = torch.stack([self._judge(x_T, request)[0] for x_T in draws])
        best = clipped(rewards, self.kappa_up).argmax(0)
        rows = torch.arange(len(best), device=best.device)
        return torch.stack(draws)[best, rows], rewards[best, rows]

    def _gain(self, request: Request) -> tuple[Tensor, Tensor, Tensor, ShiftedGaussian, Tensor | None]:
        """Return what is to be raised ``(B,)``, the reward, x_T^r, its distribution and the estimate."""
        assert isinstance(self.method, Mined)
        if self.elites:
            shifted = propose(self.miner, request, request.noise.draw(PROBE))
            elite, reward = self._elite(request)
            return shifted.log_prob(elite) / elite[0].numel(), reward, elite, shifted, None
        x_T, eps, shifted = self.method.shift(request)
        if self.gradient != "score_function":
            reward, image = self._judge(x_T, request)
            return clipped(reward, self.kappa_up), reward, x_T, shifted, image
        with torch.no_grad():
            reward, image = self._judge(x_T, request)
            mirrored, _ = self._judge(draw(shifted, -eps, self.method.keep_norm), request)
        log_prob = torch.stack([shifted.log_prob(shifted.rsample(e).detach()) for e in (eps, -eps)])
        gain = score_function(log_prob, clipped(torch.stack([reward, mirrored]), self.kappa_up))
        return gain, reward, x_T, shifted, image

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the negative objective, and log what tells native from artificial."""
        request = self.request(batch, _MINING_SEED)
        gain, reward, x_T, shifted, image = self._gain(request)
        kl = shifted.kl()
        beta = self.log_beta.exp()
        if self.kl_budget is not None:
            spent = self.trainer.strategy.reduce(kl.detach().mean(), reduce_op="mean")
            beta = controlled_beta(self.log_beta, spent, self.kl_budget)
            self.log_beta.copy_(next_log_beta(self.log_beta, spent, self.kl_budget, self.kl_rate))
        penalty = beta * kl.mean()
        if self.others:
            probe = request.noise.draw(PROBE)
            shifts = [propose(other, request, probe).mean for other in self.others]  # type: ignore[arg-type]
            shared = overlap(shifted.mean, shifts).mean()
            penalty = penalty + self.diversity * shared
            self.log("miner/overlap", shared, batch_size=len(reward))
        objective = gain.mean() - penalty
        prior = request.noise.draw(PROBE).flatten(1).norm(dim=1)
        self.log_dict(
            {
                "miner/objective": objective,
                "miner/reward": reward.mean(),
                "miner/kl": kl.mean(),
                "miner/beta": beta,
                "miner/at_cap": (reward >= self.kappa_up).float().mean(),
                "miner/noise_norm_ratio": (x_T.flatten(1).norm(dim=1) / prior).mean(),
                "miner/mean_rms": shifted.mean.square().mean().sqrt(),
                "miner/variance_mean": shifted.variance.mean(),
            },
            batch_size=len(reward),
        )
        if image is not None:
            self.log("miner/saturated", (image.abs() > 1).float().mean(), batch_size=len(reward))
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
