"""What starting Ray leaves behind in this process: nothing."""

from __future__ import annotations

import os

import pytest

from vitq_ray.cluster import start


def test_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITQ_SET", "mine")
    monkeypatch.delenv("VITQ_UNSET", raising=False)
    before = dict(os.environ)
    with start.environment({"VITQ_SET": "theirs", "VITQ_UNSET": "1"}):
        assert (os.environ["VITQ_SET"], os.environ["VITQ_UNSET"]) == ("theirs", "1")
    assert dict(os.environ) == before
    with pytest.raises(RuntimeError), start.environment({"VITQ_SET": "theirs"}):
        raise RuntimeError
    assert dict(os.environ) == before


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_sets_variables_for_its_duration_and_keeps_those_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "7")
    monkeypatch.delenv("TUNE_DISABLE_SIGINT_HANDLER", raising=False)
    before = dict(os.environ)
    with start.cluster():
        assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"
        assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "7"
    assert dict(os.environ) == before
