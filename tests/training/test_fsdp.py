"""FSDP2: the shipped config says what it should, fits every backbone, and two processes that share the weights train as one does.

Not tested, for want of GPUs: NCCL, offloading, and how fast it is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from examples import train_prior
from tests.prior.conftest import BACKBONES, TWO_LEVELS
from tests.tiny import make_tokenizer, picture
from tests.training.fsdp_worker import CONFIG, environment
from vqtok import CodePriorConfig, CodePriorModel, VQPipeline, VQTokenizer
from vqtok.prior import train_text_tokenizer
from vqtok.prior.attention import set_attention
from vqtok.prior.data import write_code_cache
from vqtok.training import PriorStep, TokenizerStep, TrainingArguments
from vqtok.training.sharding import is_sharded

WORKER = Path(__file__).with_name("fsdp_worker.py")
ROOT = WORKER.parents[2]


def make_prior(kind="llama"):
    backbone = {"model_type": kind, "num_hidden_layers": 3, **BACKBONES[kind]}
    return CodePriorModel(CodePriorConfig(layout=TWO_LEVELS, max_grid=4, backbone_config=backbone))


@pytest.fixture
def plugin(monkeypatch):
    """accelerate's own reading of the shipped config, as a launched process gets it."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return FullyShardedDataParallelPlugin()


def test_accelerate_reads_the_config_as_it_is_meant(plugin):
    config = load_config_from_file(str(CONFIG))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == DistributedType.FSDP and not config.use_cpu
    assert environment()["ACCELERATE_USE_FSDP"] == "true"
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_units_are_the_layers_of_the_backbone(plugin, kind):
    prior = make_prior(kind)
    plugin.set_auto_wrap_policy(prior)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, prior)
    found = [module for module in prior.modules() if wraps(module)]
    assert found == list(prior.backbone.h if kind == "gpt2" else prior.backbone.layers)
    # The head is read in slices and never called, so nothing may wrap it alone.
    assert prior.get_output_embeddings() is None


class Elsewhere:
    """What an accelerator of another kind says of itself."""

    def __init__(self, kind, is_fsdp2):
        self.distributed_type, self.is_fsdp2 = kind, is_fsdp2

    def prepare(self, *things):
        return things


def test_schemes_that_are_not_known_are_refused():
    args = TrainingArguments(output_dir="unused")
    assert not is_sharded(Elsewhere(DistributedType.MULTI_GPU, False))
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=f"not with {kind.value} as configured: for FSDP set fsdp_version to 2"):
            PriorStep(Elsewhere(kind, False), make_prior(), args)
    with pytest.raises(ValueError, match="tokenizers are trained with whole copies"):
        TokenizerStep(Elsewhere(DistributedType.FSDP, True), make_tokenizer().model, args)


def test_the_copy_that_is_measured_on_a_cpu_has_an_attention_for_it():
    prior = make_prior()
    set_attention(prior, "flex_attention", torch.device("cuda"))
    step = PriorStep(Elsewhere(DistributedType.FSDP, True), prior, TrainingArguments(output_dir="unused"))
    assert step.model is prior and step.trained is not prior
    for model, name in ((step.model, "sdpa"), (step.trained, "flex_attention")):
        assert model.config._attn_implementation == model.backbone.config._attn_implementation == name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, codes with captions, a recipe without chance, and a text model."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer().save_pretrained(folder / "vq")
    tokenizer = VQTokenizer.from_pretrained(folder / "vq")
    captions = [f"a {['red', 'blue', 'green'][i % 3]} thing" for i in range(60)]
    batch = tokenizer.encode([picture(16, 16, seed) for seed in range(60)])
    write_code_cache(folder / "codes", [(batch, [{"text": text} for text in captions])], {})
    words = train_text_tokenizer(captions, 270)
    words.save_pretrained(folder / "text")
    torch.manual_seed(0)
    text = AutoConfig.for_model("qwen3", vocab_size=len(words), num_hidden_layers=2, **BACKBONES["qwen3"])
    AutoModelForCausalLM.from_config(text).save_pretrained(folder / "text")
    backbone = {"model_type": "llama", "num_hidden_layers": 2, **BACKBONES["llama"]}
    config = {"model_type": "vqtok_prior", "condition": "text", "condition_dropout": 0.0, "backbone_config": backbone}
    (folder / "recipe").mkdir()
    (folder / "recipe" / "config.json").write_text(json.dumps(config))
    training = {"max_steps": 6, "batch_size": 8, "gradient_accumulation_steps": 2, "save_every": 2, "log_every": 2,
                "eval_every": 3, "warmup_steps": 1, "num_threads": 1, "eval_samples": 2, "average_decay": 0.5,
                "learning_rate": 1e-2, "weight_decay": 0.1}  # fmt: skip
    (folder / "recipe" / "training.json").write_text(json.dumps(training))
    return folder


