"""Text, pictures and sound to ids and back: labels, padding, bad input, files, and any standard trainer."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub.loopback import MINE
from tests.multimodal.conftest import make_model, make_text_tokenizer
from tests.tiny import make_tokenizer, picture, sound
from vqtok import MultimodalProcessor, VQTokenizer, extend

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def same(one, other):
    if isinstance(one, str):
        return one == other
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_ids_labels_and_modalities_by_hand(extended):
    _, processor = extended
    words = [processor.tokenizer(text).input_ids for text in ("a red three", "top left")]
    seen = processor.vocabulary.write("image", processor.vq_tokenizers["image"].encode([picture(8, 16)]))[0]
    stop = processor.tokenizer.eos_token_id
    sample = ["a red three", picture(8, 16), "top left"]
    plain = processor([sample])
    assert plain["input_ids"].tolist() == [[*words[0], *seen, *words[1]]] and set(plain) == {
        "input_ids",
        "attention_mask",
    }
    silent = [[-100] * len(part) for part in (words[0], seen, words[1])]
    wanted = {
        "all": [*words[0], *seen, *words[1], stop],
        "last": [*silent[0], *silent[1], *words[1], stop],
        "text": [*words[0], *silent[1], *words[1], stop],
        "media": [*silent[0], *seen, *silent[2], -100],
    }
    for labels, expected in wanted.items():
        batch = processor([sample], labels=labels, return_modality_ids=True)
        assert batch["labels"].tolist() == [expected]
        assert batch["input_ids"].tolist() == [[*words[0], *seen, *words[1], stop]]
        assert batch["modality_ids"].tolist() == [[0] * len(words[0]) + [1] * len(seen) + [0] * (len(words[1]) + 1)]
    own = processor([sample, "top left"], labels=[[1], []])["labels"]
    assert own[0].tolist() == [*silent[0], *seen, *silent[2], -100] and set(own[1].tolist()) == {-100}
    assert processor([sample], labels="last", end=False)["labels"].shape[1] == len(wanted["all"]) - 1
    begun = processor(["top left"], begin="image", sizes=(8, 16))["input_ids"][0].tolist()
    assert begun == [*words[1], *seen[:3]]
    assert processor(["top left"], begin="audio")["input_ids"][0, -1] == processor.vocabulary.special_id(
        "audio", "begin"
    )


def test_a_batch_is_its_samples_padded(extended):
    _, processor = extended
    samples = [["a red three", picture(16, 8)], "top", [("image", picture(8, 8)), sound(100), picture(8, 8, 1), "a"]]
    for labels, side in ((None, "left"), ("all", "right"), ("last", "left")):
        batch = processor(
            samples,
            labels=labels,
            return_modality_ids=True,
            sampling_rate=8000,
            padding_side=None if labels != "last" else side,
        )
        for row, sample in enumerate(samples):
            alone = processor([sample], labels=labels, return_modality_ids=True, sampling_rate=8000)
            count = alone["input_ids"].shape[1]
            inside = slice(-count, None) if side == "left" else slice(count)
            for name in alone:
                assert torch.equal(batch[name][row, inside], alone[name][0]), name
            assert int(batch["attention_mask"][row].sum()) == count
            if labels:
                assert int((batch["labels"][row] != -100).sum()) == int((alone["labels"] != -100).sum())
    lists = processor(samples, labels="all", return_tensors=None, sampling_rate=8000)
    rows = [{name: value[i] for name, value in lists.items()} for i in range(3)]
    assert torch.equal(
        processor.pad(rows)["input_ids"], processor(samples, labels="all", sampling_rate=8000)["input_ids"]
    )


def test_what_was_written_is_read_again(extended):
    _, processor = extended
    image, audio = (processor.vq_tokenizers[name] for name in ("image", "audio"))
    samples = [
        ["a red three", picture(16, 8), "top left", picture(32, 24, 2)],
        [sound(320), "a tab\tand a bell\x07"],
        [picture(16, 8, 1)],
    ]
    batch = processor(samples, sampling_rate=8000)
    back = processor.batch_decode(batch["input_ids"])
    expected = [
        [
            " a red three",
            image.reconstruct([picture(16, 8)])[0],
            " top left",
            image.reconstruct([picture(32, 24, 2)])[0],
        ],
        [
            audio.reconstruct([sound(320)], sampling_rate=8000)[0],
            " a tab and a bell\x07",
        ],  # runs of white space are one space here
        [image.reconstruct([picture(16, 8, 1)])[0]],
    ]
    assert [len(row) for row in back] == [len(row) for row in expected]
    assert all(same(a, b) for row, other in zip(back, expected, strict=True) for a, b in zip(row, other, strict=True))
    assert all(same(a, b) for a, b in zip(processor.decode(batch["input_ids"][0]), expected[0], strict=True))
    codes = image.encode([picture(16, 8), picture(32, 24, 2)])
    given = processor([["a red three", codes[0], "top left", codes[1]]])
    assert torch.equal(given["input_ids"][0], batch["input_ids"][0]), "codes are as good as the picture"
    odd = processor([[picture(13, 9)]])["input_ids"]
    assert processor.decode(odd[0])[0].size == (16, 16), "whole cells of the coarsest grid"


def test_names_in_a_text_are_text_unless_asked(extended):
    _, processor = extended
    name = "<|image_0_0_7|>"
    token = processor.vocabulary.id("image", 0, 0, 7)
    for text in (name, f"see {name} there", f"{name}{name}<|image_begin|>", f"a<|endoftext|>b {name}"):
        ids = processor([text])["input_ids"][0].tolist()
        assert max(ids) < processor.vocabulary.text_size
        said = processor.decode(ids, skip_special_tokens=False)
        assert "".join(said).replace(" ", "") == text.replace(" ", "")
        assert token in processor([text], parse_tokens=True)["input_ids"][0].tolist()
    stop = processor.tokenizer.eos_token_id
    assert processor([f"a<|endoftext|>b {name}"])["input_ids"][0].tolist().count(stop) == 1, (
        "its own special tokens count"
    )
    assert processor(["a<|endoftext|>"])["input_ids"][0, -1] == stop, "and the text behind is read as before"


def test_chats_are_written_by_the_template(extended):
    _, processor = extended
    with pytest.raises(ValueError, match="no chat_template"):
        processor([{"role": "user", "content": "a"}])
    processor.tokenizer.chat_template = CHAT
    seen = processor.vq_tokenizers["image"].encode([picture(8, 8)])
    ids = processor.vocabulary.write("image", seen)[0]
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "see <|image_0_0_7|> "}, {"type": "image", "image": picture(8, 8)}],
        },
        {"role": "assistant", "content": "a red three"},
        {"role": "user", "content": "top left"},
        {"role": "assistant", "content": [{"type": "image", "image": seen}]},
    ]
    stop = processor.tokenizer.eos_token_id
    batch = processor(chat, labels="assistant", return_modality_ids=True)
    row, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    answers = [*processor.tokenizer("a red three<|endoftext|>").input_ids, *ids, stop]
    assert [token for token in labels if token != -100] == answers
    assert [t for t, m in zip(row, batch["modality_ids"][0].tolist(), strict=True) if m == 1] == ids * 2
    said = processor.decode(row, skip_special_tokens=False)
    assert [item if isinstance(item, str) else "picture" for item in said] == [
        " <|user|>see <|image_0_0_7|>", "picture", "<|endoftext|> <|assistant|> a red three<|endoftext|>"
        " <|user|>top left<|endoftext|> <|assistant|>",
        "picture", "<|endoftext|>",
    ]  # fmt: skip
    asked = processor([chat[:1], chat[:3]], add_generation_prompt=True)
    assert processor.decode(asked["input_ids"][0])[-1].endswith("<|assistant|>")
    with pytest.raises(ValueError, match="sample 1 is no chat"):
        processor([chat, ["a"]], labels="assistant")


@pytest.mark.parametrize(
    ("samples", "options", "words"),
    [
        (["a", ["b", "\ud800 c"]], {}, r"sample 1, item 1: a text holds the lone surrogate U\+D800 at 0"),
        (["a", ""], {}, "sample 1 has no ids: an empty text"),
        ([], {}, "there are no samples"),
        ([[("video", "x")]], {}, "sample 0, item 0: no modality 'video': there are image, audio"),
        ([["a", 3]], {}, "sample 0, item 1: an item is a text"),
        ([["a", picture(80, 8)]], {}, "sample 0, item 1: image: a coarsest grid of 10"),
        (
            [["a", picture(4, 4)]],
            {},
            "the media of 'image', counted over all samples: item 0: .*smaller than the stride",
        ),
        (["a"], {"labels": "some"}, "labels must be one of all, last"),
        (["a"], {"labels": [[1]]}, "sample 0: item 1 shall be learned, it has 1"),
        (["a"], {"labels": []}, "labels are given for 0 samples"),
        (["a"], {"sizes": (8, 8)}, "give begin too"),
        (["a"], {"begin": "image", "labels": "all"}, "give one of them"),
        (["a"], {"begin": "video"}, "no modality 'video'"),
        (["a"], {"padding_side": "top"}, "padding_side must be left or right"),
    ],
)
def test_bad_input_is_said_with_its_place(extended, samples, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        extended[1](samples, **options)


def test_control_characters_and_empty_texts_beside_media_have_a_defined_result(extended):
    _, processor = extended
    text = "".join(map(chr, range(1, 32))) + "\x7f\u0085\u2028"
    said = processor.decode(processor([f"a{text}b"])["input_ids"][0])
    assert said[0].startswith(" a\x01\x02") and said[0].endswith("b")
    alone = processor([[picture(8, 8)]])["input_ids"]
    assert torch.equal(processor([["", picture(8, 8), ""]])["input_ids"], alone)


def test_codes_of_another_tokenizer_are_refused(extended, tmp_path):
    _, processor = extended
    make_tokenizer(seed=5).save_pretrained(tmp_path)
    other = VQTokenizer.from_pretrained(tmp_path)
    codes = other.encode([picture(8, 8)])
    with pytest.raises(
        ValueError, match=f"sample 0, item 1: codes of the code space {other.fingerprint} belong to none of"
    ):
        processor([["a", codes]])
    with pytest.raises(ValueError, match=f"code space {other.fingerprint}"):
        processor([[("image", codes)]])
    with pytest.raises(ValueError, match="Codes of 2 samples"):
        processor([[processor.vq_tokenizers["image"].encode([picture(8, 8)] * 2)]])


def test_a_medium_that_ends_early_is_refused_or_shown_as_far_as_it_goes(extended):
    _, processor = extended
    vq, vocabulary = processor.vq_tokenizers["image"], processor.vocabulary
    codes = vq.encode([picture(16, 8)])
    ids = [*processor.tokenizer("a").input_ids, *vocabulary.write("image", codes)[0]]
    begin = ids.index(vocabulary.special_id("image", "begin"))
    coarse = vq.decode(codes.prefix(num_levels=1))[0]
    fine = vq.decode(codes)[0]
    seen = set()
    for stop in range(begin + 1, len(ids)):
        with pytest.raises(ValueError, match=f"row 0: the image that begins in column {begin} is not finished"):
            processor.decode(ids[:stop])
        for tail in ([], processor.tokenizer("top").input_ids):
            text, shown, *rest = processor.decode([*ids[:stop], *tail], unfinished="coarse")
            behind = stop - begin - 3  # two places, each with the end of its row, are the coarse level
            expected = None if behind < 4 else fine if stop == len(ids) - 1 else coarse
            seen.add("none" if expected is None else "fine" if expected is fine else "coarse")
            assert (text, rest) == (" a", [" top"] if tail else [])
            assert shown is None if expected is None else same(shown, expected)
    assert seen == {"none", "coarse", "fine"}
    wrong = list(ids)
    wrong[begin + 3] = vocabulary.id("image", 1, 0, 0)
    with pytest.raises(
        ValueError, match=rf"holds \('image', 'code', 1, 0, 0\) in column {begin + 3}, where it cannot stand"
    ):
        processor.decode(wrong)
    assert processor.decode(wrong, unfinished="coarse") == [" a", None]
    for axis in (1, 2):
        wrong = list(ids)
        wrong[begin + axis] = vocabulary.id("image", 1, 0, 0)
        with pytest.raises(ValueError, match=rf"begins in column {begin} holds .* in column {begin + axis}, where it"):
            processor.decode(wrong)
        assert processor.decode(wrong, unfinished="coarse") == [" a", None]
    stray = [vocabulary.id("image", 0, 0, 1)]
    with pytest.raises(ValueError, match="row 0: column 0 holds .* where no medium has begun"):
        processor.decode(stray)
    assert processor.decode(stray, unfinished="coarse") == []
    for bad, words in (([-100], "give ids, not labels"), ([vocabulary.size], "where no medium has begun")):
        with pytest.raises(ValueError, match=words):
            processor.decode(bad)
    with pytest.raises(ValueError, match="unfinished must be one of error, coarse"):
        processor.decode(ids, unfinished="maybe")


def test_a_processor_lives_beside_the_model(extended, tmp_path):
    model, processor = extended
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MultimodalProcessor.from_pretrained(tmp_path)
    assert again.vocabulary == processor.vocabulary
    samples = [["a red three", picture(16, 8), sound(100)]]
    inputs = again(samples, sampling_rate=8000)
    assert torch.equal(inputs["input_ids"], processor(samples, sampling_rate=8000)["input_ids"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == processor.vocabulary.size
    for path in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_folders_that_do_not_fit_are_refused(extended, tmp_path):
    _, processor = extended
    processor.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "multimodal.json").read_text())

    def broken(words, error=ValueError, **changes):
        (tmp_path / "multimodal.json").write_text(json.dumps({**facts, **changes}))
        with pytest.raises(error, match=words):
            MultimodalProcessor.from_pretrained(tmp_path)

    broken("format 2, this vqtok knows 1", format=2)
    broken("makes no sense", vocabulary={})
    broken("makes no sense", vq_tokenizers={"image": "vq_image"})
    for place in ("../vq_image", "/vq_image", {"repo": "a/b"}, {"repo": "../b", "revision": "main"}, 3):
        broken("must be the folder 'vq_image' or a repository", vq_tokenizers={"image": place, "audio": "vq_audio"})
    changed = json.loads(json.dumps(facts["vocabulary"]))
    changed["modalities"][0]["fingerprint"] = "0" * 64
    broken("0{64} is expected", vocabulary=changed)
    changed = json.loads(json.dumps(facts["vocabulary"]))
    changed["text_size"] += 1
    broken("should be id", vocabulary=changed)
    (tmp_path / "multimodal.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no multimodal.json"):
        MultimodalProcessor.from_pretrained(tmp_path)


def test_the_vq_tokenizers_may_stay_on_the_hub(hub, tmp_path, vqs):
    with pytest.raises(ValueError, match="'image' was not loaded from the Hub"):
        extend(tokenizer := make_text_tokenizer(), make_model("gpt2", len(tokenizer)), vqs["image"]).save_pretrained(
            tmp_path, copy=False
        )
    assert not list(tmp_path.iterdir())
    vqs["image"].push_to_hub("me/vq", token=MINE)
    published = VQTokenizer.from_pretrained("me/vq", token=MINE)
    processor = extend(tokenizer := make_text_tokenizer(), make_model("gpt2", len(tokenizer)), published)
    processor.save_pretrained(tmp_path, copy=False)
    assert not (tmp_path / "vq_image").exists()
    place = json.loads((tmp_path / "multimodal.json").read_text())["vq_tokenizers"]["image"]
    assert place == {"repo": "me/vq", "revision": published.source["revision"]}
    again = MultimodalProcessor.from_pretrained(tmp_path, token=MINE)
    assert again.vq_tokenizers["image"].fingerprint == vqs["image"].fingerprint


def test_a_tokenizer_that_writes_a_start_keeps_it(vqs):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_text_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    processor = extend(tokenizer, make_model("llama", len(tokenizer)), vqs["image"], max_grid=4)
    batch = processor([["a", picture(8, 8), "b"], "a"], labels="all", padding_side="right")
    assert batch["input_ids"][:, 0].tolist() == [start, start] and int((batch["input_ids"] == start).sum()) == 2
    guided = processor.unconditional(processor(["a b"], begin="image"))["negative_prompt_ids"][0].tolist()
    assert guided == [start, processor.vocabulary.special_id("image", "begin")]


def test_it_trains_under_the_trainer_of_transformers(extended, tmp_path):
    """With `datasets`, whose map writes real ids, and the processor's `pad` as the collator."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model, processor = extended
    pictures = [picture(8, 8, seed) for seed in range(4)]
    rows = Dataset.from_dict({"number": [0, 1, 2, 3] * 2, "text": [f"a {i} three" for i in (0, 1, 2, 3) * 2]})
    data = rows.map(
        lambda batch: processor(
            [[text, pictures[i]] for i, text in zip(batch["number"], batch["text"], strict=True)], labels="last", return_tensors=None
        ),
        batched=True, remove_columns=rows.column_names,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=10, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=processor.pad)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < 0.7 * losses[0], losses
