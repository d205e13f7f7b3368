"""Train one small language model that draws the picture of a caption and writes the caption of a picture.

    accelerate launch examples/train_any_to_any.py --tokenizer out/vq --output_dir out/any --report docs/any_to_any.md
    accelerate launch examples/train_any_to_any.py --tokenizer out/vq --init_from Qwen/Qwen3-0.6B --lora_rank 8 --output_dir out/any

A causal language model of transformers, from random weights (a small GPT-2) or given ones, gets ids for the codes. Each batch holds both
directions: caption, then picture, of which the picture is learned; and picture, then caption, where the caption is. These pictures, of
which nothing was said, are learned too: guidance leads away from them. GPT-2 learns a vector for each position, and every prompt has one
length, filled up with ends of text in front: so each code of a picture has a position of its own, from which the model knows its place.
On the embedded digits, captions that training never had are then drawn and judged, and written and read. The folder holds the model and
its processor; stopped anywhere, the same command continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from vqtok import GridLogitsProcessor, MultimodalProcessor, VQTokenizer, extend, freeze_old_rows
from vqtok.codes import Codes
from vqtok.encoding import encode_dataset, load_media
from vqtok.evaluation.digit_judge import DigitJudge
from vqtok.evaluation.pictures import contact_sheet
from vqtok.evaluation.report import machine
from vqtok.files import write_json, write_text, write_with
from vqtok.fingerprint import check_fingerprint
from vqtok.image.digits import SIZE, CaptionedDigits, parse_caption
from vqtok.prior import train_text_tokenizer
from vqtok.prior.adapters import check_peft, merge_adapters
from vqtok.prior.conditions import check_values
from vqtok.prior.data import MANIFEST, CodeDataset
from vqtok.training import StepSampler, TrainingArguments, fit, parse_arguments, step_loader
from vqtok.training.setup import finish, make_accelerator, model_fields, run_script, save_training
from vqtok.training.steps import OptimizerStep

# What differs from the defaults of `TrainingArguments`; flags override it.
RECIPE = {
    "max_steps": 12000,
    "batch_size": 32,
    "learning_rate": 0.0015,
    "weight_decay": 0.05,
    "adam_beta2": 0.95,
    "average_decay": 0.99,
    "mixed_precision": "bf16",
}
ALONE_WEIGHT = 0.5  # of the loss on pictures of which nothing was said
CHANGE_NO_WEIGHT = ("report", "num_judged", "guidance_scale", "temperature", "num_beams")
PROMPTS = ("a red three top left", "a green zero top right and a white nine bottom left", "a blue seven bottom right")


@dataclass
class AnyToAnyArguments:
    """Which model, and on what."""

    tokenizer: str = field(metadata={"help": "The VQ tokenizer of the pictures."})
    codes: str | None = field(
        default=None, metadata={"help": "A code cache with captions, instead of encoding --dataset."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Pictures with captions; None takes the embedded digits."}
    )
    caption_column: str | None = field(default=None, metadata={"help": "Column of captions."})
    num_samples: int | None = field(
        default=100_000,
        metadata={"help": "How many samples of the data set at most; of few, a small model remembers captions whole."},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "A folder or Hub id of a causal language model to start from."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Rank of adapters on --init_from, merged at the end; 0 trains everything."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of a fresh model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of a fresh model."})
    init: str = field(default="codebook", metadata={"help": "How rows of codes begin: codebook or mean."})
    text_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss on captions beside that on pictures."}
    )
    guidance_scale: float = field(default=2.0, metadata={"help": "Of the drawings."})
    temperature: float = field(default=0.5, metadata={"help": "Of the drawings."})
    num_beams: int = field(
        default=8,
        metadata={"help": "Beams of the captions: word by word, a place is soon said that belongs to the other glyph."},
    )
    num_judged: int = field(
        default=500, metadata={"help": "Held-out captions that are drawn, and pictures that are described."}
    )
    report: str | None = field(default=None, metadata={"help": "Markdown file to write, with a picture beside it."})

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or (self.lora_rank and not self.init_from):
            raise ValueError(f"--lora_rank {self.lora_rank} must be at least 0, and above 0 it needs --init_from")
        if self.num_beams < 1:
            raise ValueError(f"--num_beams {self.num_beams} must be at least 1")
        if self.lora_rank:
            check_peft()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save model and processor, and judge both directions on the embedded digits; returns what metrics.json holds."""
    script, args = parse_arguments((AnyToAnyArguments, TrainingArguments), argv, RECIPE, description=__doc__)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    vq = VQTokenizer.from_pretrained(script.tokenizer, device=accelerator.device)
    codes = _codes(accelerator, vq, script, Path(args.output_dir))
    held_out, train = list(range(0, len(codes), 50)), [i for i in range(len(codes)) if i % 50]
    model, processor = _model(vq, codes, train, script)
    count = sum(p.numel() for p in model.parameters())
    accelerator.print(f"{len(train)} samples to train on; {count:,} parameters", file=sys.stderr)
    step = AnyToAnyStep(accelerator, model, args)
    step.text_weight = script.text_weight
    length = prompt_length(processor, codes, script)

    def loader(start: int) -> Any:
        sampler = StepSampler(
            [group[np.isin(group, train)] for group in codes.groups()], args.batch_size, args.max_steps, args.seed, start,
            accelerator.process_index, accelerator.num_processes, args.gradient_accumulation_steps,
        )  # fmt: skip
        return step_loader(codes, lambda items: both_directions(processor, items, length), sampler, args.num_workers)

    @torch.no_grad()
    def evaluate(number: int) -> dict[str, float]:
        batch = both_directions(processor, [codes[i] for i in held_out[:256]], length)
        losses = direction_losses(model, batch, accelerator.device)
        return {**losses, "loss": float(total(losses, script.text_weight))}

    same_run = {
        **asdict(script),
        "model": model_fields(model.config),
        "prompt_length": length,
        "code_space": codes.fingerprint,
    }
    for name in CHANGE_NO_WEIGHT:
        del same_run[name]
    history = fit(accelerator, step, loader, args, evaluate=evaluate, extra_arguments=same_run)
    metrics: dict[str, Any] = {}
    if accelerator.is_main_process:
        if script.lora_rank:
            merge_adapters(model)
        folder = Path(args.output_dir)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        metrics = {
            "parameters": count,
            "steps": args.max_steps,
            "training_minutes": step.seconds / 60,
            "prompt_length": length,
        }
        metrics |= {
            name.removeprefix("eval_"): value for name, value in history[-1].items() if name.startswith("eval_")
        }
        if script.dataset is None:
            metrics |= judge(model, processor, script, length, folder)
        save_training(folder, {**asdict(script), **asdict(args)}, history, step.seconds)
        write_json(folder / "metrics.json", metrics)
        if script.report and script.dataset is None:
            _report(Path(script.report), metrics, model, processor, script)
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in metrics.items()})
    finish(accelerator)
    return metrics


