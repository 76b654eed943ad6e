"""What is built and installed: the wheel carries the bundled model, the installed trl is one that is declared."""

import re
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

from .children import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    builder = WheelBuilder(str(ROOT))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel_names):
    package = ROOT / "rlhf_bayes"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert expected - wheel_names == set()


def test_the_wheel_holds_the_bundled_model(wheel_names):
    bundled = {Path(name).name for name in wheel_names if name.startswith("rlhf_bayes/toy/model/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= bundled


def test_the_wheel_holds_the_claims(wheel_names):
    scripts = {f"rlhf_bayes/commands/claim_scripts/{path.name}" for path in (ROOT / "recipes" / "claims").glob("*.py")}
    assert len(scripts) > 10
    assert scripts <= wheel_names


@pytest.mark.processes
def test_the_claims_are_found_without_a_clone(wheel, tmp_path):
    """What a user has: the files of the wheel, in another place than this repository."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import rlhf_bayes.commands.claims as claims\n"
        "found = claims._scripts()\n"
        "print(*found.values(), sep='\\n')\n"
        "claims.main(['equivalences', '--help'])"
    )
    done = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.returncode == 0, done.stderr
    places = [line for line in done.stdout.splitlines() if line.endswith(".py")]
    assert len(places) >= 10
    assert all(line.startswith(str(tmp_path / "installed")) for line in places)
    assert "--output_dir" in done.stdout


def test_the_wheel_tells_type_checkers_to_read_its_annotations(wheel_names):
    assert "rlhf_bayes/py.typed" in wheel_names


def test_the_wheel_holds_nothing_else_but_metadata(wheel_names):
    others = {name for name in wheel_names if not name.startswith("rlhf_bayes/")}
    assert {Path(name).name for name in others} == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"}


def test_the_installed_trl_is_in_the_declared_range():
    (requirement,) = (Requirement(line) for line in requires("rlhf_bayes") if re.match(r"trl\b(?!\[)", line))
    assert version("trl") in requirement.specifier
    assert "1.15.0" not in requirement.specifier
