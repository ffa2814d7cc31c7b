"""Latent diffusion models as files: those of the original repositories, and folders of diffusers."""

from diffusion.checkpoints.model import (
    Model,
    original_weights,
    read_folder,
    read_model,
    read_original,
    write_folder,
)
from diffusion.checkpoints.parts import described
from diffusion.checkpoints.pixel import read_pixel_folder
from diffusion.checkpoints.prompts import embed, tokenizer_of

__all__ = [
    "Model",
    "described",
    "embed",
    "original_weights",
    "read_folder",
    "read_model",
    "read_original",
    "read_pixel_folder",
    "tokenizer_of",
    "write_folder",
]
