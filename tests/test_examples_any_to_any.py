"""`train_any_to_any.py`, tiny: it saves what loads, resumes exactly, judges both directions, and takes a text model with adapters."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples import train_any_to_any
from tests.tiny import make_tokenizer, picture
from vqtok import GridLogitsProcessor, MultimodalProcessor, VQTokenizer
from vqtok.image.digits import CaptionedDigits
from vqtok.prior import train_text_tokenizer
from vqtok.prior.data import write_code_cache

QUICK = [
    "--max_steps",
    "4",
    "--batch_size",
    "4",
    "--save_every",
    "2",
    "--log_every",
    "2",
    "--warmup_steps",
    "1",
    "--num_threads",
    "1",
]
SMALL = ["--hidden_size", "32", "--num_hidden_layers", "1", "--mixed_precision", "no"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, and codes of captioned digits."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer().save_pretrained(folder / "vq")
    tokenizer = VQTokenizer.from_pretrained(folder / "vq")
    items = [CaptionedDigits("train", 60)[i] for i in range(60)]
    codes = tokenizer.encode([item["image"] for item in items])
    write_code_cache(folder / "codes", [(codes, [{"text": item["text"]} for item in items])], {})
    return folder


def train(made, output, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    folders = ["--tokenizer", str(made / "vq"), "--codes", str(made / "codes"), "--output_dir", str(output)]
    return train_any_to_any.main([*folders, *QUICK, *flags])


def test_it_learns_both_directions_judges_them_and_reports(made, tmp_path):
    metrics = train(made, tmp_path / "out", *SMALL, "--num_judged", "4", "--report", str(tmp_path / "page.md"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert metrics["judged"] == 4 and 0 <= metrics["writing_exact"] <= 1 and metrics["judge_digit_on_real"] > 0.5
    page = (tmp_path / "page.md").read_text()
    assert (
        f"| caption: all facts exact | 90% | {metrics['writing_exact']:.1%} |" in page
        and (tmp_path / "page.png").exists()
    )
    assert metrics["prompt_length"] > 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    processor = MultimodalProcessor.from_pretrained(tmp_path / "out")
    grid = GridLogitsProcessor(processor.vocabulary, "image", (16, 16), processor.tokenizer.eos_token_id)
    ids = model.generate(**processor(["a red three top left"]), max_new_tokens=60, logits_processor=[grid])
    assert processor.batch_decode(ids)[0][1].size == (16, 16)
    for path in (tmp_path / "out").glob("*.json"):
        assert str(made) not in path.read_text(), path


def test_a_batch_holds_both_directions(made):
    vq, codes = VQTokenizer.from_pretrained(made / "vq"), train_any_to_any.CodeDataset(made / "codes")
    script = train_any_to_any.AnyToAnyArguments(tokenizer="", hidden_size=32, num_hidden_layers=1)
    model, processor = train_any_to_any._model(vq, codes, list(range(60)), script)
    batch = train_any_to_any.both_directions(processor, [codes[i] for i in range(6)], 20)
    length = processor.vocabulary.num_tokens("image", (32, 32))
    begin = processor.vocabulary.special_id("image", "begin")
    assert batch["told"].tolist() == [True] * 3 + [False] * 3
    for row in range(6):
        ids, learned = batch["input_ids"][row], batch["labels"][row] != -100
        pictures = batch["modality_ids"][row] > 0
        first = int((ids == begin).nonzero()[0])
        assert int(pictures.sum()) == length and bool(learned[pictures].all())
        assert first == 20 and not bool(learned[:first].any()), "a caption in front is told, not learned"
        said = processor.tokenizer.decode(ids[:first], skip_special_tokens=True).strip()
        told = codes[range(6)[::2][row]]["text"] if row < 3 else ""
        assert said == told and (int(ids[0]) == processor.tokenizer.eos_token_id), "filled up in front"
        assert bool(learned[first + length]), "the end, or the first word of what is written"
    given = train_any_to_any.AnyToAnyArguments(tokenizer="", init_from="any")
    assert train_any_to_any.prompt_length(processor, codes, given) == 0
    longest = train_any_to_any.prompt_length(processor, codes, script)
    assert longest == max(len(processor.tokenizer.tokenize(text)) for text in codes.columns["text"]) > 5
    losses = train_any_to_any.direction_losses(model, batch, torch.device("cpu"))
    assert set(losses) == {"drawing", "alone", "writing"} and all(value.isfinite() for value in losses.values())


def test_a_stopped_run_continues_to_the_same_weights(made, tmp_path, monkeypatch):
    dataset = ["--num_judged", "2"]
    train(made, tmp_path / "whole", *SMALL, *dataset)
    calls = []

    class Crashing(train_any_to_any.AnyToAnyStep):
        def __call__(self, batches, rate):
            calls.append(rate)
            if len(calls) == 4:
                raise RuntimeError("crash")
            return super().__call__(batches, rate)

    with monkeypatch.context() as patched:
        patched.setattr(train_any_to_any, "AnyToAnyStep", Crashing)
        with pytest.raises(RuntimeError, match="crash"):
            train(made, tmp_path / "cut", *SMALL, *dataset)
    train(made, tmp_path / "cut", *SMALL, *dataset)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_a_text_model_leave_its_words_alone(made, tmp_path, tied):
    words = train_text_tokenizer(["a text model of its own"], 300)
    words.add_special_tokens({"eos_token": "</s>"})
    words.save_pretrained(tmp_path / "text")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied,
        eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    text = LlamaForCausalLM(config)
    text.save_pretrained(tmp_path / "text")
    flags = ["--init_from", str(tmp_path / "text"), "--lora_rank", "2", "--num_judged", "2", "--mixed_precision", "no"]
    train(made, tmp_path / "out", *flags, "--weight_decay", "0.5")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    before = text.state_dict()
    rows = len(words)
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        assert torch.equal(weights[name][:rows], before[name]) and len(weights[name]) > rows
    assert torch.equal(weights["model.norm.weight"], before["model.norm.weight"])
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="needs --init_from"):
        train(made, tmp_path / "no", "--lora_rank", "2")
    with pytest.raises(ValueError, match="--num_beams 0 must be at least 1"):
        train(made, tmp_path / "no", "--num_beams", "0")


def test_pictures_without_captions_are_refused_before_training(made, tmp_path):
    codes = VQTokenizer.from_pretrained(made / "vq").encode([picture(16, 16, seed) for seed in range(4)])
    write_code_cache(tmp_path / "codes", [(codes, [{}] * 4)], {})
    with pytest.raises(ValueError, match="needs a text for every sample"):
        train(made, tmp_path / "out", *SMALL, "--codes", str(tmp_path / "codes"))
    assert not (tmp_path / "out").exists()
