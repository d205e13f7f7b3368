"""`import vqtok` is light, and does not need what is optional, absent or broken."""

import subprocess
import sys

OPTIONAL = [
    "torchaudio",
    "torchvision",
    "datasets",
    "sklearn",
    "matplotlib",
    "torchmetrics",
    "soundfile",
    "pesq",
    "pystoi",
    "typer",
    "tensorboard",
]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    assert (
        python("import sys, vqtok; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])") == "[]"
    )


def test_the_public_names_work_without_any_optional_package():
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))"  # None makes an import fail
    use = "tok = VQTokenizer.from_config('image/vqvae-digits'); print(tok.reconstruct([Image.new('RGB', (20, 12))])[0].size)"
    modules = [
        "image.data",
        "audio.data",
        "evaluation.audio_report",
        "evaluation.html",
        "evaluation.word_judge",
        "training",
    ]
    imports = ", ".join(f"vqtok.{module}" for module in modules)
    assert python(f"{block}; from vqtok import *; import {imports}; from PIL import Image; {use}") == "(20, 12)"


def test_a_broken_torchaudio_leaves_the_package_importable_and_is_named_where_it_hurts(tmp_path):
    """As of another build than torch: transformers itself then fails to import its models."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text('raise OSError("undefined symbol")')
    alone = "import torch; from vqtok.quantizers import VectorQuantizer; VectorQuantizer(4, codebook_size=8)(torch.randn(1, 2, 4))"
    named = "import vqtok\ntry:\n    vqtok.VQTokenizer\nexcept ImportError as error:\n    print(error)"
    said = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {alone}\n{named}")
    assert "undefined symbol" in said and "install torch and torchaudio of one version together" in said
