"""Prompts as embeddings: computed once, so that the text encoder is not needed afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from diffusion.checkpoints.model import Model
from errors import InputError

Prompt = str | Mapping[str, float]
"""A text, or several with the weights that their embeddings are mixed with."""


@torch.no_grad()
def embed(model: Model, prompts: Sequence[Prompt], tokenizer: str) -> Tensor:
    """Return the embedding of each prompt ``(P, L, D)``: the last hidden state of CLIP, normalised.

    Args:
        model: whose text encoder is used.
        prompts: what to embed.
        tokenizer: folder of the tokenizer, or its id on the hub.

    Raises:
        InputError: the model has no text encoder, or the tokenizer cannot be had.
    """
    if "text_encoder" not in model.weights:
        raise InputError("the model to start from has no text encoder, and there are prompts to embed")
    config = CLIPTextConfig(**model.configs["text_encoder"])
    encoder = CLIPTextModel(config).eval()
    prefix = "" if any(key.startswith("text_model.") for key in encoder.state_dict()) else "text_model."
    weights = {key.removeprefix(prefix): v.float() for key, v in model.weights["text_encoder"].items()}
    weights = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    encoder.load_state_dict(weights, strict=True)
    try:
        words = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:
        raise InputError(
            f"tokenizer {tokenizer}: cannot be had ({str(error).strip().splitlines()[0]}); give a folder "
            "that holds CLIP's vocab.json and merges.txt, such as tokenizer/ of a Stable Diffusion folder"
        ) from error

    def embedding(text: str) -> Tensor:
        length = config.max_position_embeddings
        ids = words(
            text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return encoder(ids).last_hidden_state[0]

    rows = []
    for prompt in prompts:
        mix = {prompt: 1.0} if isinstance(prompt, str) else prompt
        rows.append(torch.stack([weight * embedding(text) for text, weight in mix.items()]).sum(0))
    return torch.stack(rows)


def tokenizer_of(start: str | Path, otherwise: str) -> str:
    """Return where the tokenizer of a model lies: in its folder, or else where ``otherwise`` says."""
    inside = Path(start) / "tokenizer"
    return str(inside) if inside.is_dir() else otherwise
