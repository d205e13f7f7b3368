"""Configuration of the masked prior."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

from huggingface_hub.dataclasses import strict

from vqtok.configuration import require

from .configuration_code_prior import CodePriorConfig
from .sequence import PARALLEL


@strict
class MaskedCodePriorConfig(CodePriorConfig):
    """Configuration of `MaskedCodePriorModel`: the fields of `CodePriorConfig`, of which `order` has one value.

    Example:
        >>> layout = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 256}]}
        >>> MaskedCodePriorConfig(layout=layout, condition="class", text_size=10).order
        'parallel'
    """

    model_type = "vqtok_masked_prior"

    order: str = PARALLEL

    def check_ranges(self) -> None:
        """Refuse values that no model can be built from, before anything is allocated."""
        super().check_ranges()
        require(not self.text_loss_weight, self, "text_loss_weight", "0: a masked prior does not predict its text")

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders that a prior of this class can have."""
        return (PARALLEL,)
