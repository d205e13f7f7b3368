"""The merge rule of cards: ours is new, a person's words stay."""

import pytest
import yaml

from vqtok.hub.card import BEGIN, END, front, render
from vqtok.hub.merge import merge_cards, read_card

FACTS = {"kind": "tokenizer", "modality": "image", "levels": [{"stride": 8, "num_codebooks": 1, "codebook_size": 16}]}
MEASURED = {"psnr_db": 30.0, "ssim": 0.9}
OLD = render("me/old", FACTS, MEASURED)
NEW = render("me/new", FACTS)
DEFAULT = """---
library_name: transformers
tags: []
---

# Model Card for Model ID

This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been automatically generated.
"""


def fields(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_without_another_card_ours_is_as_it_is():
    assert merge_cards(NEW, None, None) == NEW
    assert merge_cards(NEW, NEW, NEW) == NEW, "and pushing again changes nothing"


def test_ours_is_replaced_and_what_stands_around_it_stays():
    edited = front({**fields(OLD), "license": "mit", "thumbnail": "x.png", "tags": ["vqtok", "cats"]}) + (
        f"Hello.\n\n{OLD.split('---', 2)[2].strip()}\n\n## Thanks\n\nto the cats.\n"
    )
    merged = merge_cards(NEW, None, edited)
    assert merged.count(BEGIN) == merged.count(END) == 1
    before, rest = merged.split(BEGIN)
    ours, after = rest.split(END)
    assert before.endswith("---\n\nHello.\n\n") and after == "\n\n## Thanks\n\nto the cats.\n"
    assert "me/new" in ours and "me/old" not in merged
    assert fields(merged)["license"] == "mit" and fields(merged)["thumbnail"] == "x.png"
    assert fields(merged)["tags"] == ["vqtok", "vq-vae", "image-tokenization", "cats"]
    assert "model-index" not in fields(merged), "figures of other weights do not live on"
    assert merge_cards(NEW, None, merged) == merged


def test_tags_and_data_of_an_older_card_of_ours_do_not_live_on():
    """A tokenizer's repository that holds a pipeline now."""
    training = {"arguments": {"dataset": "me/cats"}}
    old = render("me/x", {**FACTS, "datasets": ["me/cats"]}, training=training)
    old = old.replace("- me/cats\n", "- me/cats\n- me/dogs\n").replace(
        "- image-tokenization\n", "- image-tokenization\n- mine\n"
    )
    assert fields(old)["datasets"] == ["me/cats", "me/dogs"]
    new = render("me/x", {"kind": "pipeline", "modality": "image", "condition": "none"})
    merged = fields(merge_cards(new, None, old))
    assert merged["tags"] == ["vqtok", "vq-vae", "mine"] and merged["datasets"] == ["me/dogs"]
    theirs = front({"tags": ["image-tokenization"], "datasets": ["me/cats"]}) + "A person's.\n"
    merged = fields(merge_cards(new, None, theirs))
    assert "image-tokenization" in merged["tags"] and merged["datasets"] == ["me/cats"]


def test_a_card_of_a_person_goes_behind_ours_as_a_whole():
    merged = merge_cards(NEW, None, "---\nlicense: mit\nlibrary_name: timm\n---\n# Mine\n\nAll mine.\n")
    assert merged.endswith(f"{END}\n\n# Mine\n\nAll mine.\n")
    assert fields(merged)["license"] == "mit" and fields(merged)["library_name"] == "vqtok"
    assert merge_cards(NEW, None, "No header.").endswith(f"{END}\n\nNo header.\n")


def test_the_default_card_of_transformers_goes():
    assert merge_cards(NEW, None, DEFAULT) == NEW
    assert "transformers" not in merge_cards(NEW, None, DEFAULT.replace("tags: []", "tags: [transformers]"))


def test_the_folder_comes_before_the_hub_part_by_part():
    def card(before, after, **more):
        return front({**fields(OLD), **more}) + f"{before}\n{OLD.split('---', 2)[2].strip()}\n{after}\n"

    merged = merge_cards(
        NEW, card("Here.", "", license="mit"), card("There.", "Thanks.", license="gpl-3.0", language="en")
    )
    assert "Here." in merged and "There." not in merged and merged.endswith("Thanks.\n")
    assert fields(merged)["license"] == "mit" and fields(merged)["language"] == "en"


def test_a_licence_that_was_asked_for_wins():
    asked = render("me/new", {**FACTS, "license": "apache-2.0"})
    assert fields(merge_cards(asked, None, front({"license": "mit"})))["license"] == "apache-2.0"


@pytest.mark.parametrize("header", ["a: [", "- a list", "a: !!python/object/apply:os.system [x]", "just words"])
def test_a_header_that_cannot_be_read_is_named(header):
    with pytest.raises(ValueError, match=r"the header of README.md on the Hub .*: mend it first"):
        merge_cards(NEW, None, f"---\n{header}\n---\ntext")


def test_windows_line_ends_and_half_marks():
    card = read_card("---\r\nlicense: mit\r\n---\r\nMine.\r\n", "x")
    assert card.fields == {"license": "mit"} and card.after == "Mine."
    assert read_card(f"{BEGIN} and no end", "x").after == f"{BEGIN} and no end", "what is not closed is a person's"
