"""Long sound in chunks and sound as it arrives: the codes and the sound of the whole."""

import pytest
import torch

from tests.audio import test_modeling_audio_vq as cases
from tests.quantizing import check_differences, level_quantizers, searched
from vqtok.audio.streaming import StreamingDecoder, StreamingEncoder
from vqtok.chunks import decode_chunks, encode_chunks

CAUSAL = [kind for kind in cases.KINDS if kind.options.get("causal")]


def test_there_are_causal_models_of_each_shape():
    assert cases.TestAsEnCodec in CAUSAL and cases.TestCausalSpectra in CAUSAL and len(CAUSAL) == 4


def close(part, whole, share=1e-5):
    assert part.shape == whole.shape
    assert (part - whole).abs().max() <= share * float(whole.std())


def check_codes(model, outputs, whole):
    """Latents within 1e-5 of their spread, codes equal but for near-ties below that; level by level."""
    for level, (quantizer, parts) in enumerate(zip(level_quantizers(model.quantizer), outputs, strict=True)):
        z, codes = torch.cat([p.latents for p in parts], 1), torch.cat([p.codes for p in parts], 2)
        close(z, whole.latents[level])
        seen = searched(quantizer, z), searched(quantizer, whole.latents[level])
        if check_differences(quantizer, *seen, codes, whole.codes[level]):
            return  # the finer levels saw another condition


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stream_has_the_latents_and_codes_of_the_whole(kind, steps):
    model, case = cases.made(kind)
    size = model.layout.stride * 24
    sound = case.make_media(2, (size,), seed=1)
    encoder = StreamingEncoder(model)
    parts = [encoder.outputs(chunk) for chunk in sound.split(model.layout.stride * steps, -1)]
    check_codes(model, zip(*parts, strict=True), model.encode(sound))


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_stream_decodes_as_the_whole(kind):
    model, case = cases.made(kind)
    codes = model.encode(case.make_media(2, (model.layout.stride * 24,), seed=1)).codes
    decoder = StreamingDecoder(model)
    ratios = [level.shape[2] // 24 for level in codes]
    at = [(0, 1), (1, 2), (2, 7), (7, 24)]
    sound = [decoder.push([level[:, :, a * r : b * r] for level, r in zip(codes, ratios, strict=True)]) for a, b in at]
    close(torch.cat(sound, -1), model.decode(codes).reconstruction)


def test_pushes_of_any_length_and_an_end_that_is_no_whole_step():
    model, case = cases.made(cases.TestAsEnCodec)
    stride = model.layout.stride
    sound = case.make_media(1, (stride * 10,), seed=2)[..., : stride * 9 + 3]
    encoder = StreamingEncoder(model)
    for again in range(2):
        parts = [encoder.push(chunk)[0] for chunk in sound.split([1, stride - 2, 5, 0, stride * 6, stride * 2 - 1], -1)]
        assert encoder.num_samples == sound.shape[-1]
        assert [part.shape[2] for part in parts] == [0, 0, 1, 0, 6, 2]
        codes = torch.cat([*parts, encoder.flush()[0]], 2)
        padded = torch.nn.functional.pad(sound, (0, stride - 3))
        assert codes.equal(model.encode(padded).codes[0]), f"round {again}: a flush starts anew"


def test_what_is_kept_does_not_grow():
    model, case = cases.made(cases.TestAsEnCodec)
    encoder, sizes = StreamingEncoder(model), []
    for _ in range(4):
        encoder.push(case.make_media(1, (model.layout.stride * 3 + 7,)))
        own = (value for value in encoder._state.values() if isinstance(value, torch.Tensor))
        rest = (v for value in encoder._state.values() if isinstance(value, dict) for v in value.values())
        sizes.append(sum(value.numel() for value in (*own, *rest)))
    assert len(set(sizes)) == 1 and encoder._rest.shape[-1] < model.layout.stride


def test_bad_pushes_are_refused():
    model, case = cases.made(cases.TestAsEnCodec)
    encoder = StreamingEncoder(model)
    encoder.push(case.make_media(2, (80,)))
    for bad in (torch.zeros(1, 1, 80), torch.zeros(2, 2, 80), torch.zeros(80)):
        with pytest.raises(ValueError, match=r"must be \(B, 1, n\) with B as before"):
            encoder.push(bad)
    for call in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(ValueError, match="not causal"):
            call(cases.made(cases.TestResidual)[0])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_chunks_have_the_latents_codes_and_sound_of_the_whole(kind):
    """Chunks shorter than the context, and one that is longer than the rest."""
    model, case = cases.made(kind)
    stride, steps = model.layout.stride, 41
    sound = case.make_media(1, (stride * steps,), seed=5)
    whole = model.encode(sound)
    read = []

    def part(start, end):
        read.append(end - start)
        return sound[..., start:end]

    for size in (7, 30):
        units = size * stride
        chunks = list(encode_chunks(model, stride * steps, part, units))
        codes = [torch.cat(level, 2) for level in zip(*chunks, strict=True)]
        assert len(chunks) == -(-steps // size)
        assert sum(int((a != b).sum()) for a, b in zip(codes, whole.codes, strict=True)) == 0
        made_sound = torch.cat(list(decode_chunks(model, whole.codes, units)), -1)
        close(made_sound, model.decode(whole.codes).reconstruction)
    assert max(read) <= (30 + sum(-(-samples // stride) for samples in model.encoder.context)) * stride


def test_long_sound_goes_through_chunks_by_itself(monkeypatch):
    model, case = cases.made(cases.TestResidual)
    seen = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda media: (seen.append(media.shape[-1]), encode(media))[1])
    sound = case.make_media(1, (40 * 200 * 50,), seed=6)  # 50 s
    codes = model.encode_long(sound)
    assert len(seen) == 3 and max(seen) < 22 * 8000
    assert codes[0].equal(encode(sound).codes[0])
    close(model.decode_long(codes), model.decode(codes).reconstruction)
