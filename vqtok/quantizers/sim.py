"""SimVQ: frozen random codes seen through one learned linear map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import SingleQuantizer, codebook_loss, commitment_loss, pass_gradient
from .collective import check_not_frozen, from_first
from .configuration import SimVQConfig, make_config
from .functional import full_precision
from .kmeans import joint_rows
from .search import nearest_code


class SimVQ(SingleQuantizer):
    """Vector quantization whose table is a linear map of frozen random rows (Zhu et al. 2024).

    A gradient for one code moves the map and with it all codes, so none is left behind. Like a table, the map is not
    subject to weight decay.

    Args:
        dim: width of the latents.
        options: the fields of `SimVQConfig`.
    """

    config: SimVQConfig
    frozen_codes: Tensor
    initialised: Tensor

    def __init__(self, dim: int, **options: Any):
        config = make_config(SimVQConfig, **options)
        inner_dim = config.codebook_dim or dim
        super().__init__(dim, inner_dim, config)
        self.is_straight = config.gradient == "straight_through" and inner_dim == dim
        self.register_buffer("frozen_codes", torch.empty(config.codebook_size, inner_dim, dtype=torch.float32))
        # Not an nn.Linear: whoever initialises or decays the weights of a model's layers should leave it alone.
        self.code_map = nn.Parameter(torch.empty(inner_dim, inner_dim, dtype=torch.float32))
        self.code_bias = nn.Parameter(torch.empty(inner_dim, dtype=torch.float32))
        self.register_buffer("initialised", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codes from N(0, 1/D), the map an orthogonal matrix without bias: codes start with a length of about one."""
        nn.init.normal_(self.frozen_codes, 0.0, self.frozen_codes.shape[1] ** -0.5)
        nn.init.eye_(self.code_map)
        nn.init.zeros_(self.code_bias)
        nn.init.zeros_(self.initialised)

    @property
    def table(self) -> Tensor:
        """`(K, D)`: the rows that codes stand for, as they are now. Never kept, so that it cannot go stale."""
        return self._mapped(self.frozen_codes)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Give the codes the mean and the spread of the latents `z` `(*, dim)` of all processes."""
        check_not_frozen(self.frozen)
        z_ND = joint_rows(self.prepare(z).flatten(0, -2))
        mean_D = z_ND.mean(0)
        covariance_DD = (z_ND - mean_D).T @ (z_ND - mean_D) / len(z_ND)
        # Any square root will do; this one also of the covariance of fewer latents than dimensions.
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
        root_DD = (vectors_DD * values_D.clamp_min(1e-6 * values_D.mean().clamp_min(1e-12)).sqrt()).float()
        self.code_map.copy_(from_first(root_DD * len(mean_D) ** 0.5))
        self.code_bias.copy_(from_first(mean_D))
        self.initialised.fill_(True)

    def _search(self, latents: Tensor) -> Tensor:
        return nearest_code(latents.flatten(0, -2), self.table).view(latents.shape[:-1])

    def _rows(self, codes: Tensor) -> Tensor:
        return self._mapped(self.frozen_codes[codes])

    def _mapped(self, codes: Tensor) -> Tensor:
        with full_precision(codes.device.type):
            return nn.functional.linear(codes, self.code_map, self.code_bias)

    def _learn(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self._rows(codes)
        losses = {
            "commitment_loss": commitment_loss(latents, rows),
            "codebook_loss": codebook_loss(latents, rows),
        }
        return pass_gradient(latents, rows, self.config.gradient), losses
