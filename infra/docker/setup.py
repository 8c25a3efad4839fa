"""Once for each stack: the bucket, MLflow's user for the workers, the work pools, the deployments of prefect.yaml.

What is there already stays. Run by `worker.sh setup` in a clone of the project, with the addresses of the servers in
the environment; it fails if one of them refuses.
"""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request


def bucket() -> None:
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client("s3")  # address and keys are boto3's own variables
    try:
        client.head_bucket(Bucket=os.environ["RETUNE_BUCKET"])
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=os.environ["RETUNE_BUCKET"])


def registry_user() -> None:
    """Workers register versions as a user of their own; MLflow's administrator is for people."""
    address, user = os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_TRACKING_USERNAME"]
    body = {"username": user, "password": os.environ["MLFLOW_TRACKING_PASSWORD"]}
    credentials = base64.b64encode(f"admin:{os.environ['MLFLOW_AUTH_ADMIN_PASSWORD']}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
    url = f"{address}/api/2.0/mlflow/users/create"
    try:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60).close()
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        if "RESOURCE_ALREADY_EXISTS" not in answer:
            sys.exit(f"MLflow's user {user} could not be made: {error}: {answer}")


if __name__ == "__main__":
    bucket()
    registry_user()
    subprocess.run([sys.executable, "-m", "flows.setup"], check=True)
