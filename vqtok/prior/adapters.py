"""LoRA on the backbone of a prior, through peft (`pip install vqtok[peft]`): train little, publish plain weights.

What came with the text model stays as it is; its projections get adapters of low rank. What is new (the rows of codes, the
places, the heads) learns in full. Merging adds the adapters into the projections, and nothing of peft is left.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from .modeling_code_prior import CodePriorModel


class SplitEmbedding(nn.Module):
    """An embedding whose first rows are frozen; rows and gradients of the others are a parameter of their own.

    Hiding the gradient of some rows of one parameter would do on one process, but not where parameters are sharded, and the
    optimizer would keep its moments for all rows.

    Args:
        table: the embedding to split.
        rows: how many of its first rows are frozen, at least 1.
    """

    def __init__(self, table: nn.Embedding, rows: int):
        super().__init__()
        frozen, learned = table.weight.detach()[:rows].clone(), table.weight.detach()[rows:].clone()
        self.frozen = nn.Embedding.from_pretrained(frozen, freeze=True)
        self.learned = nn.Embedding.from_pretrained(learned, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `(*, M)` of ids `(*)`."""
        rows = self.frozen.num_embeddings
        old, new = self.frozen(ids.clamp(max=rows - 1)), self.learned((ids - rows).clamp(min=0))
        return torch.where((ids < rows)[..., None], old, new)

    def joined(self) -> nn.Embedding:
        """The plain embedding of all rows."""
        weight = torch.cat([self.frozen.weight, self.learned.weight]).detach()
        return nn.Embedding.from_pretrained(weight, freeze=False)


def check_peft() -> None:
    """Refuse to go on without the optional package.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need the package peft: pip install 'vqtok[peft]'")


def add_lora(prior: CodePriorModel, rank: int, frozen_rows: int = 0) -> None:
    """Put adapters on every projection of the backbone, in place; only they and what is not of the text model keep learning.

    An adapter adds 2 x B(A(x)) to a projection, A random and B zero at the start, so that the prior is at first what it was
    (LoRA: Hu et al., https://arxiv.org/abs/2106.09685, with alpha = 2 rank).

    Args:
        prior: its backbone holds what shall be kept.
        rank: of the adapters, at least 1.
        frozen_rows: how many rows of the embedding are words of the text model (what `load_text_weights` returns); they are frozen.

    Raises:
        ValueError: peft is not installed, or the rank or the embedding is not usable.
    """
    check_peft()
    import peft

    table = prior.get_input_embeddings()
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"the rank of adapters must be an integer of at least 1, got {rank!r}")
    if type(table) is not nn.Embedding:
        raise ValueError(
            f"the embedding of this backbone is a {type(table).__name__}, of which no rows can be frozen: train it without adapters"
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=_transposed(prior)
    )
    peft.inject_adapter_in_model(config, prior.backbone)  # it freezes all but the adapters
    table.weight.requires_grad_(True)
    if frozen_rows:
        prior.backbone.set_input_embeddings(SplitEmbedding(table, frozen_rows))


def merge_lora(prior: CodePriorModel) -> None:
    """Add the adapters into the projections, in place: the outputs stay, peft is no longer needed, everything may learn again.

    Raises:
        ValueError: an adapter holds numbers that are not finite.
    """
    merge_adapters(prior)
    table = prior.get_input_embeddings()
    if isinstance(table, SplitEmbedding):
        prior.backbone.set_input_embeddings(table.joined())
    prior.requires_grad_(True)


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters of any model into its projections, in place, and take out what peft left in it.

    Raises:
        ValueError: an adapter holds numbers that are not finite, or peft is not installed.
    """
    check_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    for module in model.modules():
        if hasattr(module, "peft_config"):
            del module.peft_config


def _transposed(prior: CodePriorModel) -> bool:
    """Whether the projections keep their weights the other way round, as GPT-2's do."""
    return any(type(module).__name__ == "Conv1D" for module in prior.backbone.modules())
