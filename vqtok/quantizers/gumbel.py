"""Codes drawn by the Gumbel-softmax: the discrete VAE of DALL-E."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .base import SingleQuantizer
from .collective import Accumulator, check_not_frozen
from .configuration import GumbelConfig, make_config
from .kmeans import joint_k_means
from .search import nearest_code


class Annealing(Accumulator):
    """Counts updates: the temperature follows half a cosine from the first to the last value."""

    def __init__(self, config: GumbelConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start."""
        nn.init.zeros_(self.updates)

    @property
    def temperature(self) -> float:
        """The temperature now."""
        done = min(1.0, int(self.updates) / self.config.anneal_steps)
        first, last = self.config.temperature, self.config.final_temperature
        return last + (first - last) * (1 + math.cos(math.pi * done)) / 2

    def packed(self, rank: int, world_size: int) -> list[Tensor]:
        """Nothing to sum."""
        return []

    def apply_sums(self, *sums: Tensor) -> None:
        """Nothing to do but to be counted."""


class GumbelQuantizer(SingleQuantizer):
    """Codes from logits (Ramesh et al. 2021, section 2.1): in training a soft mixture of rows, drawn; in eval the likeliest row.

        y = softmax((l + g) / temperature) with Gumbel noise g,   quantized = sum_k y_k e_k;   kl_loss = KL(softmax(l) || uniform)

    The logits are a learned linear map of the latents. The mixture is what training sees, so low temperatures at its end matter:
    in eval there is one row per position.

    Args:
        dim: width of the latents.
        options: the fields of `GumbelConfig`.
    """

    config: GumbelConfig
    initialised: Tensor

    def __init__(self, dim: int, **options: Any):
        config = make_config(GumbelConfig, **options)
        super().__init__(dim, dim, config)
        self.logit_map = nn.Parameter(torch.empty(config.codebook_size, dim, dtype=torch.float32))
        self.logit_bias = nn.Parameter(torch.empty(config.codebook_size, dtype=torch.float32))
        self.embedding = nn.Parameter(torch.empty(config.codebook_size, dim, dtype=torch.float32))
        self.annealing = Annealing(config)
        self.register_buffer("initialised", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rows from N(0, 1), logits of about unit variance."""
        nn.init.normal_(self.embedding)
        nn.init.normal_(self.logit_map, 0.0, self.logit_map.shape[1] ** -0.5)
        nn.init.zeros_(self.logit_bias)
        nn.init.zeros_(self.initialised)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Rows at the k-means centroids of the latents `z` `(*, dim)` of all processes, logits those of the nearest row."""
        check_not_frozen(self.frozen)
        z_ND = z.float().flatten(0, -2)
        centroids = joint_k_means(z_ND, len(self.embedding))
        self.embedding.copy_(centroids)
        spread = (centroids - centroids.mean(0)).square().sum(1).mean() / max(1.0, math.log(len(centroids)))
        # -|z - e|^2 / (2 spread), without the |z|^2 that all codes share.
        self.logit_map.copy_(centroids / spread.clamp_min(1e-12))
        self.logit_bias.copy_(-centroids.square().sum(1) / (2 * spread.clamp_min(1e-12)))
        self.initialised.fill_(True)

    def _search(self, latents: Tensor) -> Tensor:
        # argmax_k z . w_k + b_k is an inner product of one dimension more: the same search, ties and all.
        z_ND = nn.functional.pad(latents.flatten(0, -2), (0, 1), value=1.0)
        table_KD = torch.cat([self.logit_map, self.logit_bias[:, None]], 1)
        return nearest_code(z_ND, table_KD, "inner_product").view(latents.shape[:-1])

    def _rows(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.embedding)

    def _learn(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits_K = nn.functional.linear(latents, self.logit_map, self.logit_bias)
        log_p_K = logits_K.log_softmax(-1)
        kl_loss = (log_p_K.exp() * (log_p_K + math.log(len(self.embedding)))).sum(-1).mean()
        if self.frozen:  # fixed codes for whoever learns to decode them; no noise
            mixed = logits_K.softmax(-1) @ self.embedding
            return mixed + (self._rows(codes) - mixed).detach(), {"kl_loss": kl_loss}
        noise_K = -torch.empty_like(logits_K).exponential_().log()
        mixture_K = ((logits_K + noise_K) / self.annealing.temperature).softmax(-1)
        return mixture_K @ self.embedding, {"kl_loss": kl_loss}
