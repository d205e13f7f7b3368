"""The example scripts, end to end and tiny: words and pictures in, pictures out of words, with everything saved in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from examples import encode_dataset, generate, train_prior, train_tokenizer
from vqtok import VQPipeline, VQTokenizer
from vqtok.prior import MaskedCodePriorModel, train_text_tokenizer
from vqtok.prior.data import CodeDataset
from vqtok.prior.features import TextEncoder

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--num_threads", "1", "--warmup_steps", "1", "--log_every", "2"]
TINY_TOKENIZER = [
    "--config",
    "image/vqvae2-digits",
    "--max_steps",
    "4",
    "--batch_size",
    "8",
    "--num_samples",
    "64",
    "--eval_samples",
    "16",
]
TINY_PRIOR = ["--max_steps", "4", "--batch_size", "8", "--eval_samples", "16", "--mixed_precision", "no"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, its codes, and a pipeline, made by the scripts."""
    folder = tmp_path_factory.mktemp("made")
    train_tokenizer.main([*TINY_TOKENIZER, *QUICK, "--output_dir", str(folder / "tokenizer")])
    encode = ["--tokenizer", str(folder / "tokenizer"), "--num_samples", "120", "--output_dir", str(folder / "codes")]
    encode_dataset.main(encode)
    AcceleratorState._reset_state(reset_partial_state=True)
    prior = ["--config", "prior/digits", "--tokenizer", str(folder / "tokenizer"), "--codes", str(folder / "codes")]
    train_prior.main([*prior, *TINY_PRIOR, *QUICK, "--output_dir", str(folder / "pipeline")])
    return folder


def test_the_tokenizer_folder_holds_what_the_design_names(made):
    names = {path.name for path in (made / "tokenizer").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "metrics.json",
        "training.json",
        "README.md",
    } <= names
    tokenizer = VQTokenizer.from_pretrained(made / "tokenizer")
    tokenizer.verify()
    picture = Image.new("RGB", (37, 45), "red")
    assert tokenizer.reconstruct([picture])[0].size == (37, 45)
    assert "fingerprint" in (made / "tokenizer" / "README.md").read_text()


def test_no_path_of_this_machine_is_in_what_would_be_published(made):
    looked = 0
    for path in [*(made / "tokenizer").glob("*.*"), *(made / "pipeline").rglob("*.*")]:
        if path.suffix in (".json", ".md") and "checkpoints" not in path.parts:
            looked += 1
            assert str(made) not in path.read_text(), path
    assert looked >= 8


def test_the_code_cache_is_tied_to_the_tokenizer(made):
    codes = CodeDataset(made / "codes")
    tokenizer = VQTokenizer.from_pretrained(made / "tokenizer")
    assert (len(codes), codes.fingerprint, codes.layout) == (120, tokenizer.fingerprint, tokenizer.layout)
    assert codes[3]["text"]
    with pytest.raises(FileExistsError, match="holds a code cache already"):
        encode_dataset.main(
            ["--tokenizer", str(made / "tokenizer"), "--output_dir", str(made / "codes"), "--num_samples", "3"]
        )


def test_the_pipeline_draws_the_same_pictures_again(made):
    words = {"prompts": ["a red three top left"], "num_samples": 2, "seed": 5, "sizes": (32, 32)}
    pictures = [VQPipeline.from_pretrained(made / "pipeline")(**words) for _ in range(2)]
    assert [p.tobytes() for p in pictures[0]] == [p.tobytes() for p in pictures[1]]
    assert pictures[0][0].tobytes() != pictures[0][1].tobytes()
    assert pictures[0][0].size == (32, 32)


def test_a_cascade_is_trained_stage_by_stage(made, tmp_path):
    flags = ["--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes"), *TINY_PRIOR, *QUICK]
    bottom = ["--config", "prior/digits-bottom", *flags, "--output_dir", str(tmp_path / "both")]
    with pytest.raises(ValueError, match="with --coarse"):
        train_prior.main(bottom)
    train_prior.main(["--config", "prior/digits-top", *flags, "--output_dir", str(tmp_path / "top")])
    top = VQPipeline.from_pretrained(tmp_path / "top")
    words = {"prompts": ["a red three top left"], "num_samples": 2, "seed": 5, "sizes": (32, 32)}
    assert [picture.size for picture in top(**words)] == [(32, 32)] * 2, "the coarse level alone decodes too"
    AcceleratorState._reset_state(reset_partial_state=True)
    metrics = train_prior.main([*bottom, "--coarse", str(tmp_path / "top")])
    assert len(metrics["nats_per_code"]) == 2
    pictures = [VQPipeline.from_pretrained(tmp_path / "both")(**words) for _ in range(2)]
    assert [p.tobytes() for p in pictures[0]] == [p.tobytes() for p in pictures[1]]
    assert len(VQPipeline.from_pretrained(tmp_path / "both").prior.stages) == 2
    with pytest.raises(ValueError, match="leave --coarse away"):
        train_prior.main(
            ["--config", "prior/digits", *flags, "--coarse", str(tmp_path / "top"), "--output_dir", str(tmp_path / "x")]
        )


