"""What ``pip install`` takes along: pyproject.toml against the tree."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config():
    """pyproject.toml as setuptools reads it, with what it takes from other files."""
    reader = pytest.importorskip("setuptools.config.pyprojecttoml")
    return reader.read_configuration(ROOT / "pyproject.toml", expand=True)


def requirements(*names: str) -> list[str]:
    lines = [line for n in names for line in (ROOT / n).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_module_and_data_file_is_named(config):
    setuptools = config["tool"]["setuptools"]
    packages = set(setuptools["packages"])
    tops = {p.split(".")[0] for p in packages}
    assert setuptools["py-modules"] == ["main"] and tops >= {"models", "datasets", "backbones", "utils", "unlearning"}
    files = {f.relative_to(ROOT) for top in tops for f in (ROOT / top).rglob("*") if f.is_file()}
    files = {f for f in files if "__pycache__" not in f.parts}
    assert {".".join(f.parent.parts) for f in files if f.suffix == ".py"} == packages - {"reproduce"}
    data = {f for top, globs in setuptools["package-data"].items() for g in globs for f in (ROOT / top).glob(g)}
    assert {ROOT / f for f in files if f.suffix != ".py"} == {f for f in data if f.is_file()}
    for shipped in (
        "reproduce/lorm.yaml",
        "backbones/weights/vit_pocket.safetensors",
        "datasets/data/glyphs.npz.xz",
        "models/config/er.yaml",
    ):
        assert ROOT / shipped in data
    others = {f.parent.name for f in ROOT.glob("*/__init__.py")}
    assert others <= tops  # a new package at the top must be named


def test_the_command(config):
    module, function = config["project"]["scripts"]["herd"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_requirements_are_those_of_the_files(config):
    assert config["project"]["dependencies"] == requirements("requirements.txt")
    project = {k.replace("-", "_"): v for k, v in config["project"].items()}
    extras = project["optional_dependencies"]
    for name in ("ray", "spiking", "tensorboard", "wandb"):
        assert extras[name] == requirements(f"requirements-{name}.txt")
    tested = ["dev", "ray", "spiking", "tensorboard"]
    assert extras["dev"] == requirements(*(f"requirements-{n}.txt" for n in tested))
    assert set(extras) == {"ray", "spiking", "tensorboard", "wandb", "dev"}
    from packaging.requirements import Requirement

    for line in [*config["project"]["dependencies"], *sum(extras.values(), [])]:
        Requirement(line)  # a line that only pip understands (-r, --index-url) stops every installation
