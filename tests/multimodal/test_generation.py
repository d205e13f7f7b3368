"""Generation inside the grid: against a twin that walks the ids one by one, through `generate`, with beams and guidance."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.multimodal.test_multimodal_vocabulary import AUDIO, BOTH, IMAGE, random_codes, slow_ids
from tests.tiny import picture, sound
from vqtok import GridLogitsProcessor


def slow_allowed(vocabulary, ids, mode, sizes, eos):
    """The set of ids that may follow, from a walk over the whole row."""
    inside = None
    for at, token in enumerate(ids):
        where = vocabulary.locate(token)
        if where[1:] == ("begin",):
            inside = (where[0], at)
        elif where[1:] == ("end",):
            inside = None
    if inside is None:
        text = set(range(vocabulary.text_size))
        begins = {vocabulary.special_id(name, "begin") for name in vocabulary.blocks}
        if mode == "text":
            return text
        if mode == "interleaved":
            return text | begins
        ended = eos is not None and ids and ids[-1] in (eos, vocabulary.special_id(mode, "end"))
        return {eos} if ended else {vocabulary.special_id(mode, "begin")}
    name, begin = inside
    layout = vocabulary.modality(name).layout
    behind = ids[begin + 1 :]
    if len(behind) < layout.ndim:
        extents = range(1, vocabulary.modality(name).max_grid + 1)
        if name in sizes:
            extents = [layout.grids(sizes[name])[0][len(behind)]]
        return {vocabulary.size_id(name, extent) for extent in extents}
    size = [vocabulary.locate(token)[2] * layout.stride for token in behind[: layout.ndim]]
    kind = vocabulary.locate(slow_ids(vocabulary, name, random_codes(layout, size))[1 + len(behind)])
    if kind[1] != "code":
        return {vocabulary.special_id(name, kind[1])}
    stream = vocabulary.block(name).streams
    count = next(each.size for each in stream if (each.level, each.codebook) == tuple(kind[2:4]))
    return {vocabulary.id(name, kind[2], kind[3], code) for code in range(count)}


@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("mode", ["text", "interleaved", "image", "audio"])
def test_what_may_follow_is_what_a_walk_says(mode, eos):
    sizes = {"image": (8, 16)}
    picture_ids = slow_ids(BOTH, "image", random_codes(IMAGE.layout, (16, 8)))
    sound_ids = slow_ids(BOTH, "audio", random_codes(AUDIO.layout, (12,)))
    whole = [3, *picture_ids, 5, 6, *sound_ids, *picture_ids, 2]
    grid = GridLogitsProcessor(BOTH, mode, sizes, eos)
    for padding, rows in ((0, range(1, len(whole) + 1)), (3, range(0, len(whole), 5))):
        prefixes = [[0] * padding + whole[:stop] for stop in rows]
        longest = max(map(len, prefixes))
        batch = torch.tensor([[1] * (longest - len(row)) + row for row in prefixes])
        allowed = grid.allowed(batch, BOTH.padded_size)
        for row, ids in zip(allowed, batch.tolist(), strict=True):
            wanted = slow_allowed(BOTH, ids, mode, sizes, eos)
            assert set(row.nonzero()[:, 0].tolist()) == wanted
            assert torch.equal(grid.allowed(torch.tensor([ids]), BOTH.padded_size)[0], row), "alone or in a batch"
    scores = torch.randn(len(batch), BOTH.padded_size)
    masked = grid(batch, scores)
    assert torch.equal(masked.isfinite(), allowed) and torch.equal(masked[allowed], scores[allowed])


def media(row):
    return [item for item in row if not isinstance(item, str)]


@pytest.mark.parametrize(("num_beams", "do_sample"), [(1, True), (1, False), (3, False)])
def test_generate_draws_pictures_of_the_size_that_was_asked(extended, num_beams, do_sample):
    model, processor = extended
    stop = processor.tokenizer.eos_token_id
    grid = GridLogitsProcessor(processor.vocabulary, "image", sizes=(16, 24), eos_token_id=stop)
    inputs = processor(["a red three", "a blue seven bottom right", [picture(16, 8), "and this"]])
    ids = model.generate(
        **inputs,
        max_new_tokens=200,
        logits_processor=[grid],
        do_sample=do_sample,
        num_beams=num_beams,
        eos_token_id=stop,
    )
    rows = processor.batch_decode(ids)
    assert [item.size for row in rows for item in media(row)[-1:]] == [(24, 16)] * 3
    assert [len(media(row)) for row in rows] == [1, 1, 2]
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    assert new == processor.vocabulary.num_tokens("image", (16, 24)) + 1, "and then the end"


def test_generate_with_free_sizes_sound_and_the_middle_of_a_grid(extended):
    model, processor = extended
    vocabulary, stop = processor.vocabulary, processor.tokenizer.eos_token_id
    torch.manual_seed(1)
    free = GridLogitsProcessor(vocabulary, "image", eos_token_id=stop)
    ids = model.generate(
        **processor(["a red three"] * 4), max_new_tokens=400, do_sample=True, logits_processor=[free], eos_token_id=stop
    )
    sizes = {row[1].size for row in processor.batch_decode(ids)}
    assert len(sizes) > 1 and all(side in (8, 16, 24, 32) for size in sizes for side in size)
    heard = GridLogitsProcessor(vocabulary, "audio", sizes=(120,), eos_token_id=stop)
    ids = model.generate(
        **processor(["speak"]), max_new_tokens=100, do_sample=True, logits_processor=[heard], eos_token_id=stop
    )
    assert processor.batch_decode(ids)[0][1].shape == (120,)
    whole = processor([[picture(16, 16)], ["so", picture(16, 16, 1)]], padding_side="left")
    for cut in (2, 9, 25):
        begun = {name: value[:, :-cut] for name, value in whole.items()}
        ids = model.generate(**begun, max_new_tokens=60, do_sample=True, logits_processor=[free], eos_token_id=stop)
        assert torch.equal(ids[:, : begun["input_ids"].shape[1]], begun["input_ids"])
        assert [media(row)[0].size for row in processor.batch_decode(ids)] == [(16, 16)] * 2


def test_interleaved_generation_is_always_text_and_whole_media(extended):
    model, processor = extended
    torch.manual_seed(0)
    grid = GridLogitsProcessor(processor.vocabulary, "interleaved", sizes={"image": (8, 8), "audio": (80,)})
    with torch.no_grad():  # so that media begin often
        for name in ("image", "audio"):
            begin = processor.vocabulary.special_id(name, "begin")
            model.lm_head.weight[begin] = 3 * model.lm_head.weight[: processor.vocabulary.text_size].abs().max(0).values
    ids = model.generate(**processor(["a red", "a"]), max_new_tokens=150, do_sample=True, logits_processor=[grid])
    assert int(ids.max()) < processor.vocabulary.size
    rows = processor.batch_decode(ids, unfinished="coarse")
    kinds = {type(item) for row in rows for item in row}
    assert {str, Image.Image, np.ndarray} <= kinds
    text = GridLogitsProcessor(processor.vocabulary, "text")
    ids = model.generate(**processor([[picture(8, 8)]]), max_new_tokens=40, do_sample=True, logits_processor=[text])
    new = ids[:, -40:]
    assert int(new.max()) < processor.vocabulary.text_size


def test_generation_without_the_processor_leaves_the_grid(extended):
    """So the tests above would see it."""
    model, processor = extended
    inputs = processor(["a red three"], begin="image", sizes=(16, 16))
    ids = model.generate(**inputs, max_new_tokens=50, do_sample=True)
    with pytest.raises(ValueError, match="row 0: the image that begins in column .* where it cannot stand"):
        processor.batch_decode(ids)


def test_guidance_is_that_of_two_plain_passes(extended):
    model, processor = extended
    vocabulary, stop = processor.vocabulary, processor.tokenizer.eos_token_id
    grid = GridLogitsProcessor(vocabulary, "image", eos_token_id=stop)
    inputs = processor(["a red three", "there is a green zero"], begin="image", sizes=(8, 8))
    guided = processor.unconditional(inputs)
    size_ids = [vocabulary.special_id("image", "begin"), *[vocabulary.size_id("image", 1)] * 2]
    assert guided["negative_prompt_ids"].tolist() == [size_ids] * 2
    ids = model.generate(
        **inputs,
        **guided,
        guidance_scale=3.0,
        max_new_tokens=30,
        do_sample=False,
        logits_processor=[grid],
        eos_token_id=stop,
    )
    told, untold = inputs["input_ids"], guided["negative_prompt_ids"]
    mask = inputs["attention_mask"]
    with torch.no_grad():
        while told.shape[1] < ids.shape[1]:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            yes = model(told, attention_mask=mask, position_ids=positions).logits[:, -1].log_softmax(-1)
            no = model(untold).logits[:, -1].log_softmax(-1)
            next_ids = grid(told, no + 3.0 * (yes - no)).argmax(-1, keepdim=True)
            told, untold = torch.cat([told, next_ids], 1), torch.cat([untold, next_ids], 1)
            mask = torch.cat([mask, torch.ones_like(next_ids)], 1)
    assert torch.equal(told, ids)
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False, logits_processor=[grid], eos_token_id=stop)
    assert not torch.equal(plain, ids), "guidance changes what is drawn"
    with pytest.raises(ValueError, match="row 0 does not end inside a medium"):
        processor.unconditional(processor([[picture(8, 8)]]))


def test_the_middle_of_a_grid_is_guided_with_what_is_there(extended):
    model, processor = extended
    whole = processor(["a red three"], begin="image", sizes=(8, 8))["input_ids"]
    code = processor.vocabulary.id("image", 0, 0, 3)
    begun = {"input_ids": torch.cat([whole, torch.tensor([[code]])], 1)}
    assert processor.unconditional(begun)["negative_prompt_ids"][0].tolist() == [*whole[0, -3:].tolist(), code]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GridLogitsProcessor(BOTH, "video"), "text, interleaved, image or audio, got 'video'"),
        (lambda: GridLogitsProcessor(BOTH, "text", sizes=(8, 8)), "by the name of the modality"),
        (lambda: GridLogitsProcessor(BOTH, "image", sizes=(80, 8)), "coarsest grid of 10"),
        (lambda: GridLogitsProcessor(BOTH, "image", eos_token_id=10), "must be a text token below 10"),
        (
            lambda: GridLogitsProcessor(BOTH)(torch.tensor([[1]]), torch.zeros(1, 64)),
            "the model has 64 rows, the vocabulary 808",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("ids", [[10, 5], [10, 13, 5], [10, 13, 13] + [15] * 20])
def test_a_broken_medium_counts_as_none(ids):
    grid = GridLogitsProcessor(BOTH, "interleaved")
    assert torch.equal(grid.allowed(torch.tensor([ids])), grid.allowed(torch.tensor([[5]])))


def test_beams_of_different_length_do_not_disturb_each_other(extended):
    model, processor = extended
    grid = GridLogitsProcessor(processor.vocabulary, "image", eos_token_id=processor.tokenizer.eos_token_id)
    inputs = processor(["a red three", "a", "top left", "blue"])
    ids = model.generate(
        **inputs,
        max_new_tokens=400,
        logits_processor=[grid],
        num_beams=4,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    assert [len(media(row)) for row in processor.batch_decode(ids)] == [1] * 4


def test_sound_and_pictures_of_the_fixtures_are_not_trivial(extended):
    _, processor = extended
    rows = processor([[picture(32, 32)], [sound(800)]], sampling_rate=8000)["input_ids"]
    assert min(len(set(row.tolist())) for row in rows) > 10
