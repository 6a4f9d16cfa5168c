"""The files in deploy/ agree with the package: what a job runs are commands and options that exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import ray
import yaml

from tests.conftest import ROOT
from vitq_ray.commands.options import TuneOptions
from vitq_ray.commands.parser import parse


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    return found


def test_what_the_job_runs_can_be_parsed(job: dict[str, Any]) -> None:
    shell, flag, script = shlex.split(job["spec"]["entrypoint"])
    assert (shell, flag) == ("sh", "-c")
    commands = [shlex.split(text) for text in re.findall(r"exec vitq-ray tune ([^;]*);", script)]
    again, begun = (parse(TuneOptions, command, "vitq-ray tune") for command in commands)
    assert again.resume == begun.output
    assert f"-e {begun.output}/run.json" in script
    assert {again.ray_address, begun.ray_address} == {"auto"}


def test_all_nodes_run_one_image_of_one_ray(job: dict[str, Any]) -> None:
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert len({container["image"] for container in containers}) == 1
    assert all(container["volumeMounts"] for container in containers)
    container_file = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{spec['rayVersion']}-" in container_file
    assert spec["rayVersion"].rpartition(".")[0] == ray.__version__.rpartition(".")[0]
