"""infra/kubernetes: valid by Kubernetes' own schemas, and a job template that the locked Prefect can fill in.

Not shown here: that a cluster runs it; there is none on this machine.
"""

import json
import re
import runpy
from typing import Any

import kubernetes_validate
import pytest
from conftest import ROOT
from prefect.utilities.templating import apply_values, find_placeholders
from ruamel.yaml import YAML

FOLDER = ROOT / "infra" / "kubernetes"
VERSIONS = ("1.32", "1.37")
TEMPLATE = json.loads((FOLDER / "gpu-job-template.json").read_text())
KUSTOMIZATION = YAML(typ="safe").load((FOLDER / "kustomization.yaml").read_text())
SECRETS = runpy.run_path(str(ROOT / "infra" / "make_secrets.py"))
MADE = set(SECRETS["MADE"]) | set(SECRETS["ASKED"])


def objects() -> list[dict[str, Any]]:
    return [
        each for name in KUSTOMIZATION["resources"] for each in YAML(typ="safe").load_all((FOLDER / name).read_text())
    ]


def one(kind: str, name: str) -> dict[str, Any]:
    [matching] = [each for each in objects() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return matching


def literals(name: str) -> dict[str, str]:
    [matching] = [each for each in KUSTOMIZATION["configMapGenerator"] if each["name"] == name]
    return dict(each.split("=", 1) for each in matching["literals"])


def job(**chosen: Any) -> dict[str, Any]:
    """The manifest as Prefect's worker fills it in, with the pool's defaults and what it adds itself."""
    defaults = {key: each["default"] for key, each in TEMPLATE["variables"]["properties"].items() if "default" in each}
    values = defaults | {"name": "train-1", "command": "prefect flow-run execute", "labels": {"a": "b"}} | chosen
    manifest = apply_values(TEMPLATE["job_configuration"]["job_manifest"], values)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["args"] = container["args"].split()
    return manifest


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_by_kubernetes_schema(version: str) -> None:
    for each in objects():
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_job_that_prefect_makes_is_valid_by_kubernetes_schema(version: str) -> None:
    manifest = job()
    for wrongly_there in ("parallelism", "completions"):  # Prefect demands them in the pod, where Kubernetes has none
        assert pod(manifest).pop(wrongly_there) == 1
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_template_uses_exactly_the_variables_that_it_declares() -> None:
    named = {each.name for each in find_placeholders(TEMPLATE["job_configuration"])}
    assert named == set(TEMPLATE["variables"]["properties"])


def test_a_training_gets_its_gpus_and_is_not_run_twice() -> None:
    manifest = job(gpus=4)
    assert pod(manifest)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert manifest["spec"]["backoffLimit"] == 0  # Prefect decides who tries again
    assert pod(manifest)["terminationGracePeriodSeconds"] >= 120  # a training saves a checkpoint first


@pytest.mark.parametrize("which", ["worker", "job"])
def test_a_pod_has_no_rights_and_writes_only_where_it_must(which: str) -> None:
    spec = pod(job()) if which == "job" else pod(one("Deployment", "retune-gpu-worker"))
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [container] = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert re.search(r":\d+(\.\d+)+", container["image"])
    assert "memory" in container["resources"]["limits"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}


def test_a_training_may_do_nothing_in_the_cluster() -> None:
    assert pod(job())["automountServiceAccountToken"] is False
    assert one("ServiceAccount", pod(job())["serviceAccountName"])["automountServiceAccountToken"] is False
    for binding in (each for each in objects() if each["kind"] == "RoleBinding"):
        assert [each["name"] for each in binding["subjects"]] == ["retune-worker"]
    rules = one("Role", "retune-worker")["rules"]
    assert not [rule for rule in rules if "*" in rule["verbs"] + rule["resources"] or "secrets" in rule["resources"]]
    assert {each["kind"] for each in objects()}.isdisjoint({"ClusterRole", "ClusterRoleBinding"})


def test_every_secret_is_one_that_is_made_and_none_stands_here() -> None:
    worker, training = pod(one("Deployment", "retune-gpu-worker")), pod(job())
    for each in worker["containers"][0]["env"]:
        assert each["valueFrom"]["secretKeyRef"]["key"] in MADE
    for each in training["containers"][0]["env"]:
        assert set(re.findall(r"\{secret:(\w+)\}", each["value"])) <= MADE
    hidden = re.compile(r"PASSWORD|AUTH_STRING$|ACCESS_KEY|TOKEN")
    assert not [key for name in ("retune", "retune-worker") for key in literals(name) if hidden.search(key)]
