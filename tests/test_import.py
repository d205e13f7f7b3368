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
    assert (
        python(f"{block}; from vqtok import *; import vqtok.image.data, vqtok.training; from PIL import Image; {use}")
        == "(20, 12)"
    )
