"""Published codecs of transformers in a tiny size with random weights, saved to folders as the real repositories look."""

import json

import torch
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    XcodecConfig,
    XcodecModel,
)

ENCODEC = {"num_filters": 4, "hidden_size": 8, "codebook_dim": 8, "upsampling_ratios": [5, 4, 2], "codebook_size": 16}
ENCODEC |= {"target_bandwidths": [0.8, 1.6, 3.2], "num_lstm_layers": 1, "sampling_rate": 8000}
DAC = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4, 5], "n_codebooks": 3}
DAC |= {"codebook_size": 16, "codebook_dim": 4, "sampling_rate": 8000}
MIMI = {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [5, 2, 2], "codebook_size": 16, "codebook_dim": 8}
MIMI |= {"num_quantizers": 4, "vector_quantization_hidden_dimension": 8, "upsample_groups": 16, "num_hidden_layers": 2}
MIMI |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 10}
MIMI |= {"sampling_rate": 8000}
SEMANTIC = {
    "model_type": "hubert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SEMANTIC |= {"conv_dim": [8, 8], "conv_stride": [8, 5], "conv_kernel": [10, 5], "num_conv_pos_embeddings": 8}
SEMANTIC |= {"num_conv_pos_embedding_groups": 2}
XCODEC = {"target_bandwidths": [0.8, 2.5], "codebook_size": 16, "sample_rate": 8000, "semantic_model_config": SEMANTIC}
XCODEC |= {"acoustic_model_config": {**DAC, "model_type": "dac", "downsampling_ratios": [8, 5], "hidden_size": 16}}
XCODEC["acoustic_model_config"]["upsampling_ratios"] = [8, 5]
KINDS = {
    "encodec": (EncodecConfig, EncodecModel, ENCODEC, "EncodecFeatureExtractor"),
    "dac": (DacConfig, DacModel, DAC, "DacFeatureExtractor"),
    "mimi": (MimiConfig, MimiModel, MIMI, "EncodecFeatureExtractor"),
    "xcodec": (XcodecConfig, XcodecModel, XCODEC, "DacFeatureExtractor"),
}


def codec_config(kind, **changes):
    return KINDS[kind][0](**{**KINDS[kind][2], **changes})


@torch.no_grad()
def wake(module):
    """Weights of convolutions that do something: transformers' own start is far too small to matter."""
    for name, value in module.named_parameters():
        if value.ndim == 3 and "semantic_model" not in name:
            inner = 0.2 if "res_unit" in name else 1.0
            torch.nn.init.normal_(value, 0, (inner / (value.shape[1] * value.shape[2])) ** 0.5)


def make_codec(kind, seed=0, **changes):
    """A model of transformers; its tables spread as its latents do, so that many codes are used."""
    torch.manual_seed(seed)
    model = KINDS[kind][1](codec_config(kind, **changes)).eval()
    with torch.no_grad():
        wake(model)
        for name, value in model.named_buffers():
            if name.endswith(("embed", "embed_sum")):
                value.normal_(0, 0.5)
            if name.endswith("cluster_usage"):
                value.uniform_(0.5, 2)
    return model


def save_codec(kind, folder, seed=0, **changes):
    """`config.json`, `model.safetensors` and `preprocessor_config.json`, as on the Hub; returns the model."""
    model = make_codec(kind, seed, **changes)
    model.save_pretrained(folder)
    fields = {
        "feature_extractor_type": KINDS[kind][3],
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
    }
    fields |= {"return_attention_mask": True, "sampling_rate": 8000}
    fields |= {"hop_length": 40} if kind in ("dac", "xcodec") else {"chunk_length_s": None, "overlap": None}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return model
