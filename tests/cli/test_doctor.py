# SPDX-License-Identifier: Apache-2.0
"""`vosops doctor`: every section is there, with and without the compiled operators."""

import importlib.metadata
import types

import pytest
import torch
import typer
from typer.testing import CliRunner

import vosops
from vosops.cli import doctor as command
from vosops.ops import backends

if not isinstance(command, types.ModuleType):  # `vosops.cli` names the function like its module
    import sys

    command = sys.modules["vosops.cli.doctor"]

app = typer.Typer()
app.command()(command.doctor)


@pytest.fixture
def report():
    def run():
        result = CliRunner().invoke(app)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_names_versions_machine_and_backends(report, monkeypatch):
    monkeypatch.delenv("VOSOPS_BACKEND", raising=False)
    text = report()
    for expected in (vosops.__version__, torch.__version__, "python", "triton", "numpy", "nvcc", "cores"):
        assert expected in text
    for backend in vosops.backend_report():
        assert backend in text
    for package in command.OPTIONAL_PACKAGES:
        assert package in text
    assert not set(text) & set("│┃─━…")


def test_without_the_compiled_operators(report, monkeypatch):
    monkeypatch.setattr(backends, "build_module", lambda: None)
    assert "unknown: the C++ operators are not built" in report()


def test_with_the_compiled_operators(report, monkeypatch):
    build = types.SimpleNamespace(
        cpu_isa=lambda: "avx2",
        cpu_isas=lambda: ["portable", "avx2"],
        build_info=lambda: {"compiler": "g++ 13.2"},
    )
    monkeypatch.setattr(backends, "build_module", lambda: build)
    text = report()
    assert "avx2 chosen; usable: portable, avx2" in text
    assert "g++ 13.2" in text


def test_gpus(report, monkeypatch):
    gpu = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert "NVIDIA H200, compute capability 9.0, 140.0 GiB" in report()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "none" in report()


def test_a_missing_package_is_named_with_its_purpose(report, monkeypatch):
    def version(name):
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(command.importlib.metadata, "version", version)
    text = report()
    assert "MISSING: features and encoders (--features timm:NAME)" in text
    assert "pip install 'vosops[apps]'" in text


def test_environment_variables_in_force(report, monkeypatch):
    monkeypatch.setenv("VOSOPS_DATA", "/somewhere/clips")
    assert "/somewhere/clips" in report()
    for name in [name for name in command.os.environ if name.startswith("VOSOPS_")]:
        monkeypatch.delenv(name)
    assert "none set" in report()


def test_cpu_name_comes_from_cpuinfo():
    lines = ["processor\t: 0", "model name\t: AMD EPYC 9554", "model name\t: other"]
    assert command._cpu_name_from(lines) == "AMD EPYC 9554"
    assert command._cpu_name_from([]) is None
