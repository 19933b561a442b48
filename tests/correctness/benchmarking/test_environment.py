"""A results file says which machine it comes from, and nothing that it should not."""

import json
import platform

import pytest
import torch

from pagedattn.benchmarking import describe_machine, environment, machine_identity

ANSWER = (
    "NVIDIA H100 80GB HBM3, 580.1, 81559, 1980, 1980, 2619, 700.00, 33, Enabled, [N/A], GPU-secret"
)


class Answer:
    stdout = ANSWER + "\n"


def test_a_gpu_is_described_with_its_id_hashed(monkeypatch):
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: Answer())
    gpu = environment.query_gpu()
    assert gpu["name"] == "NVIDIA H100 80GB HBM3"
    assert gpu["driver"] == "580.1"
    assert gpu["sm_clock_mhz"] == 1980
    assert gpu["power_limit_w"] == 700
    assert gpu["mig"] == "[N/A]"
    assert len(gpu["uuid_sha256"]) == 64
    assert "secret" not in json.dumps(gpu)


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert environment.query_gpu() is None
    assert describe_machine()["machine"]["gpu"] is None


def test_an_answer_of_another_form_counts_as_no_gpu(monkeypatch):
    monkeypatch.setattr(Answer, "stdout", "No devices were found\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: Answer())
    assert environment.query_gpu() is None


def test_a_machine_is_described_without_its_host_name():
    described = describe_machine()
    assert described["machine"]["cpu"]
    assert described["num_cpus"] >= 1
    assert described["num_threads"] == torch.get_num_threads()
    assert {"python", "torch", "numpy"} <= set(described["versions"])
    host = platform.node()
    if host and host not in described["machine"]["cpu"]:
        assert host not in json.dumps(described)


def test_machines_are_told_apart_by_cpu_and_gpu():
    info = {"pagedattn": describe_machine()}
    assert machine_identity(info) == machine_identity({"pagedattn": describe_machine()})
    other = json.loads(json.dumps(info))
    other["pagedattn"]["machine"]["gpu_uuid_sha256"] = "0" * 64
    assert machine_identity(info) != machine_identity(other)


@pytest.mark.parametrize("info", [{}, {"cpu": None}, {"pagedattn": None, "node": "a"}])
def test_a_foreign_file_has_an_identity_too(info):
    assert set(machine_identity(info)) == {"cpu", "node"}
