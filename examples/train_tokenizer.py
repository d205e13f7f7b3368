"""Train a tokenizer of pictures, of sound or of text, from scratch or from an existing one, on a folder, a data set or embedded data.

    accelerate launch examples/train_tokenizer.py --config image/vqvae2-digits --output_dir out/vq
    accelerate launch examples/train_tokenizer.py --config image/vqvae2-photos --dataset photos/ --output_dir out/photos
    accelerate launch examples/train_tokenizer.py --config audio/speech-16khz --dataset speech/ --output_dir out/speech
    accelerate launch examples/train_tokenizer.py --config text/bytes-4 --output_dir out/text
    accelerate launch examples/train_tokenizer.py --tokenizer out/photos --decoder_only --dataset mine/ --output_dir out/mine

A recipe with a discriminator_config.json trains against discriminators, and so does a tokenizer that was published with its own.
Stopped anywhere, the same command continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from vqtok import VQTokenizer
from vqtok.audio.crops import AudioCropDataset
from vqtok.audio.discriminators import (
    AudioDiscriminator,
    load_discriminator,
    read_discriminator_config,
    save_discriminator,
)
from vqtok.audio.files import write_file
from vqtok.audio.losses import spectral_losses
from vqtok.auto import config_folder
from vqtok.encoding import load_media
from vqtok.evaluation import audio_report, report, text_report
from vqtok.evaluation.pictures import contact_sheet
from vqtok.files import write_json, write_text, write_with
from vqtok.hub.card import tokenizer_card
from vqtok.hub.folders import fetch_folder
from vqtok.image.data import CropDataset
from vqtok.sources.dataset import skipped_summary
from vqtok.text.data import TextCropDataset
from vqtok.training import (
    AdversarialArguments,
    AdversarialStep,
    StepSampler,
    TokenizerStep,
    TrainingArguments,
    fit,
    parse_arguments,
    read_recipe,
    step_loader,
)
from vqtok.training.setup import finish, make_accelerator, model_fields, run_script, save_training


@dataclass
class TokenizerArguments(AdversarialArguments):
    """What to train, and on what."""

    config: str | None = field(
        default=None, metadata={"help": "A recipe (image/vqvae2-digits) or a folder with config.json."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "A trained tokenizer to continue from, instead of --config."}
    )
    decoder_only: bool = field(
        default=False,
        metadata={
            "help": "Train the decoder alone: with --tokenizer codes stay valid; in a recipe, as they are after the start from data."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "digits, spoken-numbers or python-prose (embedded, the defaults), a folder, a text file, or a data set of `datasets`."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of pictures, if there are several."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of recordings, if there are several."})
    text_column: str | None = field(default=None, metadata={"help": "Column of texts; None takes 'text'."})
    holdout: list[str] = field(default_factory=list, metadata={"help": "Files of a folder kept for the test, by name."})
    image_size: int = field(default=0, metadata={"help": "Side of random crops; 0 takes whole pictures of one size."})
    seconds: float = field(default=1.0, metadata={"help": "About how long the random crops of sound are."})
    text_units: int = field(
        default=256, metadata={"help": "About how many bytes or tokens the random crops of text have."}
    )
    resample: bool = field(default=False, metadata={"help": "Bring sound of other rates to the tokenizer's."})
    num_samples: int | None = field(
        default=None, metadata={"help": "How many pictures or clips at most (digits: how many scenes)."}
    )
    eval_samples: int = field(default=256, metadata={"help": "Pictures or clips of the final evaluation."})
    eval_speech: bool = field(
        default=False, metadata={"help": "Also measure PESQ and STOI at the end, as far as they are installed."}
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate on the test split and save; returns the metrics that metrics.json holds."""
    script, args = _arguments(sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    tokenizer = (
        VQTokenizer.from_pretrained(script.tokenizer) if script.tokenizer else VQTokenizer.from_config(script.config)
    )
    discriminator = _discriminator(script, tokenizer)
    if script.decoder_only:
        tokenizer.model.freeze_codes()
    media = MEDIA[tokenizer.modality](tokenizer, script, args)
    options = {
        name: getattr(script, name) or None
        for name in ("image_column", "audio_column", "text_column", "holdout", "resample")
    }
    train, test = (
        load_media(tokenizer, script.dataset, split, num_samples=number, **options)
        for split, number in (("train", script.num_samples), ("test", script.eval_samples))
    )
    accelerator.print(f"{len(train)} {media.plural} to train on, {len(test)} to test", file=sys.stderr)
    items = media.training_items(train)

    def loader(start: int) -> Any:
        sampler = StepSampler(
            [np.arange(len(items))], args.batch_size, args.max_steps, args.seed, start, accelerator.process_index,
            accelerator.num_processes, args.gradient_accumulation_steps,
        )  # fmt: skip
        return step_loader(items, media.collate, sampler, args.num_workers)

    # Whole items, or one crop of each, so that an evaluation between steps stays quick.
    held_out = media.held_out(test)

    def evaluate(step: int) -> dict[str, float]:
        model = tokenizer.model
        output = model.decode(model.encode(held_out.to(model.device)).codes).reconstruction.float().cpu()
        if step < args.max_steps:
            media.save_samples(held_out[:8], output[:8], Path(args.output_dir) / "samples" / f"step-{step}")
        return media.measure(output, held_out)

    parts = (accelerator, tokenizer.model, args, len(train))
    step = AdversarialStep(*parts, discriminator, script) if discriminator is not None else TokenizerStep(*parts)
    same_run = {**asdict(script), "model": model_fields(tokenizer.model.config), "num_train": len(train)}
    if discriminator is not None:
        same_run["discriminator"] = model_fields(discriminator.config)
    history = fit(accelerator, step, loader, args, evaluate=evaluate, extra_arguments=same_run)
    metrics: dict[str, Any] = {}
    if accelerator.is_main_process:
        metrics = _publish(tokenizer, media, test, script, args, history, step.seconds)
        if discriminator is not None:
            folder = Path(args.output_dir) / "training"
            save_discriminator(discriminator, folder)
            write_with(folder / "raw.safetensors", lambda path: save_file(step.raw, path, metadata={"format": "pt"}))
        for part in (train, test):
            if summary := skipped_summary(part):
                print(summary, file=sys.stderr)
    finish(accelerator)
    return metrics


def _arguments(argv: Sequence[str]) -> tuple[TokenizerArguments, TrainingArguments]:
    classes = (TokenizerArguments, TrainingArguments)
    chosen = parse_arguments(classes, argv, {"output_dir": ""}, description=__doc__)[0]
    if bool(chosen.config) == bool(chosen.tokenizer):
        raise ValueError(
            "give either --config (a recipe, to train from scratch) or --tokenizer (to continue from a trained one)"
        )
    if chosen.decoder_only and not chosen.tokenizer:
        raise ValueError("--decoder_only needs --tokenizer: there are no codes to keep without a trained tokenizer")
    recipe = read_recipe(config_folder(chosen.config)) if chosen.config else {}
    return parse_arguments(classes, argv, recipe, description=__doc__)


def _discriminator(script: TokenizerArguments, tokenizer: VQTokenizer) -> AudioDiscriminator | None:
    """The discriminators of the recipe, or those that were published with the tokenizer, which then goes on from its raw weights."""
    if script.config:
        path = config_folder(script.config) / "discriminator_config.json"
        return AudioDiscriminator(read_discriminator_config(path)) if path.is_file() else None
    folder = fetch_folder(script.tokenizer, ["training/*"])[0] / "training"
    if not (folder / "discriminator_config.json").is_file():
        return None
    if not script.decoder_only:  # of the published weights the codes are those that the decoder has to keep
        tokenizer.model.load_state_dict(load_file(folder / "raw.safetensors"))
    return load_discriminator(folder)


def _publish(
    tokenizer: VQTokenizer,
    media: Pictures | Sounds | Texts,
    test: Any,
    script: TokenizerArguments,
    args: TrainingArguments,
    history: list[dict[str, float]],
    seconds: float,
) -> dict[str, Any]:
    folder = Path(args.output_dir)
    tokenizer.save_pretrained(folder)
    save_training(folder, {**asdict(script), **asdict(args)}, history, seconds)
    metrics = media.metrics(test, folder.resolve().name)
    write_json(folder / "metrics.json", metrics)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    write_text(folder / "README.md", tokenizer_card(metrics["name"], metrics, training, tokenizer.modality))
    media.save_reconstructions(test, folder / "samples" / "reconstructions")
    print(tokenizer)
    # Of sound there is a number per codebook of each level, of pictures one per level.
    shares = " ".join(f"{np.mean(used):.1%}" for used in metrics["usage"])
    perplexities = " ".join(f"{np.mean(value):.1f}" for value in metrics["perplexity"])
    print(f"{media.summary(metrics)}, usage {shares}, perplexity {perplexities}")
    print(f"wrote {folder}: from vqtok import VQTokenizer; VQTokenizer.from_pretrained({str(folder)!r})")
    return metrics


class Pictures:
    """What a run does differently for pictures."""

    plural = "pictures"

    def __init__(self, tokenizer: VQTokenizer, script: TokenizerArguments, args: TrainingArguments):
        self.tokenizer, self.processor, self.script, self.seed = tokenizer, tokenizer.processor, script, args.seed

    def training_items(self, train: Any) -> Any:
        size = self.script.image_size
        return CropDataset(train, size, seed=self.seed, shuffle=False) if size else train

    def collate(self, items: list[dict[str, Any]]) -> torch.Tensor:
        pixels = [self.processor.prepare(item["image"])[0] for item in items]
        sizes = {tuple(p.shape[1:]) for p in pixels}
        if len(sizes) > 1:
            raise ValueError(
                f"pictures of several sizes in a batch ({sorted(sizes)[:3]}): set --image_size to train on crops"
            )
        return torch.stack(pixels)

    def held_out(self, test: Any) -> torch.Tensor:
        items = [test[i] for i in range(min(64, len(test)))]
        if self.script.image_size:
            items = [CropDataset([item], self.script.image_size)[0] for item in items]
        return self.collate(items)

    def measure(self, output: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
        mse = ((output.clamp(-1, 1) - held_out) / 2).square().flatten(1).mean(1).clamp_min(1e-10)
        return {"loss": float(mse.mean()), "psnr_db": float((-10 * mse.log10()).mean())}

    def save_samples(self, held_out: torch.Tensor, output: torch.Tensor, path: Path) -> None:
        rows = [self.processor.postprocess(pixels, [pixels.shape[2:]] * len(pixels)) for pixels in (held_out, output)]
        self._save_sheet(rows, path)

    def save_reconstructions(self, test: Any, path: Path) -> None:
        originals = [test[i]["image"] for i in range(min(8, len(test)))]
        self._save_sheet([originals, self.tokenizer.reconstruct(originals)], path)

    def metrics(self, test: Any, name: str) -> dict[str, Any]:
        return report.evaluate(self.tokenizer, test, name=name)

    def summary(self, metrics: dict[str, Any]) -> str:
        return f"PSNR {metrics['psnr_db']:.2f} dB"

    def _save_sheet(self, rows: list[list[Any]], path: Path) -> None:
        write_with(path.with_suffix(".png"), lambda temporary: contact_sheet(rows).save(temporary, format="PNG"))


class Sounds:
    """What a run does differently for sound."""

    plural = "clips"

    def __init__(self, tokenizer: VQTokenizer, script: TokenizerArguments, args: TrainingArguments):
        self.tokenizer, self.processor, self.script, self.seed = tokenizer, tokenizer.processor, script, args.seed
        stride = self.processor.stride
        self.num_samples = max(1, round(script.seconds * self.processor.sampling_rate / stride)) * stride

    def training_items(self, train: Any) -> Any:
        return AudioCropDataset(train, self.num_samples, seed=self.seed)

    def collate(self, items: list[dict[str, Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([item["audio"] for item in items]))

    def held_out(self, test: Any) -> torch.Tensor:
        items = [test[i] for i in range(min(32, len(test)))]
        return self.collate([AudioCropDataset([item], self.num_samples, gain_db=0)[0] for item in items])

    def measure(self, output: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
        windows = self.tokenizer.model.config.loss_windows
        mel = spectral_losses(output, held_out, self.processor.sampling_rate, windows, ["mel"])["mel_loss"]
        si_sdr = scale_invariant_signal_distortion_ratio(output.flatten(1), held_out.flatten(1)).mean()
        return {"loss": float(mel), "si_sdr_db": float(si_sdr)}

    def save_samples(self, held_out: torch.Tensor, output: torch.Tensor, path: Path) -> None:
        pairs = torch.stack([held_out, output], 1).flatten(0, 1)  # each original before its reconstruction
        self._save(list(pairs), path)

    def save_reconstructions(self, test: Any, path: Path) -> None:
        items = [test[i] for i in range(min(8, len(test)))]
        made = self.tokenizer.reconstruct(items)
        originals = [torch.from_numpy(item["audio"]) for item in items]
        pairs = zip(originals, (torch.from_numpy(np.atleast_2d(each)) for each in made), strict=True)
        self._save([each for pair in pairs for each in pair], path)

    def metrics(self, test: Any, name: str) -> dict[str, Any]:
        return audio_report.evaluate(self.tokenizer, test, name=name, speech=self.script.eval_speech)

    def summary(self, metrics: dict[str, Any]) -> str:
        figures = {"mel distance": "mel_distance", "SI-SDR dB": "si_sdr_db", "PESQ-WB": "pesq_wb", "STOI": "stoi"}
        known = [f"{label} {metrics[key]:.3f}" for label, key in figures.items() if metrics[key] is not None]
        return ", ".join([*known, *(f"no {key}: {why}" for key, why in metrics["not_measured"].items())])

    def _save(self, clips: list[torch.Tensor], path: Path) -> None:
        pause = torch.zeros(clips[0].shape[0], self.processor.sampling_rate // 4)
        sound = torch.cat([part for clip in clips for part in (clip, pause)], 1)
        write_file(path.with_suffix(".wav"), sound.numpy(), self.processor.sampling_rate)


class Texts:
    """What a run does differently for text."""

    plural = "texts"

    def __init__(self, tokenizer: VQTokenizer, script: TokenizerArguments, args: TrainingArguments):
        self.tokenizer, self.processor, self.seed = tokenizer, tokenizer.processor, args.seed
        stride = self.processor.stride
        self.num_units = max(1, round(script.text_units / stride)) * stride

    def training_items(self, train: Any) -> Any:
        return TextCropDataset(train, self.processor, self.num_units, seed=self.seed)

    def collate(self, items: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(items)

    def held_out(self, test: Any) -> torch.Tensor:
        crops = TextCropDataset(test, self.processor, self.num_units)
        return self.collate([crops[i] for i in range(64)])

    def measure(self, output: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
        known = held_out < self.processor.vocab_size
        loss = torch.nn.functional.cross_entropy(output[known], held_out[known])
        return {"loss": float(loss), "unit_accuracy": float((output.argmax(-1) == held_out)[known].float().mean())}

    def save_samples(self, held_out: torch.Tensor, output: torch.Tensor, path: Path) -> None:
        sizes = (held_out < self.processor.vocab_size).sum(1, keepdim=True)
        self._save(*(self.processor.postprocess(each, sizes) for each in (held_out, output)), path)

    def save_reconstructions(self, test: Any, path: Path) -> None:
        originals = [test[i]["text"] for i in range(min(8, len(test)))]
        self._save(originals, self.tokenizer.reconstruct(originals), path)

    def metrics(self, test: Any, name: str) -> dict[str, Any]:
        return text_report.evaluate(self.tokenizer, test, name=name)

    def summary(self, metrics: dict[str, Any]) -> str:
        rate = metrics["bits_per_byte"]["nominal"]
        return f"{metrics['byte_accuracy']:.2%} of bytes right at {rate:.3g} bits per byte"

    def _save(self, originals: list[str], made: list[str], path: Path) -> None:
        pairs = [
            f"--- original\n{one}\n--- from its codes\n{other}\n" for one, other in zip(originals, made, strict=True)
        ]
        write_text(path.with_suffix(".txt"), "\n".join(pairs))


MEDIA = {"image": Pictures, "audio": Sounds, "text": Texts}

if __name__ == "__main__":
    run_script(main)
