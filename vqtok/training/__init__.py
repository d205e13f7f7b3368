"""Training: a plain loop on accelerate that owns when, steps that own what, and everything needed to continue."""

from .adversarial import AdversarialArguments, AdversarialStep
from .arguments import TrainingArguments, parse_arguments, read_recipe
from .averaging import WeightAverage
from .loader import StepSampler, step_loader
from .loop import Stopped, fit
from .steps import PriorStep, TokenizerStep

__all__ = [
    "AdversarialArguments",
    "AdversarialStep",
    "PriorStep",
    "StepSampler",
    "Stopped",
    "TokenizerStep",
    "TrainingArguments",
    "WeightAverage",
    "fit",
    "parse_arguments",
    "read_recipe",
    "step_loader",
]
