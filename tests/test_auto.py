"""The facade: order, sizes and state of encode and decode, and whose codes are whose."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vqtok.auto.batches
from tests.tiny import assert_same_codes, make_tokenizer, picture, vectors
from vqtok.auto import VQTokenizer
from vqtok.codes import Codes
from vqtok.image.image_processing_image_vq import ImageVQImageProcessor

SIZES = [(30, 21), (16, 16), (9, 40), (31, 20), (8, 8), (17, 33), (16, 16), (32, 24)]


@pytest.fixture(scope="module")
def shared():
    """For tests that only read."""
    return make_tokenizer()


# -- encode and decode


def test_mixed_sizes_come_back_in_order_and_exactly(shared):
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    codes = shared.encode(pictures)
    assert codes.sizes.tolist() == [list(size) for size in SIZES]
    assert [tuple(level.shape) for level in codes.levels] == [(8, 1, 4, 5), (8, 1, 8, 10)]
    assert all(len(level.unique()) > 4 for level in codes.levels), "the pictures do not tell codes apart"
    decoded = shared.decode(codes)
    assert [image.size for image in decoded] == [(width, height) for height, width in SIZES]
    for index, image in enumerate(decoded):
        (alone,) = shared.decode(codes[index])
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(image))


def test_codes_belong_to_the_picture_but_for_near_ties(shared):
    """Every code that differs between alone and in a batch is one whose two distances are equal up to rounding."""
    pictures = [picture(32, 32, seed=i) for i in range(12)]
    together = shared.encode(pictures)
    table = [level.codebook.embedding for level in shared.model.quantizer.levels]
    for index, image in enumerate(pictures):
        alone = shared.encode(image)
        pixels = shared.processor.prepare(image)[0][None]
        latents = shared.model.encode(pixels).latents
        for level, (a, b) in enumerate(zip(alone.levels, together[index].levels, strict=True)):
            differing = (a != b).flatten().nonzero()[:, 0]
            z = latents[level].flatten(0, 2)[differing]
            gap = (z - table[level][a.flatten()[differing]]).norm(dim=1) - (
                z - table[level][b.flatten()[differing]]
            ).norm(dim=1)
            assert (gap.abs() <= 1e-5 * latents[level].std()).all()
            if len(differing):
                break  # finer levels follow the coarser code
    assert_same_codes(together, shared.encode(pictures))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing_that_is_seen(shared, batch_size):
    pictures = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    codes = shared.encode(pictures, batch_size=batch_size)
    equal = [float((a == b).float().mean()) for a, b in zip(codes.levels, shared.encode(pictures).levels, strict=True)]
    assert min(equal) > 0.98
    assert [image.size for image in shared.decode(codes, batch_size)] == [image.size for image in pictures]


def test_batches_have_the_size_asked_for(shared, monkeypatch):
    seen = []
    encode = shared.model.encode
    monkeypatch.setattr(shared.model, "encode", lambda batch: (seen.append(tuple(batch.shape)), encode(batch))[1])
    shared.encode([picture(16, 16)] * 5 + [picture(15, 24)], batch_size=2)
    assert seen == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16), (1, 3, 16, 24)]


def test_pictures_of_many_sizes_do_not_pile_up(shared, monkeypatch):
    monkeypatch.setattr(vqtok.auto.batches, "_MOST_WAITING", 3 * 8 * 64)
    pictures = [picture(8, 8 * n, seed=n) for n in range(1, 9)]
    encode, drawn, when = shared.model.encode, [], []
    monkeypatch.setattr(shared.model, "encode", lambda batch: (when.append(len(drawn)), encode(batch))[1])
    codes = shared.encode(drawn.append(n) or image for n, image in enumerate(pictures))
    assert when[0] < len(pictures), "all were read before the first was encoded"
    assert_same_codes(codes, Codes.cat([shared.encode(image) for image in pictures]))


def test_one_item_none_and_a_generator(shared, tmp_path):
    image = picture(16, 24)
    assert len(shared.encode(image)) == 1
    assert_same_codes(shared.encode(np.asarray(image)), shared.encode(image))
    image.save(tmp_path / "a.png")
    assert_same_codes(shared.encode([str(tmp_path / "a.png"), image]), shared.encode(picture(16, 24) for _ in range(2)))
    assert len(shared.encode([])) == 0 and shared.decode(shared.encode([])) == []
    (again,) = shared.reconstruct(image)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(shared.decode(shared.encode(image))[0]))


def test_prefixes(shared):
    image = picture(16, 16)
    codes = shared.encode(image, num_levels=1, num_codebooks=1)
    assert len(codes.levels) == 1 and torch.equal(codes.levels[0], shared.encode(image).levels[0])
    assert shared.decode(codes)[0].size == (16, 16)
    for name, value in (("num_levels", 3), ("num_levels", 0), ("num_codebooks", 2), ("batch_size", 0)):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
            shared.encode(image, **{name: value})


def test_bad_items_say_their_place(shared, tmp_path):
    with pytest.raises(ValueError, match=r"^item 1: a picture has 7x16 pixels, a side smaller than the stride of 8"):
        shared.encode([picture(16, 16), picture(16, 7)])
    with pytest.raises(ValueError, match=r"item 0: cannot read .*broken.png"):
        (tmp_path / "broken.png").write_bytes(b"x")
        shared.encode([tmp_path / "broken.png"])
    with pytest.raises(TypeError, match="item 1: .*not NoneType"):
        shared.encode([picture(16, 16), None])
    with pytest.raises(FileNotFoundError, match="missing.png"):
        shared.encode(["missing.png"])
    with pytest.raises(ValueError, match="sampling_rate=16000 is for audio"):
        shared.encode(picture(16, 16), sampling_rate=16000)
    with pytest.raises(TypeError, match="decode takes Codes, got tuple"):
        shared.decode(shared.encode(picture(16, 16)).levels)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_encode_in_train_mode_changes_nothing(update):
    tokenizer = make_tokenizer(quantizer=vectors(16, 32, update=update))
    expected = tokenizer.encode([picture(16, 24)])
    tokenizer.model.train()
    tokenizer.model.decoder.eval()
    before = {name: value.clone() for name, value in tokenizer.model.state_dict().items()}
    modes = [module.training for module in tokenizer.model.modules()]
    codes = tokenizer.encode([picture(16, 24)])
    tokenizer.decode(codes)
    assert_same_codes(codes, expected)
    assert modes == [module.training for module in tokenizer.model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.model.state_dict().items())
    assert all(codebook._counts is None for codebook in tokenizer.model.quantizer.codebooks), "statistics were gathered"
    assert not any(level.requires_grad for level in codes.levels)
    with pytest.raises(ValueError):
        tokenizer.encode(picture(3, 3))
    assert modes == [module.training for module in tokenizer.model.modules()], "an error leaves it in eval mode"


def test_encode_and_decode_run_in_eval_mode_whatever_the_mode():
    tokenizer = make_tokenizer()
    tokenizer.model.encoder.features[0].append(torch.nn.Dropout(0.5))
    tokenizer.model.decoder.to_pixels = torch.nn.Sequential(torch.nn.Dropout(0.5), tokenizer.model.decoder.to_pixels)
    codes, images = tokenizer.encode(picture(16, 24)), tokenizer.reconstruct(picture(16, 24))
    tokenizer.model.train()
    assert_same_codes(tokenizer.encode(picture(16, 24)), codes)
    np.testing.assert_array_equal(np.asarray(tokenizer.decode(codes)[0]), np.asarray(images[0]))


# -- code spaces


def test_codes_of_another_tokenizer_are_refused_by_name(saved, tmp_path):
    other = make_tokenizer(seed=1)
    other.save_pretrained(tmp_path)
    mine = VQTokenizer.from_pretrained(saved)
    codes = other.encode(picture(16, 16))
    with pytest.raises(ValueError) as caught:
        mine.decode(codes)
    assert other.fingerprint in str(caught.value) and mine.fingerprint in str(caught.value)
    with pytest.raises(ValueError, match="do not fit this tokenizer's"):
        make_tokenizer(strides=[16, 8]).decode(codes)
    nameless = Codes(codes.levels, codes.sizes, codes.layout, None)
    assert mine.decode(nameless)[0].size == (16, 16)


def test_the_fingerprint_follows_what_decides_codes():
    def of(change=None, stride=8):
        tokenizer = make_tokenizer()
        tokenizer.processor = ImageVQImageProcessor(stride=stride, max_pixels=1000)
        if change:
            with torch.no_grad():
                change(tokenizer.model)
        return tokenizer.model.code_fingerprint(tokenizer.processor.code_fields)

    same = of()
    assert of(lambda model: model.decoder.to_pixels.get_parameter(last(model.decoder.to_pixels)).add_(1)) == same
    assert of(lambda model: model.quantizer.levels[0].codebook.counts.add_(1)) == same
    different = [
        of(lambda model: model.encoder.heads[0].weight[0, 0].add_(1e-3)),
        of(lambda model: model.quantizer.levels[1].codebook.embedding[0].add_(1e-3)),
        of(stride=16),
    ]
    assert len({same, *different}) == 4


def last(module):
    return [name for name, _ in module.named_parameters()][-1]


def test_verify(copied):
    tokenizer = VQTokenizer.from_pretrained(copied)
    assert tokenizer.verify() == tokenizer.fingerprint
    weights = load_file(copied / "model.safetensors")
    weights["encoder.heads.0.weight"][0, 0] += 1e-3
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    tampered = VQTokenizer.from_pretrained(copied)
    with pytest.raises(ValueError, match=tokenizer.fingerprint) as caught:
        tampered.verify()
    assert tampered.model.code_fingerprint(tampered.processor.code_fields) in str(caught.value)
    with pytest.raises(ValueError, match="never saved"):
        make_tokenizer().verify()


def test_bfloat16_keeps_codebooks_and_says_why_it_cannot_be_verified(saved):
    tokenizer = VQTokenizer.from_pretrained(saved, dtype="bfloat16")
    assert tokenizer.model.encoder.heads[0].weight.dtype == torch.bfloat16
    assert tokenizer.model.quantizer.levels[0].codebook.embedding.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode(picture(16, 17)))[0].size == (17, 16)
    with pytest.raises(ValueError, match="load it in float32"):
        tokenizer.verify()


def test_the_default_is_float32_also_for_a_folder_in_bfloat16(saved, tmp_path):
    VQTokenizer.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = VQTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model.dtype == torch.float32 and tokenizer.verify()
    assert tokenizer.fingerprint != VQTokenizer.from_pretrained(saved).fingerprint, "the rounded encoder is another one"
