#!/bin/sh
# Entry point of Retune's containers: clones the project into RETUNE_ROOT, then does what the arguments say.
#   worker.sh cpu|gpu [OPTION…]   run a worker of that pool
#   worker.sh setup               create bucket, registry user, work pools and deployments, once
#   worker.sh COMMAND…            anything else, such as a flow run on Kubernetes
set -eu
: "${RETUNE_ROOT:?is the folder of the clone}" "${RETUNE_GIT_URL:?is where the project is cloned from}"
branch="${RETUNE_GIT_BRANCH:-main}"
mkdir -p "$RETUNE_ROOT" "$HOME"     # on Kubernetes both are on one volume
cd "$RETUNE_ROOT"

# Not `git clone`: the folder may contain an interrupted clone.
if ! git rev-parse --quiet --verify HEAD > /dev/null 2>&1; then
    git init --quiet .
    git remote remove origin 2> /dev/null || true
    git remote add origin "$RETUNE_GIT_URL"
    git fetch --quiet origin
    git checkout --quiet --force -B "$branch" --track "origin/$branch"
fi

# Outputs go through the team's DVC remote; config.local is never committed.
if [ -n "${RETUNE_DVC_REMOTE:-}" ]; then
    {
        printf '[core]\n    remote = team\n'
        printf "['remote \"team\"']\n    url = %s\n" "$RETUNE_DVC_REMOTE"
        [ -z "${AWS_ENDPOINT_URL_S3:-}" ] || printf '    endpointurl = %s\n' "$AWS_ENDPOINT_URL_S3"
    } > .dvc/config.local
fi

# A training worker checks out what each run sends, so its working tree may be overwritten.
[ "${RETUNE_POOL:-}" != gpu ] || git config retune.worker true

case "${1:-}" in
cpu | gpu)
    pool="$1"
    shift
    exec prefect worker start --pool "$pool" --type process --name "$pool-$(hostname)" --with-healthcheck "$@"
    ;;
setup) exec python /opt/retune/setup.py ;;
*) exec "$@" ;;
esac
