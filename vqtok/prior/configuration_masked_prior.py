"""Configuration of the masked prior."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

from huggingface_hub.dataclasses import strict

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

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders that a prior of this class can have."""
        return (PARALLEL,)
