"""The command line: what is written, what is refused in one line, and that nothing is lost."""

import json
import shutil
import subprocess
import sys
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vqtok
from tests.tiny import make_tokenizer, picture
from vqtok import cli
from vqtok.auto import VQTokenizer
from vqtok.codes import Codes
from vqtok.prior import PRIORS


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    """Folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("tok")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys):
    """Runs a command; returns its status, standard output and standard error."""

    def run(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def refuse(run, tmp_path):
    """Runs a command that must fail with one line, and change no file; returns the line."""

    def state():
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def refuse(*arguments):
        before = state()
        status, out, err = run(*arguments)
        assert status == 2 and out == ""
        assert err.startswith("vqtok: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err
        assert state() == before
        return err

    return refuse


def test_there_and_back(run, tok, tmp_path):
    image = picture(30, 21)
    image.save(tmp_path / "cat.png")
    status, out, _ = run("encode", tmp_path / "cat.png", tmp_path / "cat.vq", "--tokenizer", tok)
    assert status == 0 and "1 sample, 60 codes" in out
    expected = VQTokenizer.from_pretrained(tok)
    codes = Codes.load(tmp_path / "cat.vq")
    assert codes.fingerprint == expected.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(codes.levels, expected.encode(image).levels, strict=True))
    assert run("decode", tmp_path / "cat.vq", tmp_path / "back.png", "-t", tok)[0] == 0
    back = Image.open(tmp_path / "back.png")
    assert back.size == (21, 30)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(expected.decode(codes)[0]))
    assert run("decode", tmp_path / "cat.vq", tmp_path / "back.webp", "-t", tok)[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back.webp")), np.asarray(back))


def test_levels_can_be_left_out(run, tok, tmp_path):
    picture(16, 16).save(tmp_path / "a.png")
    assert run("encode", tmp_path / "a.png", tmp_path / "a.vq", "-t", tok, "--num_levels", 1)[0] == 0
    assert len(Codes.load(tmp_path / "a.vq").levels) == 1
    assert "the coarsest 1 of 2 levels" in run("info", tmp_path / "a.vq")[1]
    assert run("decode", tmp_path / "a.vq", tmp_path / "b.png", "-t", tok)[0] == 0


def test_several_samples_become_several_pictures(run, tok, tmp_path, refuse):
    VQTokenizer.from_pretrained(tok).encode([picture(16, 16), picture(9, 20)]).save(tmp_path / "two.vq")
    assert run("decode", tmp_path / "two.vq", tmp_path / "out.png", "-t", tok)[0] == 0
    assert Image.open(tmp_path / "out-0001.png").size == (20, 9)
    assert not (tmp_path / "out.png").exists()
    (tmp_path / "out-0000.png").unlink()
    assert "out-0001.png exists already" in refuse("decode", tmp_path / "two.vq", tmp_path / "out.png", "-t", tok)


def test_info(run, tok, tmp_path):
    status, out, _ = run("info", tok)
    assert status == 0 and "level 0: 1 code of 16 per 8x8 pixels" in out
    VQTokenizer.from_pretrained(tok).encode([picture(16, 16), picture(9, 20)]).save(tmp_path / "two.vq")
    _, out, _ = run("info", tmp_path / "two.vq")
    for part in (
        "2 samples",
        "sizes 9x20, 16x16",
        "level 1: 1 code of 32 per 4x4",
        VQTokenizer.from_pretrained(tok).fingerprint,
    ):
        assert part in out


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(4):
        picture(16, 24, i).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "data"


def test_evaluate_and_compare(run, tok, folder, tmp_path):
    status, out, err = run("evaluate", tok, folder, "--split", "all", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert status == 0 and result["data"]["num_images"] == 4 and result["data"]["num_skipped"] == 1
    assert f"{result['psnr_db']:.2f}" in out and "vqtok-eval v1" in out
    assert "1 picture was skipped" in err and "broken.png" in err
    other = tmp_path / "other"
    VQTokenizer.from_pretrained(tok).save_pretrained(other)
    status, out, _ = run("compare", tok, other, "--data", folder, "--split", "all", "--json", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert status == 0 and [r["name"] for r in results] == [tok, str(other)]
    assert results[0]["psnr_db"] == results[1]["psnr_db"] == result["psnr_db"]


def test_generate(run, tmp_path, monkeypatch, refuse):
    calls = []

    class FakePipeline:
        prior = SimpleNamespace(config=SimpleNamespace(condition="text"))
        sampling_rate, modality = None, "image"

        @classmethod
        def from_pretrained(cls, name, device=None):
            calls.append((name, device))
            return cls()

        def __call__(self, prompts, **options):
            calls.append((prompts, options))
            return [picture(8, 8, seed) for seed in range(len(prompts or [None]) * options["num_samples"])]

    monkeypatch.setitem(vars(vqtok), "VQPipeline", FakePipeline)
    arguments = ["generate", "pipe", "a red three!", "a blue one", "--output_dir", tmp_path / "out", "--num_samples", 2]
    status, out, _ = run(*arguments, "--seed", 7, "--top_p", 0.9, "--device", "cpu")
    names = [f"{name}-{i:03d}.png" for name in ("000-a-red-three", "001-a-blue-one") for i in range(2)]
    assert status == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert calls == [("pipe", "cpu"), (["a red three!", "a blue one"], {"num_samples": 2, "seed": 7, "top_p": 0.9})]
    assert [line.rsplit("/", 1)[1] for line in out.splitlines()] == names, "in the order of the prompts"
    assert "000-a-red-three-000.png exists already" in refuse(*arguments)
    assert run(*arguments, "--overwrite")[0] == 0
    assert run("generate", "pipe", "--output_dir", tmp_path / "none")[0] == 0
    assert calls[-1][0] is None and (tmp_path / "none" / "sample-000.png").exists()


@pytest.mark.parametrize("model_type", PRIORS)
def test_generate_and_info_of_a_real_pipeline(run, refuse, tmp_path, model_type):
    tokenizer = make_tokenizer()
    backbone = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config_class, model_class = PRIORS[model_type]
    config = config_class(
        layout=tokenizer.layout.to_dict(), condition="class", text_size=5, backbone_config=backbone, max_grid=2
    )
    torch.manual_seed(0)
    vqtok.VQPipeline(model_class(config), tokenizer).save_pretrained(tmp_path / "pipe")
    status, out, _ = run("info", tmp_path / "pipe")
    assert status == 0 and "condition: 5 classes" in out and "level 0: 1 code of 16" in out
    for folder in ("one", "two"):
        assert run("generate", tmp_path / "pipe", 3, "--seed", 1, "--output_dir", tmp_path / folder)[0] == 0
    one, two = (Image.open(tmp_path / folder / "000-3-000.png") for folder in ("one", "two"))
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    assert "draws classes by number, got 'three'" in refuse(
        "generate", tmp_path / "pipe", "three", "--output_dir", tmp_path / "x"
    )
    assert "from 0 to 4, got 9" in refuse("generate", tmp_path / "pipe", 9, "--output_dir", tmp_path / "x")
    assert "temperature" in refuse(
        "generate", tmp_path / "pipe", 1, "--temperature", -1, "--output_dir", tmp_path / "x"
    )
    assert "is a pipeline" in refuse(
        "encode", tmp_path / "one" / "000-3-000.png", tmp_path / "a.vq", "-t", tmp_path / "pipe"
    )
    assert "is no pipeline" in refuse("generate", tmp_path / "pipe" / "vq_tokenizer", 1, "--output_dir", tmp_path / "x")


def test_nothing_is_overwritten_by_mistake(run, refuse, tok, tmp_path):
    image, codes = tmp_path / "a.png", tmp_path / "a.vq"
    picture(16, 16).save(image)
    assert "named like a picture" in refuse("encode", image, image, "-t", tok)
    assert "named like a picture" in refuse("encode", image, image, "-t", tok, "--overwrite")
    (tmp_path / "link.vq").symlink_to(image)
    assert "is the input" in refuse("encode", image, tmp_path / "link.vq", "-t", tok, "--overwrite")
    assert run("encode", image, codes, "-t", tok)[0] == 0
    assert "exists already" in refuse("encode", image, codes, "-t", tok)
    assert run("encode", image, codes, "-t", tok, "--overwrite")[0] == 0
    assert "exists already" in refuse("decode", codes, image, "-t", tok)
    assert "no suffix of a picture format" in refuse("decode", codes, codes, "-t", tok, "--overwrite")
    assert "is a folder" in refuse("encode", image, tmp_path, "-t", tok)


def test_bad_input_is_one_line(refuse, tok, tmp_path, folder):
    image, codes = tmp_path / "a.png", tmp_path / "a.vq"
    picture(16, 16).save(image)
    VQTokenizer.from_pretrained(tok).encode(image).save(codes)
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:200])
    (tmp_path / "cut.vq").write_bytes(codes.read_bytes()[:-9])
    (tmp_path / "text.txt").write_text("words")
    picture(5, 16).save(tmp_path / "small.png")
    out = tmp_path / "out.vq"
    cases = [
        (["encode", tmp_path / "none.png", out, "-t", tok], "there is no file"),
        (["encode", tmp_path, out, "-t", tok], "is a folder"),
        (["encode", codes, out, "-t", tok], "vqtok decode makes a picture"),
        (["encode", tmp_path / "cut.png", out, "-t", tok], "cut.png"),
        (["encode", tmp_path / "text.txt", out, "-t", tok], "text.txt: it is no picture"),
        (["encode", tmp_path / "small.png", out, "-t", tok], "16x5 pixels, a side smaller than the stride of 8"),
        (["encode", image, out, "-t", tok, "--num_levels", 3], "num_levels must be from 1 to 2, got 3"),
        (["encode", image, out, "-t", tmp_path / "nowhere"], "there is no folder"),
        (["encode", image, out, "-t", folder], "has no config.json"),
        (["encode", image, out], "Missing option '--tokenizer'"),
        (["decode", image, tmp_path / "b.png", "-t", tok], "vqtok encode makes codes"),
        (["decode", tmp_path / "cut.vq", tmp_path / "b.png", "-t", tok], "truncated or altered"),
        (["decode", tmp_path / "text.txt", tmp_path / "b.png", "-t", tok], "not a file of codes"),
        (["decode", codes, tmp_path / "b.xyz", "-t", tok], "no suffix of a picture format"),
        (["info", image], "is a picture"),
        (["info", tmp_path / "nothing" / "here"], "there is no folder"),
        (["evaluate", tok, tmp_path / "absent" / "x"], "there is no folder"),
        (["evaluate", tok, folder, "--json", tmp_path / "table.txt"], "written as JSON"),
        (["evaluate", tok, folder, "--num_samples", 0], "num_samples"),
        (["compare", tok, tok, "--data", folder], "not all different"),
        (["encod", image, out], "encod"),
    ]
    for arguments, complaint in cases:
        assert complaint in refuse(*arguments), arguments


def test_a_bad_config_is_one_line(refuse, tok, tmp_path):
    shutil.copytree(tok, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_size": "four"}))
    assert "'latent_size'" in refuse("info", tmp_path)


def test_codes_of_another_tokenizer(refuse, tok, tmp_path):
    mine = VQTokenizer.from_pretrained(tok)
    codes = mine.encode(picture(16, 16))
    Codes(codes.levels, codes.sizes, codes.layout, "f" * 64).save(tmp_path / "other.vq")
    line = refuse("decode", tmp_path / "other.vq", tmp_path / "a.png", "-t", tok)
    assert "f" * 64 in line and mine.fingerprint in line


def test_a_full_disk_is_one_line(tok, tmp_path, run):
    resource = pytest.importorskip("resource")
    picture(64, 64).save(tmp_path / "a.png")
    VQTokenizer.from_pretrained(tok).encode(tmp_path / "a.png").save(tmp_path / "a.vq")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        status, _, err = run("decode", tmp_path / "a.vq", tmp_path / "b.png", "-t", tok)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "could not write" in err and "b.png" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.vq"]


def test_debug_shows_where_and_our_own_errors_are_never_hidden(run, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        run("--debug", "encode", tmp_path / "none.png", tmp_path / "a.vq", "-t", "x")
    assert "cli.py" in "".join(traceback.format_tb(caught.tb))
    monkeypatch.setattr(cli, "_check_input", lambda *_: (_ for _ in ()).throw(ValueError("two\nlines")))
    assert run("encode", tmp_path / "none.png", tmp_path / "a.vq", "-t", "x")[2].count("\n") == 1
    monkeypatch.setattr(cli, "_check_input", lambda *_: {}["a bug"])
    with pytest.raises(KeyError):
        run("encode", tmp_path / "none.png", tmp_path / "a.vq", "-t", "x")
    monkeypatch.setattr(cli, "_check_input", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("encode", tmp_path / "none.png", tmp_path / "a.vq", "-t", "x")[0] == 130


def test_version_and_help(run):
    assert run("--version")[1] == f"vqtok {vqtok.__version__}\n"
    assert "generate" in run()[1]
    for command in ("encode", "decode", "generate", "info", "evaluate", "compare"):
        status, out, _ = run(command, "--help")
        assert status == 0 and "Usage: vqtok" in out


def test_help_is_light():
    """In a process of its own: nothing heavy may be imported for it."""
    code = (
        "import sys; from vqtok.cli import main; status = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else status)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "evaluate" in process.stdout
