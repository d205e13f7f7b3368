"""The Python of docs/audio.md runs and says what the page shows."""

import contextlib
import io
import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "audio.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs_and_says_what_it_shows():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for block in blocks:
            exec(compile(block, "docs/audio.md", "exec"), names)
    assert output.getvalue() == "".join(re.findall(r"```text\n(.*?)```", PAGE, re.S))
