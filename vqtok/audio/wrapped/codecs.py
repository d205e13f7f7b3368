"""Which published codecs are known, by the `model_type` of their `config.json`."""

from __future__ import annotations

from .codec import Codec
from .dac import DAC
from .encodec import EnCodec
from .mimi import Mimi
from .xcodec import XCodec

CODECS: dict[str, Codec] = {"encodec": EnCodec(), "dac": DAC(), "mimi": Mimi(), "xcodec": XCodec()}