def both_directions(processor: MultimodalProcessor, items: list[dict[str, Any]], length: int) -> dict[str, Tensor]:
    """A batch: even samples are drawn (caption, then picture), odd ones written (picture, then caption); "told" says which are drawn."""
    image = processor.vocabulary.modality("image")
    pictures = [
        Codes(tuple(level[None] for level in item["codes"]), [item["size"]], image.layout, image.fingerprint)
        for item in items
    ]
    pairs = [(item["text"], picture) for item, picture in zip(items, pictures, strict=True)]
    drawn = [[prompt(processor, text, length), picture] for text, picture in pairs[::2]]
    written = [[prompt(processor, "", length), picture, text] for text, picture in pairs[1::2]]
    rows: list[dict[str, Any]] = []
    # What is written begins with a picture that nothing was said about: learned too, it is what guidance leads away from.
    for samples, labels in ((drawn, [[1]] * len(drawn)), (written, [[1, 2]] * len(written))):
        if samples:
            lists = processor(samples, labels=labels, return_modality_ids=True, return_tensors=None)
            rows += [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return {**processor.pad(rows), "told": torch.tensor([True] * len(drawn) + [False] * len(written))}


def prompt(processor: MultimodalProcessor, text: str, length: int) -> str:
    """A text of at least `length` tokens, filled up in front with ends of text: what follows always begins at one position."""
    tokenizer = processor.tokenizer
    return tokenizer.eos_token * (length - len(tokenizer.tokenize(text))) + text


def prompt_length(processor: MultimodalProcessor, codes: CodeDataset, script: AnyToAnyArguments) -> int:
    """The tokens of the longest caption; 0 for a given model, which learned to read texts that begin where they begin."""
    if script.init_from:
        return 0
    return max(len(ids) for ids in processor.tokenizer(list(codes.columns["text"])).input_ids)


def direction_losses(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Mean nats per learned id: of pictures behind their captions ("drawing"), of pictures alone, and of captions ("writing")."""
    batch = {name: value.to(device) for name, value in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    labels, pictures = batch["labels"][:, 1:], batch["modality_ids"][:, 1:] > 0
    told = batch["told"][:, None]
    losses = {}
    for name, chosen in (("drawing", told), ("alone", pictures & ~told), ("writing", ~pictures & ~told)):
        chosen = chosen & (labels != -100)
        nats = F.cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum")
        losses[name] = nats / max(1, int(chosen.sum()))
    return losses


def total(losses: dict[str, Tensor], text_weight: float) -> Tensor:
    """What is minimised."""
    return losses["drawing"] + ALONE_WEIGHT * losses["alone"] + text_weight * losses["writing"]


class AnyToAnyStep(OptimizerStep):
    """A step of both directions: the sum of their losses, weighted."""

    text_weight = 1.0

    def compute(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = direction_losses(self.prepared, batch, self.accelerator.device)
        return total(losses, self.text_weight), {name: value.detach() for name, value in losses.items()}


def _codes(accelerator: Accelerator, vq: VQTokenizer, script: AnyToAnyArguments, output: Path) -> CodeDataset:
    """Codes and captions; encoded first where there are none."""
    folder = Path(script.codes or output / "codes")
    if accelerator.is_main_process and not script.codes and not (folder / MANIFEST).exists():
        media = load_media(vq, script.dataset, num_samples=script.num_samples, caption_column=script.caption_column)
        check_values("text", [media[0].get("text")])
        encode_dataset(vq, media, folder)
    accelerator.wait_for_everyone()
    codes = CodeDataset(folder)
    check_fingerprint(vq.fingerprint, codes.fingerprint, f"the codes in {folder}")
    check_values("text", codes.columns.get("text", []))
    return codes


def _model(
    vq: VQTokenizer, codes: CodeDataset, train: list[int], script: AnyToAnyArguments
) -> tuple[nn.Module, MultimodalProcessor]:
    """The language model, which knows the codes, and its processor."""
    max_grid = max(n // codes.layout.stride for size in codes.sizes.tolist() for n in codes.layout.padded(size))
    if script.init_from:
        model = AutoModelForCausalLM.from_pretrained(script.init_from, trust_remote_code=False, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(script.init_from, trust_remote_code=False)
    else:
        tokenizer = _text_tokenizer([codes.columns["text"][i] for i in train])
        width = script.hidden_size
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_embd=width, n_layer=script.num_hidden_layers, n_head=max(1, width // 32), n_positions=512,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, initializer_range=width**-0.5,
                activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's own, in one pass
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    processor = extend(tokenizer, model, {"image": vq}, init=script.init, max_grid=max_grid)
    if script.lora_rank:
        _add_adapters(model, script.lora_rank, processor.vocabulary.text_size)
    if not torch.accelerator.is_available():
        model.set_attn_implementation("eager")  # on a CPU in bf16 the fused attention spends more time going backward
    return model, processor


def _text_tokenizer(captions: list[str]) -> PreTrainedTokenizerBase:
    tokenizer = train_text_tokenizer(captions)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"})
    return tokenizer


def _add_adapters(model: Any, rank: int, text_rows: int) -> None:
    """Adapters on every projection; beside them only the rows of the codes learn."""
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.requires_grad_(True)
    freeze_old_rows(model, text_rows)


@torch.no_grad()
def draw(
    model: Any,
    processor: MultimodalProcessor,
    captions: Sequence[str],
    length: int,
    guidance_scale: float,
    temperature: float,
    seed: int = 0,
) -> list[Any]:
    """The pictures of captions, by plain `generate`; prompts have `length` tokens."""
    torch.manual_seed(seed)
    stop = processor.tokenizer.eos_token_id
    grid = GridLogitsProcessor(processor.vocabulary, "image", eos_token_id=stop)
    pictures = []
    for start in range(0, len(captions), 64):
        prompts = [prompt(processor, caption, length) for caption in captions[start : start + 64]]
        inputs = processor(prompts, begin="image", sizes=(SIZE, SIZE)).to(model.device)
        guided = {}
        if guidance_scale != 1:
            silent = processor([prompt(processor, "", length)] * len(prompts), begin="image", sizes=(SIZE, SIZE))
            silent = silent.to(model.device)
            guided = {"negative_prompt_ids": silent["input_ids"], "guidance_scale": guidance_scale}
        ids = model.generate(
            **inputs, **guided, do_sample=True, temperature=temperature, top_k=0, logits_processor=[grid],
            max_new_tokens=processor.vocabulary.num_tokens("image", (SIZE, SIZE)),
        )  # fmt: skip
        pictures += [row[1] for row in processor.batch_decode(ids)]  # behind the caption
    return pictures


@torch.no_grad()
def write(
    model: Any, processor: MultimodalProcessor, pictures: Sequence[Any], length: int, num_beams: int
) -> list[str]:
    """The captions of pictures, by plain `generate`: the likeliest that a search with so many beams finds."""
    text = GridLogitsProcessor(processor.vocabulary, "text")
    captions = []
    for start in range(0, len(pictures), 64):
        silent = prompt(processor, "", length)
        inputs = processor([[silent, picture] for picture in pictures[start : start + 64]]).to(model.device)
        ids = model.generate(**inputs, do_sample=False, num_beams=num_beams, max_new_tokens=48, logits_processor=[text])
        captions += [" ".join(map(str, row[1:])).strip() for row in processor.batch_decode(ids)]
    return captions


def judge(
    model: Any, processor: MultimodalProcessor, script: AnyToAnyArguments, length: int, folder: Path
) -> dict[str, Any]:
    """How right drawings and captions are, on scenes and handwriting that training never had."""
    data = CaptionedDigits("test", num_samples=script.num_judged, seed=1)
    items = [data[i] for i in range(len(data))]
    scenes, pictures = [item["scene"] for item in items], [item["image"] for item in items]
    start = time.monotonic()
    drawn = draw(model, processor, [item["text"] for item in items], length, script.guidance_scale, script.temperature)
    drawing = time.monotonic() - start
    captions = write(model, processor, pictures, length, script.num_beams)
    writing = time.monotonic() - start - drawing
    write_with(folder / "samples" / "drawn.png", lambda path: contact_sheet([drawn[:8]]).save(path, format="PNG"))
    digits = DigitJudge()
    judged, real = digits.judge(drawn, scenes), digits.judge(pictures, scenes)
    right = [_facts(caption) == sorted(scene) for caption, scene in zip(captions, scenes, strict=True)]
    glyphs = [(glyph, set(_facts(caption))) for caption, scene in zip(captions, scenes, strict=True) for glyph in scene]
    return {
        **{f"drawing_{name}": judged[f"{name}_accuracy"] for name in ("place", "colour", "digit")},
        "judge_digit_on_real": real["digit_accuracy"],
        "writing_exact": sum(right) / len(right),
        "writing_glyphs": sum(glyph in facts for glyph, facts in glyphs) / len(glyphs),
        "judged": len(items),
        "seconds_per_drawing": drawing / len(items),
        "seconds_per_caption": writing / len(items),
    }


def _facts(caption: str) -> list[Any]:
    """What a caption says, in a fixed order; nothing if it is none."""
    try:
        return sorted(parse_caption(caption))
    except ValueError:
        return []


def _report(
    path: Path, metrics: dict[str, Any], model: Any, processor: MultimodalProcessor, script: AnyToAnyArguments
) -> None:
    length = metrics["prompt_length"]
    where = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items())
    picture = path.with_suffix(".png")
    rows = [
        draw(model, processor, [words] * 4, length, script.guidance_scale, script.temperature, seed=7)
        for words in PROMPTS
    ]
    write_with(picture, lambda temporary: contact_sheet(rows, tile=64).save(temporary, format="PNG"))
    data = CaptionedDigits("test", num_samples=6, seed=2)
    described = zip(
        [data[i]["text"] for i in range(6)],
        write(model, processor, [data[i]["image"] for i in range(6)], length, script.num_beams),
        strict=True,
    )
    asked = [
        ("drawing: place", "drawing_place", 0.97),
        ("drawing: colour", "drawing_colour", 0.97),
        ("drawing: digit", "drawing_digit", 0.90),
        ("caption: all facts exact", "writing_exact", 0.90),
    ]
    lines = [
        "# One language model, both directions",
        "",
        *__doc__.splitlines()[:1],
        "",
        f"Written by `examples/train_any_to_any.py` on {date.today().isoformat()} ({where}). A "
        f"{model.config.model_type} of {metrics['parameters'] / 1e6:.2f} M parameters from "
        f"{'given' if script.init_from else 'random'} weights, "
        f"{metrics['steps']} steps in {metrics['training_minutes']:.1f} minutes, judged on "
        f"{metrics['judged']} scenes and handwriting that training never had; guidance {script.guidance_scale:g}, temperature "
        f"{script.temperature:g}; captions of real held-out pictures by a search with {script.num_beams} beams.",
        "",
        "| measured | asked | reached |",
        "| --- | --- | --- |",
        *(f"| {words} | {goal:.0%} | {metrics[name]:.1%} |" for words, name, goal in asked),
        f"| caption: single digits with colour and place | | {metrics['writing_glyphs']:.1%} |",
        f"| judge on the real pictures: digit | | {metrics['judge_digit_on_real']:.1%} |",
        f"| seconds per drawing, in 64 | | {metrics['seconds_per_drawing']:.3f} |",
        f"| seconds per caption, in 64 | | {metrics['seconds_per_caption']:.3f} |",
        "",
        f"![Drawings]({picture.name})",
        "",
        f"*Four drawings each, not selected, of: {'; '.join(PROMPTS)}.*",
        "",
        "| the picture shows | the model wrote |",
        "| --- | --- |",
        *(f"| {truth} | {said} |" for truth, said in described),
        "",
    ]
    write_text(path, "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
