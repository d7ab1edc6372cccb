"""The three lists of packages agree: pyproject.toml, environment.yml and the lock; threads wait passively."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).resolve().parents[1]


def project():
    return tomllib.loads((HERE / "pyproject.toml").read_text())["project"]


def wanted():
    listed = [*project()["dependencies"], *project()["optional-dependencies"]["test"]]
    return {canonicalize_name(one.name): one.specifier for one in map(Requirement, listed)}


def test_environment_yml_asks_for_pyprojects_versions():
    text = (HERE / "environment.yml").read_text()
    lines = re.findall(r"^      - (\w.*)$", text, re.MULTILINE)  # the pip section, without its options
    environment = {canonicalize_name(one.name): one.specifier for one in map(Requirement, lines)}
    assert environment == wanted()
    assert f"- python{project()['requires-python']}" in text


def locked():
    lock = {}
    for line in (HERE / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
            lock[canonicalize_name(name)] = Version(version)
    return lock


def test_the_lock_pins_everything_within_pyprojects_ranges():
    lock = locked()
    for name, specifier in wanted().items():
        assert lock[name] in specifier, name
    assert len(lock) > len(wanted())  # what they need in turn is pinned as well


def test_transformers_is_capped_below_the_next_major_release():
    """Its public doors alone are used (docs/transformers.md): a minor release keeps them."""
    (upper,) = (Version(one.version) for one in wanted()["transformers"] if one.operator == "<")
    assert upper.release == (locked()["transformers"].major + 1,)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU OpenMP")
@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_has_set_it(chosen, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    command = [sys.executable, "-c", "import fsc147lib, torch"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert re.search(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", done.stderr)[1] == expected
