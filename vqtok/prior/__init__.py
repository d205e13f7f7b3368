"""Priors: transformers over codes, conditioned on text, features of it, a class, other codes, or nothing."""

from .cascade import CodeCascade
from .configuration_code_prior import CodePriorConfig
from .configuration_masked_prior import MaskedCodePriorConfig
from .known import Known
from .modeling_code_prior import CodePriorModel
from .modeling_masked_prior import MaskedCodePriorModel
from .pretrained import prior_from_text_model
from .sampling import CodeScores, SamplingSettings
from .sequence import pad_conditions
from .text import encode_prompts, train_text_tokenizer

# Every kind of prior, by the model_type of its config.
PRIORS = {
    CodePriorConfig.model_type: (CodePriorConfig, CodePriorModel),
    MaskedCodePriorConfig.model_type: (MaskedCodePriorConfig, MaskedCodePriorModel),
}

__all__ = [
    "PRIORS",
    "CodeCascade",
    "CodePriorConfig",
    "CodePriorModel",
    "CodeScores",
    "Known",
    "MaskedCodePriorConfig",
    "MaskedCodePriorModel",
    "SamplingSettings",
    "encode_prompts",
    "pad_conditions",
    "prior_from_text_model",
    "train_text_tokenizer",
]
