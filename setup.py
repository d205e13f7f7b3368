"""Says which folders become packages; everything else is in pyproject.toml.

It exists because pyproject.toml can either find packages or place one from elsewhere, not both, and the configurations
live at the top of the repository (`tokenizers_configs/`) while the wheel carries them as `vqtok/tokenizers_configs/`.
"""

from setuptools import find_packages, setup

CONFIGS = "vqtok.tokenizers_configs"

setup(
    packages=[*find_packages(include=["vqtok", "vqtok.*"]), CONFIGS],
    package_dir={CONFIGS: "tokenizers_configs"},
    package_data={"vqtok": ["py.typed", "**/*.md", "audio/spoken_numbers/*"], CONFIGS: ["**/*.json", "**/*.md"]},
    include_package_data=False,
)
