"""Creates a stack's bucket, MLflow's user for the workers, the work pools, and the deployments of prefect.yaml.

Existing ones are kept. `worker.sh setup` runs it in a clone of the project, with the servers' addresses in the
environment; it fails if one of them refuses.
"""

import os
import subprocess
import sys

import httpx


def bucket() -> None:
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client("s3")  # address and keys come from boto3's own variables
    try:
        client.head_bucket(Bucket=os.environ["RETUNE_BUCKET"])
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=os.environ["RETUNE_BUCKET"])


def registry_user() -> None:
    """Creates the user as which workers register versions; MLflow's administrator is for people."""
    address, user = os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_TRACKING_USERNAME"]
    body = {"username": user, "password": os.environ["MLFLOW_TRACKING_PASSWORD"]}
    administrator = ("admin", os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])
    answer = httpx.post(f"{address}/api/2.0/mlflow/users/create", json=body, auth=administrator, timeout=60)
    if answer.is_error and "RESOURCE_ALREADY_EXISTS" not in answer.text:
        sys.exit(f"MLflow's user {user} could not be created: status {answer.status_code}: {answer.text}")


if __name__ == "__main__":
    bucket()
    registry_user()
    subprocess.run([sys.executable, "-m", "flows.setup"], check=True)
