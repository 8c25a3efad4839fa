# A worker for the pool gpu. Build it in the project's folder: `docker build -f infra/docker/gpu.Dockerfile .`
# cuda.lock pins each CUDA library; the driver comes from the machine through NVIDIA's container runtime. An nvidia/cuda
# base image would add a second set of the same libraries, which torch does not load.
ARG PYTHON_VERSION=3.11.14

FROM python:${PYTHON_VERSION}-slim-bookworm AS environment
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The clone will be here; the editable install points to it.
WORKDIR /srv/retune
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.lock infra/docker/cuda.lock ./
RUN pip install --no-cache-dir -r requirements.lock -r cuda.lock
COPY pyproject.toml README.md ./
COPY pipeline pipeline
COPY flows flows
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && pip check

FROM python:${PYTHON_VERSION}-slim-bookworm
# These packages are not pinned, because the distribution removes superseded versions. Triton needs the C compiler to
# build the launchers of Liger's kernels when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y ca-certificates gcc git libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home --home-dir /home/retune retune \
    && install -d -o retune -g retune /srv/retune
COPY --from=environment /opt/venv /opt/venv
COPY infra/docker/with_secrets.py infra/docker/worker.sh infra/docker/git-askpass.sh infra/docker/setup.py /opt/retune/
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RETUNE_ROOT=/srv/retune \
    PYTHONPATH=/srv/retune \
    RETUNE_POOL=gpu \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0" \
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=true \
    GIT_ASKPASS=/opt/retune/git-askpass.sh \
    GIT_TERMINAL_PROMPT=0 \
    GIT_CONFIG_COUNT=1 \
    GIT_CONFIG_KEY_0=safe.directory \
    GIT_CONFIG_VALUE_0=/srv/retune
WORKDIR /srv/retune
USER 10001:10001
VOLUME ["/srv/retune", "/home/retune"]
# The worker's own server answers 503 if the worker has not polled for too long.
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
ENTRYPOINT ["tini", "-g", "--", "python", "/opt/retune/with_secrets.py", "--", "/opt/retune/worker.sh"]
CMD ["gpu"]
