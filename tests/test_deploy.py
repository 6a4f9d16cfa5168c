"""The files in deploy/ agree with the package: what a job runs are commands and options that exist."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
import ray
import yaml
from ray.util.metrics import Counter

from tests.conftest import ROOT
from vitq_ray.cluster.metrics import RAY_METRICS
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


# Names as KubeRay's definition of RayJob (ray.io/v1) has them, as far as they are used: an unknown one is a typing
# error that KubeRay refuses. The whole file was checked against that definition by hand.
SPEC = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", *HEAD}
POD = {"terminationGracePeriodSeconds", "containers", "volumes"}
CONTAINER = {"name", "image", "resources", "envFrom", "volumeMounts"}


def test_the_job_has_fields_that_kuberay_knows(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(spec) <= SPEC
    assert set(cluster) <= CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD
    assert spec["shutdownAfterJobFinishes"] is True, "ttlSecondsAfterFinished needs it"
    for group in groups:
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group) <= GROUP
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert all(set(source) == {"secretRef"} for source in container["envFrom"])
            limits, requests = (container["resources"][kind] for kind in ("limits", "requests"))
            assert limits == requests, "Ray counts CPUs by the limits"
            assert limits["cpu"].isdigit()
            assert re.fullmatch(r"\d+Gi", limits["memory"])


def test_trials_of_the_job_have_cpus(job: dict[str, Any]) -> None:
    """Workers that the driver asks for fit into the least cluster."""
    cluster = job["spec"]["rayClusterSpec"]
    nodes = [(1, cluster["headGroupSpec"]), *((g["minReplicas"], g) for g in cluster["workerGroupSpecs"])]
    cpus = sum(
        count * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) for count, group in nodes
    )
    asked = {int(number) for number in re.findall(r"--num-workers (\d+)", job["spec"]["entrypoint"])}
    assert len(asked) == 1
    assert asked.pop() <= cpus


def test_the_run_folder_is_on_the_volume_that_all_nodes_see(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    mounts = [
        {mount["name"]: mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    assert all(each == mounts[0] for each in mounts)
    outputs = re.findall(r"--(?:output|resume) ([^\s;]+)", job["spec"]["entrypoint"])
    assert len(outputs) == 2
    assert all(output.startswith(f"{mounts[0]['shared']}/") for output in outputs)


def test_what_the_container_file_copies_is_there() -> None:
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    container_file = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = {
        source: target
        for line in re.findall(r"^COPY (?:--\S+ )?(.*)$", container_file, re.MULTILINE)
        for *sources, target in [line.split()]
        for source in sources
    }
    assert all((ROOT / source).exists() for source in copied)
    assert {"pyproject.toml", project["readme"], "vitq_ray"} == set(copied), "all that a build of the package needs"
    assert copied["vitq_ray"] == copied["pyproject.toml"] + "vitq_ray"
    installed = container_file.rpartition(" ")[2].strip()
    assert f"{installed}/" == copied["pyproject.toml"]
    (version,) = set(re.findall(r"ray\[[a-z,]+\]==([\d.]+)", container_file))
    assert f"rayproject/ray:{version}-py311" in container_file
    assert "ray[data,default,train,tune]" in container_file
    assert any(row.startswith("ray[data,default,train,tune]>=") for row in project["dependencies"])


# Grafana ------------------------------------------------------------------------------------------------------------

DASHBOARD = json.loads((ROOT / "deploy" / "grafana-vitq.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Of PromQL, what the panels need: an aggregation of one metric of the chosen runs.
EXPRESSION = re.compile(r'(?:sum|min|max|avg) by \((?P<by>\w+)\) \((?P<metric>\w+)\{run=~"\$run"\}\)')


def exported(name: str) -> str:
    """As Prometheus reads a metric."""
    return f"ray_{name}_total" if RAY_METRICS[name].kind is Counter else f"ray_{name}"


def test_the_dashboard_shows_every_metric_once() -> None:
    shown = {}
    for panel in PANELS:
        for target in panel["targets"]:
            expression = EXPRESSION.fullmatch(target["expr"])
            assert expression is not None, target["expr"]
            assert expression["metric"] not in shown
            shown[expression["metric"]] = expression["by"], target["legendFormat"]
    assert set(shown) == {exported(name) for name in RAY_METRICS}
    for name, row in RAY_METRICS.items():
        by, legend = shown[exported(name)]
        assert by == row.tags[-1], "the tag that tells its series apart"
        assert legend == f"{{{{{by}}}}}"


def test_panels_of_the_dashboard_have_numbers_and_places_of_their_own() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        xs, ys = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        own = {(x, y) for x in xs for y in ys}
        assert not taken & own, panel["title"]
        taken |= own
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)


def test_the_dashboard_asks_for_its_datasource_and_runs() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "run"}
    assert variables["run"]["query"]["query"] == 'label_values({__name__=~"ray_vitq_.+"}, run)'
    assert all(row.tags[0] == "run" for row in RAY_METRICS.values())
    assert "__inputs" not in DASHBOARD, "it can be imported as it is"
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
