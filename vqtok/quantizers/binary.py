"""LFQ and BSQ: the signs of a few numbers. No table, K as large as one likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import commitment_loss
from .configuration import BSQConfig, LFQConfig, make_config
from .functional import straight_through
from .soft import entropy_penalty
from .table_free import TableFreeQuantizer, exact_dot


class LFQ(TableFreeQuantizer):
    """Look-up-free quantization (MAGVIT-v2, Yu et al. 2024, section 3.1): rows are the corners of a cube.

    Bit i is whether number i is positive; the first is the most significant bit of the code. The entropy loss treats groups
    of `entropy_group_bits` bits as independent, so that it never needs the table of all codes: exact for one group, an upper
    bound of the joint entropy for more.

    Args:
        dim: width of the latents; another than `bits` adds a linear projection in and one out.
        options: the fields of `LFQConfig`: bits, commitment_weight, entropy_weight, ...

    Example:
        >>> quantizer = LFQ(18, bits=18)
        >>> quantizer.embed_codes(torch.tensor([[[5]]]))[0, 0, -4:].tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """

    config: LFQConfig
    config_class: type[LFQConfig] = LFQConfig

    def __init__(self, dim: int, **options: Any):
        config = make_config(self.config_class, **options)
        super().__init__(dim, config.bits, config)

    @property
    def corner(self) -> float:
        """The size of each number of a row."""
        return 1.0

    def bits(self, codes: Tensor) -> Tensor:
        """Bits `(*, bits)` int64 of codes `(*)`, most significant first."""
        return (codes[..., None] >> self._places(codes)) & 1

    def codes(self, bits: Tensor) -> Tensor:
        """Codes `(*)` int64 of bits `(*, bits)` int64; the inverse of `bits`."""
        return (bits << self._places(bits)).sum(-1)

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.config.bits - 1, -1, -1, device=like.device)

    def _digits(self, latents: Tensor) -> Tensor:
        return (latents > 0).float()

    def _codes_of(self, digits: Tensor) -> Tensor:
        return exact_dot(digits, [1 << place for place in reversed(range(self.config.bits))], self.config.size)

    def _values(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1) * self.corner

    def _digits_of_codes(self, codes: Tensor) -> Tensor:
        return self.bits(codes).float()

    def _learn(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows, latents = self._rows(codes), self._on_sphere(latents)
        losses = {"commitment_loss": commitment_loss(latents, rows)}
        if self.config.entropy_weight:
            losses["entropy_loss"] = self._entropy_loss(latents.flatten(0, -2))
        return straight_through(latents, rows), losses

    def _on_sphere(self, latents: Tensor) -> Tensor:
        """Latents as losses and gradients see them; their signs are the same."""
        return latents

    def _entropy_loss(self, z_ND: Tensor) -> Tensor:
        """Soft assignments are softmax(-|z / corner - row / corner|^2 / temperature); among corners only 2 z . row counts."""
        scaled_ND = z_ND * (2 / (self.corner * self.config.entropy_temperature))
        assignments = []
        for part_Ng in scaled_ND.split(self.config.entropy_group_bits, 1):
            size = part_Ng.shape[1]
            places = torch.arange(size - 1, -1, -1, device=z_ND.device)
            corners_Kg = (2 * ((torch.arange(2**size, device=z_ND.device)[:, None] >> places) & 1) - 1).float()
            assignments.append((part_Ng, corners_Kg, corners_Kg.new_zeros(2**size)))
        return entropy_penalty(assignments)


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al. 2024): latents on the unit sphere, rows the corners of the cube inside it.

    Args:
        dim: width of the latents; another than `bits` adds a linear projection in and one out.
        options: the fields of `BSQConfig`, those of `LFQConfig`.
    """

    config_class = BSQConfig

    @property
    def corner(self) -> float:
        return self.config.bits**-0.5

    def _on_sphere(self, latents: Tensor) -> Tensor:
        return nn.functional.normalize(latents, dim=-1)