def test_a_finished_prior_started_again_changes_nothing(made):
    before = load_file(made / "pipeline" / "model.safetensors")
    prior = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes")]
    train_prior.main([*prior, *TINY_PRIOR, *QUICK, "--output_dir", str(made / "pipeline")])
    after = load_file(made / "pipeline" / "model.safetensors")
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_masked_prior_trains_by_its_recipe(made, tmp_path):
    prior = ["--config", "prior/digits-masked", "--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes")]
    metrics = train_prior.main([*prior, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "masked")])
    assert all(
        0 < nats < 1.5 * limit
        for nats, limit in zip(metrics["nats_per_code"], metrics["ln_codebook_size"], strict=True)
    )
    pipeline = VQPipeline.from_pretrained(tmp_path / "masked")
    recipe = json.loads((ROOT / "tokenizers_configs/prior/digits-masked/generation_config.json").read_text())
    assert type(pipeline.prior) is MaskedCodePriorModel
    assert {name: getattr(pipeline.prior.generation_config, name) for name in recipe} == recipe
    assert pipeline(["a red three top left"], seed=0, sizes=(32, 32))[0].size == (32, 32)


def test_generate_writes_pictures(made, tmp_path):
    words = ["--pipeline", str(made / "pipeline"), "--prompts", "a red three top left", "a blue seven bottom right"]
    written = generate.main([*words, "--num_samples", "2", "--output_dir", str(tmp_path / "out")])
    assert len(written) == 5 and all(min(Image.open(path).size) >= 8 for path in written)


def test_a_prior_refuses_codes_of_another_tokenizer(made, tmp_path):
    train_tokenizer.main([*TINY_TOKENIZER, *QUICK, "--seed", "1", "--output_dir", str(tmp_path / "other")])
    AcceleratorState._reset_state(reset_partial_state=True)
    mine, other = (
        VQTokenizer.from_pretrained(folder).fingerprint for folder in (made / "tokenizer", tmp_path / "other")
    )
    flags = ["--config", "prior/digits", "--tokenizer", str(tmp_path / "other"), "--codes", str(made / "codes")]
    with pytest.raises(ValueError, match=f"(?s){mine}.*{other}|{other}.*{mine}"):
        train_prior.main([*flags, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "pipeline")])
    assert not (tmp_path / "pipeline" / "config.json").exists()


def test_a_class_conditional_prior_from_folders_of_classes(made, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(30):
            Image.effect_noise((32, 32), 40).convert("RGB").save(tmp_path / "pets" / name / f"{i}.png")
    recipe = json.loads((ROOT / "tokenizers_configs/prior/digits/config.json").read_text())
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "config.json").write_text(json.dumps({**recipe, "condition": "class"}))
    flags = [
        "--config",
        str(tmp_path / "recipe"),
        "--tokenizer",
        str(made / "tokenizer"),
        "--dataset",
        str(tmp_path / "pets"),
    ]
    train_prior.main([*flags, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "out")])
    assert len(VQPipeline.from_pretrained(tmp_path / "out")([0, 1], seed=0, sizes=(32, 32))) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    flags[-1] = "digits"
    with pytest.raises(ValueError, match="holds the codes of .*pets"):
        train_prior.main([*flags, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "out")])


