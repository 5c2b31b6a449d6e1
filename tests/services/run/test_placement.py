"""Where a run's actors are placed on a cluster of several roles."""

import pytest

from opd_governor.services.job.settings import JobError
from opd_governor.services.run.cluster import require_roles, role_resources
from tests.services.control.fake_run import make_job

PINNED = make_job(cluster={"pin_roles": True})
ALL = ("CPU", "opd_rollout", "opd_teacher", "opd_learner")


def test_a_pinned_actor_asks_for_its_role_s_resource_and_others_for_nothing() -> None:
    assert role_resources(PINNED, "teacher") == {"opd_teacher": 0.001}
    assert role_resources(make_job(), "teacher") == {}


def test_a_role_that_no_node_offers_is_refused_by_name_instead_of_waited_for() -> None:
    require_roles(PINNED, ALL)
    require_roles(make_job(), ("CPU",))
    with pytest.raises(JobError, match=r"cluster\.pin_roles: no node of the cluster offers opd_teacher, opd_learner; .*ray start"):
        require_roles(PINNED, ("CPU", "opd_rollout"))


def test_a_teacher_behind_http_needs_no_node() -> None:
    teacher = {"model": "m", "backend": "http", "url": "http://127.0.0.1:8000"}
    require_roles(make_job(cluster={"pin_roles": True}, teacher=teacher), ("opd_rollout", "opd_learner"))
