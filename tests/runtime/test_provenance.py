import hashlib
import platform
import subprocess

import numpy
import pytest

import onbeat
from onbeat.runtime import provenance


def test_versions_are_those_that_run():
    found = provenance.versions()
    assert found["python"] == platform.python_version()
    assert found["onbeat"] == onbeat.__version__
    assert found["numpy"] == numpy.__version__


def test_a_package_that_is_not_there_is_not_named(monkeypatch):
    monkeypatch.setattr(provenance, "TIMED_PACKAGES", ("numpy", "no-such-package-xyz"))
    assert "no-such-package-xyz" not in provenance.versions()


def test_bundle_hash_is_of_the_manifest(tmp_path):
    assert provenance.bundle_hash(tmp_path) is None
    (tmp_path / "manifest.json").write_bytes(b"{}")
    assert provenance.bundle_hash(tmp_path) == hashlib.sha256(b"{}").hexdigest()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, which this code is made to believe it runs from."""
    package = tmp_path / "onbeat" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(provenance.onbeat, "__file__", str(package))
    return tmp_path


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.usefixtures("checkout")
def test_outside_a_checkout_there_is_no_commit():
    assert provenance.git_commit() is None


def test_the_commit_is_marked_once_a_file_differs(checkout):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "one")
    commit = git(checkout, "rev-parse", "HEAD").strip()
    assert provenance.git_commit() == commit
    (checkout / "onbeat" / "__init__.py").write_text("changed")
    assert provenance.git_commit() == commit + "+"


def test_a_repository_without_commits_has_none(checkout):
    git(checkout, "init", "-q")
    assert provenance.git_commit() is None