def flags(made, output, extra):
    folders = {"--config": "recipe", "--tokenizer": "vq", "--codes": "codes"}
    given = [word for flag, name in folders.items() for word in (flag, str(made / name))]
    return [*given, *(str(made / "text") if word == "TEXT" else word for word in extra), "--output_dir", str(output)]


def on_two(made, output, extra, crash_at=0, port=29517):
    """Run the worker on two processes; returns what it said on its standard error."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environ = {**os.environ, "CRASH_AT": str(crash_at), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, str(WORKER), *flags(made, output, extra)], capture_output=True, text=True, env=environ, timeout=300
    )
    assert (done.returncode == 0) == (not crash_at), done.stderr[-4000:]
    return done.stderr


def weights(folder):
    """What is published, and the averages of the last checkpoint, which may measure worse and stay there."""
    averaged = folder / "checkpoints" / "step-6" / "averaged.safetensors"
    averages = load_file(averaged) if averaged.exists() else {}
    return load_file(folder / "model.safetensors") | {f"average of {name}": value for name, value in averages.items()}


def history(folder):
    return json.loads((folder / "training.json").read_text())["history"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--init_from", "TEXT", "--lora_rank", "2"],
        ["--init_from", "TEXT", "--gradient_checkpointing", "true", "--average_decay", "0"],
    ],
    ids=["plain", "lora", "checkpointing"],
)
def test_two_processes_with_shared_weights_end_where_one_ends(made, tmp_path, extra):
    """Also with accumulation, clipping, weight decay, evaluations, averaging, a crash and a second start."""
    train_prior.main(flags(made, tmp_path / "one", extra))
    AcceleratorState._reset_state(reset_partial_state=True)
    on_two(made, tmp_path / "two", extra)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    plain = CodePriorModel(CodePriorConfig.from_pretrained(tmp_path / "one")).state_dict()
    assert one.keys() == two.keys() and plain.keys() <= one.keys()
    assert ("--average_decay" in extra) == (one.keys() == plain.keys())
    for name, value in one.items():
        # Sums in another order, which Adam's division makes visible where a gradient is nearly zero.
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    evaluations = [
        [value for record in history(tmp_path / name) for key, value in record.items() if "eval" in key]
        for name in ("one", "two")
    ]
    assert len(evaluations[0]) >= 4 and evaluations[0] == pytest.approx(evaluations[1], rel=1e-3)

    assert "crash" in on_two(made, tmp_path / "cut", extra, crash_at=4)
    kept = tmp_path / "cut" / "checkpoints" / "step-2"
    assert any(kept.glob("pytorch_model_fsdp_0/*.distcp")), sorted(kept.iterdir())
    assert "continuing" in on_two(made, tmp_path / "cut", extra)
    again = weights(tmp_path / "cut")
    assert all(torch.equal(again[name], value) for name, value in two.items())
    assert VQPipeline.from_pretrained(tmp_path / "cut")(["a red thing"], seed=0, sizes=(16, 16))[0].size == (16, 16)


@pytest.mark.slow
def test_bf16_on_two_processes_with_shared_weights(made, tmp_path):
    losses = []
    for name, extra in (("full", []), ("half", ["--mixed_precision", "bf16"])):
        on_two(made, tmp_path / name, extra)
        losses.append([record["loss"] for record in history(tmp_path / name) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float32}
