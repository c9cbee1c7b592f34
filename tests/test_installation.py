"""What the README says about Macs: for which of them pip finds a wheel of everything."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def resolve(folder, *requirements, flags=()):
    """Let pip choose wheels, and install nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--target", folder]
    command += ["--only-binary=:all:", *flags, *requirements]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def required(tmp_path_factory):
    """What the package requires on macOS; skips where pip finds nothing at all."""
    folder = tmp_path_factory.mktemp("probe")
    if resolve(folder, "tqdm", flags=["--ignore-installed"]).returncode:
        pytest.skip("no pip, or no package index")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = map(Requirement, project["dependencies"])
    on_mac = [r for r in found if not r.marker or r.marker.evaluate({"sys_platform": "darwin"})]
    # pip looks at the markers of dependencies as if it were on this machine.
    return [f"{r.name}{r.specifier}" for r in on_mac] + ["mlx-metal"]


def for_system(system, python):
    return [f"--platform={system}", f"--python-version={python}"]


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_apple_silicon_with_macos_14_has_wheels(required, tmp_path, python):
    done = resolve(tmp_path, *required, flags=for_system("macosx_14_0_arm64", python))
    assert not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("system", ["macosx_13_0_arm64", "macosx_14_0_x86_64"])
def test_an_older_macos_and_an_intel_mac_have_none(required, tmp_path, system):
    done = resolve(tmp_path, *required, flags=for_system(system, "3.12"))
    assert done.returncode and "No matching distribution found for mlx>=0.32.4" in done.stderr