def test_missing_captions_are_said_before_anything_is_encoded(made, tmp_path):
    (tmp_path / "plain").mkdir()
    for i in range(30):
        Image.effect_noise((32, 32), 40).convert("RGB").save(tmp_path / "plain" / f"{i}.png")
    flags = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--dataset", str(tmp_path / "plain")]
    with pytest.raises(ValueError, match="needs a text for every sample.*--caption_column"):
        train_prior.main([*flags, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_picture_smaller_than_the_stride_is_named(made, tmp_path):
    (tmp_path / "mixed").mkdir()
    for i in range(300):  # more than one batch
        Image.new("RGB", (4, 9) if i == 290 else (9, 9)).save(tmp_path / "mixed" / f"{i:03}.png")
    flags = ["--tokenizer", str(made / "tokenizer"), "--dataset", str(tmp_path / "mixed"), "--split", "all"]
    with pytest.raises(ValueError, match="290.png: .*4x9 pixels, a side smaller than the stride of 8"):
        encode_dataset.main([*flags, "--output_dir", str(tmp_path / "codes")])


def test_pictures_too_large_for_the_backbone_are_refused_before_training(made, tmp_path):
    (tmp_path / "large").mkdir()
    for i in range(60):
        Image.effect_noise((64, 64), 40).convert("RGB").save(tmp_path / "large" / f"{i}.png")
    (tmp_path / "large" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{i}.png,noise\n" for i in range(60))
    )
    flags = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--dataset", str(tmp_path / "large")]
    with pytest.raises(
        ValueError,
        match=r"size \(64, 64\) is longer than the backbone's max_position_embeddings 256: use smaller media",
    ):
        train_prior.main([*flags, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "out")])


def test_fine_tuning_the_decoder_alone_keeps_the_codes(made, tmp_path):
    flags = [
        "--tokenizer",
        str(made / "tokenizer"),
        "--decoder_only",
        "--max_steps",
        "3",
        "--batch_size",
        "8",
        "--num_samples",
        "64",
    ]
    train_tokenizer.main([*flags, *QUICK, "--eval_samples", "16", "--output_dir", str(tmp_path)])
    before, after = load_file(made / "tokenizer" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not bool((before[name] == after[name]).all())}
    assert changed == {"decoder"}
    assert (
        VQTokenizer.from_pretrained(tmp_path).fingerprint == VQTokenizer.from_pretrained(made / "tokenizer").fingerprint
    )


def test_training_on_a_folder_of_photographs_skips_what_cannot_be_read(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.effect_noise((50 + 3 * i, 60), 80).convert("RGB").save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    flags = [
        "--config",
        "image/vqvae2-photos",
        "--dataset",
        str(folder),
        "--holdout",
        "1",
        "--image_size",
        "32",
        "--max_steps",
        "2",
    ]
    metrics = train_tokenizer.main([*flags, *QUICK, "--batch_size", "4", "--output_dir", str(tmp_path / "out")])
    assert metrics["data"]["num_images"] == 1
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either --config"),
        (["--config", "image/vqvae2-digits", "--tokenizer", "x"], "give either --config"),
        (["--config", "image/vqvae2-digits", "--decoder_only"], "--decoder_only needs --tokenizer"),
        (["--config", "image/vqvae2-digit"], "vqvae2-digits"),
        (["--config", "image/vqvae2-digits", "--dataset", "no/such/folder"], "no/such/folder"),
        (["--config", "image/vqvae2-digits", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["--tokenizer", "no/such/tokenizer"], "no/such/tokenizer"),
    ],
)
def test_bad_flags_are_one_sentence_and_write_nothing(flags, words, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        train_tokenizer.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_tokenizer", "train_prior", "train_prior masked"])
def test_kill_minus_nine_and_the_same_command_again_ends_with_equal_weights(script, made, tmp_path):
    """In real processes: one that is never stopped, and one killed while it trains."""
    prior = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes")]
    flags = TINY_TOKENIZER if script == "train_tokenizer" else [*prior, *TINY_PRIOR]
    if script.endswith(" masked"):
        script, flags[1] = "train_prior", "prior/digits-masked"

    def command(folder):
        steps = ["--max_steps", "40", "--save_every", "5"]
        start = [sys.executable, str(ROOT / f"examples/{script}.py"), *flags]
        return [*start, *QUICK, *steps, "--output_dir", str(folder)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "cut"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "cut" / "checkpoints" / "step-10").exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "model.safetensors").exists(), "the run was over before it could be killed"
    subprocess.run(command(tmp_path / "cut"), check=True, capture_output=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(bool((whole[name] == cut[name]).all()) for name in whole)


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_pixels(made, tmp_path):
    words = [
        "--pipeline",
        str(made / "pipeline"),
        "--prompts",
        "a red three top left",
        "--num_samples",
        "2",
        "--seed",
        "3",
    ]
    here = generate.main([*words, "--output_dir", str(tmp_path / "here")])
    script = [sys.executable, str(ROOT / "examples/generate.py"), *words, "--output_dir", str(tmp_path / "there")]
    subprocess.run(script, check=True, capture_output=True)
    for path in here:
        assert Image.open(path).tobytes() == Image.open(tmp_path / "there" / path.name).tobytes()


@pytest.mark.slow
def test_accelerate_launches_the_prior_on_two_processes(made, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    flags = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes")]
    script = [str(ROOT / "examples/train_prior.py"), *flags, *TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run([*launch, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        [record["loss"] for record in json.loads((folder / "training.json").read_text())["history"] if "loss" in record]
        for folder in (tmp_path / "two", made / "pipeline")
    ]
    assert len(losses[0]) == len(losses[1]) == 2
    pipeline = VQPipeline.from_pretrained(tmp_path / "two")
    assert pipeline(["a red three top left"], seed=0, sizes=(32, 32))[0].size == (32, 32)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """A folder with a tiny T5 encoder and its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    TextEncoder(T5EncoderModel(config), train_text_tokenizer(["a red three top left"], 300)).save_pretrained(folder)
    return folder


def test_a_prior_reads_a_frozen_text_encoder_that_training_never_runs(
    made, text_encoder, tmp_path, capsys, monkeypatch
):
    runs, encode = [], TextEncoder.encode

    def counted(self, rows, batch_size=64):
        runs.append(len(rows))
        return encode(self, rows, batch_size)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    flags = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes")]
    flags += [*TINY_PRIOR, *QUICK, "--text_encoder", str(text_encoder), "--output_dir", str(tmp_path / "out")]
    train_prior.main(flags)
    captions = set(CodeDataset(made / "codes").columns["text"])
    assert f"{len(captions)} captions encoded, 0 were in" in capsys.readouterr().err
    held_out = 3  # of 120 samples: at the end their samples are drawn
    assert runs == [len(captions), held_out]
    pipeline = VQPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.prior.config.condition == "features" and pipeline.prior.config.feature_size == 16
    assert "text-to-image" in (tmp_path / "out/README.md").read_text()
    assert len(pipeline(["a red three top left", None], seed=0, sizes=(32, 32))) == 2


def test_a_prior_of_codes_given_other_codes(made, tmp_path):
    train_tokenizer.main([*TINY_TOKENIZER, *QUICK, "--seed", "1", "--output_dir", str(tmp_path / "other")])
    AcceleratorState._reset_state(reset_partial_state=True)
    encode = ["--tokenizer", str(tmp_path / "other"), "--num_samples", "120", "--output_dir", str(tmp_path / "codes")]
    encode_dataset.main(encode)
    flags = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--codes", str(made / "codes")]
    flags += [*TINY_PRIOR, *QUICK, "--output_dir", str(tmp_path / "out")]
    recipe = json.loads((ROOT / "tokenizers_configs/prior/digits/config.json").read_text())
    recipe["backbone_config"]["max_position_embeddings"] = 512
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/config.json").write_text(json.dumps(recipe))
    flags[1] = str(tmp_path / "recipe")
    train_prior.main([*flags, "--condition_codes", str(tmp_path / "codes")])
    pipeline = VQPipeline.from_pretrained(tmp_path / "out")
    other = VQTokenizer.from_pretrained(tmp_path / "other")
    assert pipeline.prior.config.condition_fingerprint == other.fingerprint
    given = other.encode([Image.new("RGB", (32, 32), "red"), Image.new("RGB", (24, 32))])
    assert [p.size for p in pipeline(given, seed=0, sizes=(32, 32))] == [(32, 32)] * 2
    with pytest.raises(ValueError, match="layout|code space"):
        pipeline(pipeline.vq_tokenizer.encode([Image.new("RGB", (32, 32))]), seed=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    encode[3] = "119"
    encode_dataset.main([*encode[:-1], str(tmp_path / "fewer")])
    with pytest.raises(ValueError, match="120 samples and 119 conditions"):
        train_prior.main([*flags, "--condition_codes", str(tmp_path / "fewer")])


def test_flags_of_conditions_that_do_not_go_together(made, text_encoder, tmp_path):
    flags = ["--config", "prior/digits", "--tokenizer", str(made / "tokenizer"), "--output_dir", str(tmp_path / "out")]
    codes, encoder = ["--codes", str(made / "codes")], ["--text_encoder", str(text_encoder)]
    for more, message in [
        ([*codes, *encoder, "--condition_codes", str(made / "codes")], "two conditions"),
        (["--condition_codes", str(made / "codes")], "needs --codes"),
        ([*codes, "--eval_condition_codes", str(made / "codes")], "goes with --eval_codes"),
        ([*codes, *encoder, "--max_text_length", "3"], "this prior takes at most 3"),
        ([*codes, "--text_encoder", str(made / "tokenizer")], "cannot be loaded as a text encoder|no text encoder"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            train_prior.main([*flags, *TINY_PRIOR, *QUICK, *more])
        AcceleratorState._reset_state(reset_partial_state=True)
    for kind, flag in (("features", "--text_encoder"), ("codes", "--condition_codes")):
        recipe = json.loads((ROOT / "tokenizers_configs/prior/digits/config.json").read_text())
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({**recipe, "condition": kind}))
        with pytest.raises(ValueError, match=f"has the condition '{kind}': .*{flag}"):
            train_prior.main(["--config", str(tmp_path / kind), *flags[2:], *codes])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "out" / "config.json").exists()
