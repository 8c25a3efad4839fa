"""The policies of infra/terraform, read from the HCL and evaluated as IAM does: who may do what to which key.

Not shown here: that Terraform and AWS take the files as they are; neither is on this machine.
"""

import re
from functools import cache
from typing import Any

import hcl2
import pytest
from conftest import ROOT

FOLDER = ROOT / "infra" / "terraform"
BUCKET = "arn:aws:s3:::models"
ROLES = ("reader", "candidate", "promoter", "collector")
KEYS = {
    "object": "objects/" + "0" * 64,
    "manifest": "versions/0123456789abcdef/manifest.json",
    "signature": "versions/0123456789abcdef/manifest.0.sig",
    "record": "promotions/model/00000001.json",
    "probe": "probe/done",
    "else": "notes.txt",
}
CREATE = {"s3:if-none-match": "*", "s3:ObjectCreationOperation": "true"}
OVERWRITE = {"s3:ObjectCreationOperation": "true"}
PART = {"s3:ObjectCreationOperation": "false"}  # of a multipart upload; carries no condition

Policies = dict[str, list[dict[str, Any]]]  # the statements of each policy document


def plain(node: Any) -> Any:
    """HCL as python-hcl2 gives it, without its quotes and marks."""
    if isinstance(node, dict):
        return {plain(key): plain(value) for key, value in node.items() if not key.startswith("__")}
    if isinstance(node, list):
        return [plain(item) for item in node]
    return node[1:-1] if isinstance(node, str) and len(node) > 1 and node[0] == node[-1] == '"' else node


@cache
def parse(name: str) -> dict[str, Any]:
    with (FOLDER / name).open() as file:
        return plain(hcl2.load(file))


def documents(kms: bool = False) -> Policies:
    """With what a document takes over from others."""
    policies: Policies = {}
    for block in parse("policies.tf")["data"]:
        for name, body in block.get("aws_iam_policy_document", {}).items():
            statements = list(body.get("statement", []))
            statements += [each["statement"]["content"][0] for each in body.get("dynamic", []) if kms]
            for source in body.get("source_policy_documents", []):
                [taken] = re.findall(r"aws_iam_policy_document\.(\w+)\.json", source)
                statements = [*policies[taken], *statements]
            policies[name] = statements
    return policies


def resolved(text: str, prefix: str) -> str:
    base = f"{BUCKET}/{prefix}".rstrip("/")
    return text.replace("${local.base}", base).replace("${aws_s3_bucket.store.arn}", BUCKET)


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text) is not None


def holds(condition: dict[str, Any], context: dict[str, str]) -> bool:
    variable, values = condition["variable"], condition["values"]
    value = context.get(variable)
    match condition["test"]:
        case "Null":
            return values == [str(value is None).lower()]
        case "Bool":
            return value is not None and value in values
        case "ArnNotEquals":
            [role] = re.findall(r'if name == "(\w+)"', str(values))
            return value != f"arn:aws:iam::1:role/models-{role}"
    raise AssertionError(f"unknown test {condition['test']}")


def allowed(
    policies: Policies, role: str, action: str, resource: str, context: dict[str, str], prefix: str = ""
) -> bool:
    """IAM's decision: no deny of the role's or the bucket's policy applies, and an allow of the role's does."""
    context = {"aws:SecureTransport": "true", "aws:PrincipalArn": f"arn:aws:iam::1:role/models-{role}"} | context

    def applies(statement: dict[str, Any]) -> bool:
        return (
            any(matches(each, action) for each in statement["actions"])
            and any(matches(resolved(each, prefix), resource) for each in statement["resources"])
            and all(holds(each, context) for each in statement.get("condition", []))
        )

    both = [*policies[role], *policies["bucket"]] if role in policies else policies["bucket"]
    if any(statement.get("effect") == "Deny" and applies(statement) for statement in both):
        return False
    # A role that may do anything stands for an administrator's credentials.
    return role not in policies or any(
        statement.get("effect", "Allow") == "Allow" and applies(statement) for statement in policies[role]
    )


CONTEXTS = {"create": CREATE, "overwrite": OVERWRITE, "part": PART, "": {}}
ON_KEYS = (*(f"PutObject {how}" for how in ("create", "overwrite", "part")), "GetObject ", "DeleteObject ",
           "DeleteObjectVersion ", "PutObjectAcl ", "ListMultipartUploadParts ", "AbortMultipartUpload ")  # fmt: skip
ON_BUCKET = ("ListBucket", "GetBucketLocation", "ListBucketMultipartUploads", "PutBucketPolicy", "DeleteBucket",
             "PutBucketVersioning", "PutLifecycleConfiguration")  # fmt: skip
