"""The base of every config: typed, strict, and closed: a misspelt field is an error that names the nearest known one."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import dataclasses
import difflib
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

FORMAT = 1
# Keys that transformers itself passes or writes and that are no dataclass fields.
_BASE_KEYS = frozenset(
    ["model_type", "name_or_path", "torch_dtype", "attn_implementation", "experts_implementation", "output_attentions"]
    + ["num_labels", "use_return_dict", "auto_map"]
)
# By these transformers takes other weights than the folder's, asks the Hub for another repository, or reads weights another way.
_ELSEWHERE = frozenset(
    ["transformers_weights", "quantization_config", "backbone", "use_pretrained_backbone", "use_timm_backbone"]
)


@strict
class VQConfig(PreTrainedConfig):
    """Fields that every vqtok config has.

    Args:
        vqtok_format: version of the folder; a newer one than this package knows is refused.
        fingerprint: the code space (see `vqtok.fingerprint`), written at save; None for a model that was never saved.
    """

    vqtok_format: int = FORMAT
    fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in dataclasses.fields(self)}
        allowed = known | _BASE_KEYS
        for key in kwargs:
            if key not in allowed and not key.startswith("_"):
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise ValueError(f"{type(self).__name__} has no field {key!r}. Did you mean {near[0]!r}?")
        for name in ("auto_map", "use_return_dict"):  # code is not loaded, and a property cannot be set
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
            raise ValueError(
                f"{type(self).__name__}.dtype must name a float of torch, such as 'float32', got {self.dtype!r}"
            )
        if self.vqtok_format > FORMAT:
            raise ValueError(
                f"this folder has vqtok_format {self.vqtok_format}, this vqtok knows {FORMAT}: upgrade with pip install -U vqtok"
            )
        self.check_ranges()

    def check_ranges(self) -> None:
        """Refuse impossible values, as a ValueError of one sentence; runs after the types were checked."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does, for what came out of a file: one that names code on the Hub is refused."""
        refuse_code(config_dict, cls.__name__)
        try:
            return super().from_dict(config_dict, **kwargs)
        except (TypeError, LookupError, AttributeError) as error:
            # Of fields of the base class, whose types nobody checks.
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{cls.__name__}: a field of the base class makes no sense ({reason})") from error

    def __setattr__(self, key: str, value: Any) -> None:
        # JSON turns lists of numbers into lists; a tuple given by a caller must not make an unequal config.
        super().__setattr__(key, _with_lists(value))


def refuse_code(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Kernels of attention and of experts can be named by repository, and would be downloaded and run.

    Raises:
        ValueError: a field names one, or weights elsewhere; or the value, JSON of a config, is nested deeper than any config is.
    """
    if key in _ELSEWHERE and value:
        raise ValueError(f"{where} has {key}, and only the plain weights of the folder are loaded: remove it")
    if depth > 16:
        raise ValueError(f"{where} is nested more than 16 deep: no config of vqtok is")
    if isinstance(value, str) and ("implementation" in key or "kernel" in key) and not value.replace("_", "").isalnum():
        raise ValueError(f"{where}.{key} {value!r} names code outside transformers, which vqtok never loads: remove it")
    named = (
        value.items() if isinstance(value, dict) else [(key, each) for each in value] if isinstance(value, list) else ()
    )
    for name, each in named:
        is_inside = "implementation" in key or "kernel" in key  # {"attn_implementation": {"backbone_config": ...}}
        inherited = key if is_inside else str(name)
        refuse_code(each, where, inherited, depth + 1)


def _with_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_with_lists(each) for each in value]
    return {name: _with_lists(each) for name, each in value.items()} if type(value) is dict else value


def require(condition: bool, config: VQConfig, name: str, wanted: str) -> None:
    """Raise a ValueError that names the field, its value and what is wanted, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}.{name} must be {wanted}, got {getattr(config, name)!r}")