WRITTEN = ("object", "manifest", "signature", "probe")
PARTS = {"ListMultipartUploadParts ": ("object",), "AbortMultipartUpload ": ("object",)}
NO_RECORD = tuple(key for key in KEYS if key != "record")
# What each role may do to which keys; the administrator may do anything but what the bucket itself forbids.
MAY: dict[str, dict[str, tuple[str, ...]]] = {
    "reader": {},
    "candidate": {"PutObject create": WRITTEN, "PutObject part": WRITTEN, **PARTS},
    "promoter": {"PutObject create": ("record", "probe")},
    "collector": {"DeleteObject ": WRITTEN, **PARTS},
    "administrator": {action: tuple(KEYS) if "Multipart" in action else NO_RECORD
                      for action in ON_KEYS if action != "PutObject overwrite"},
}  # fmt: skip


def wrong(policies: Policies, prefix: str) -> list[Any]:
    """Where a policy does not say what MAY does."""
    start = f"{BUCKET}/{prefix}/"
    answers: list[Any] = []
    for role, may in MAY.items():
        for action in ON_KEYS:
            name, _, how = action.partition(" ")
            for key, path in KEYS.items():
                expected = name == "GetObject" or key in may.get(action, ())
                if allowed(policies, role, f"s3:{name}", start + path, CONTEXTS[how], prefix) != expected:
                    answers.append((role, action, key))
        lists = role in ("candidate", "collector")
        for name in ON_BUCKET if role != "administrator" else ():
            expected = name in ("ListBucket", "GetBucketLocation") or (name == "ListBucketMultipartUploads" and lists)
            if allowed(policies, role, f"s3:{name}", BUCKET, {}) != expected:
                answers.append((role, name, "bucket"))
    return answers


def test_each_role_may_do_what_it_needs_and_nothing_else() -> None:
    assert wrong(documents(), "team/models") == []


def test_not_even_full_access_lets_a_candidate_promote_or_a_promoter_delete_or_overwrite() -> None:
    policies, record = documents(), f"{BUCKET}/{KEYS['record']}"
    for role in ("candidate", "promoter"):
        policies[role] = [*policies[role], {"actions": ["s3:*"], "resources": ["*"]}]
        assert not allowed(policies, role, "s3:DeleteObject", record, {})
        assert not allowed(policies, role, "s3:PutObject", record, OVERWRITE)
    assert allowed(policies, "promoter", "s3:PutObject", record, CREATE)
    assert not any(allowed(policies, "candidate", "s3:PutObject", record, context) for context in (CREATE, PART, {}))


@pytest.mark.parametrize("role", [*ROLES, "administrator"])
def test_nothing_is_allowed_without_tls(role: str) -> None:
    for action in ("s3:GetObject", "s3:PutObject", "s3:ListBucket"):
        for resource in (BUCKET, f"{BUCKET}/{KEYS['object']}"):
            assert not allowed(documents(), role, action, resource, CREATE | {"aws:SecureTransport": "false"})


def test_with_a_key_every_role_can_decrypt_and_only_writers_encrypt() -> None:
    policies = documents(kms=True)
    able = {name: {a for s in policies[name] for a in s["actions"] if a.startswith("kms:")} for name in ROLES}
    both = {"kms:Decrypt", "kms:GenerateDataKey"}
    assert able == {"reader": {"kms:Decrypt"}, "candidate": both, "promoter": both, "collector": {"kms:Decrypt"}}


def test_the_bucket_is_private_versioned_and_kept() -> None:
    resources = {kind: body["store"] for block in parse("main.tf")["resource"] for kind, body in block.items()}
    assert resources["aws_s3_bucket_versioning"]["versioning_configuration"][0]["status"] == "Enabled"
    block = resources["aws_s3_bucket_public_access_block"]
    assert [block[key] for key in block if key != "bucket"] == [True] * 4
    assert resources["aws_s3_bucket_ownership_controls"]["rule"][0]["object_ownership"] == "BucketOwnerEnforced"
    rules = resources["aws_s3_bucket_lifecycle_configuration"]["rule"]
    assert not [rule for rule in rules if "days" in rule.get("expiration", [{}])[0]]  # nothing current goes
    assert resources["aws_s3_bucket"]["lifecycle"][0]["prevent_destroy"] is True


def test_every_variable_is_defined_and_no_account_or_secret_stands_there() -> None:
    text = "\n".join(path.read_text() for path in FOLDER.glob("*.tf"))
    assert set(re.findall(r"\bvar\.(\w+)", text)) == set(re.findall(r'variable "(\w+)"', text))
    assert not re.search(r"\b\d{12}\b|AKIA|secret", text)
