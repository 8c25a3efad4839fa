# A worker for the pool cpu. Build it in the project's folder: `docker build -f infra/docker/cpu.Dockerfile .`
# TORCH_INDEX: an index of PyTorch's CPU builds. Without it, pip installs the CUDA build, which is 3 GB larger.
ARG PYTHON_VERSION=3.11.14

FROM python:${PYTHON_VERSION}-slim-bookworm AS environment
ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The clone will be here; the editable install points to it.
WORKDIR /srv/retune
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.lock ./
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.lock)"; \
    fi \
    && pip install --no-cache-dir -r requirements.lock
COPY pyproject.toml README.md ./
COPY pipeline pipeline
COPY flows flows
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && pip check

FROM python:${PYTHON_VERSION}-slim-bookworm
# git, ca-certificates and tini are not pinned, because the distribution removes superseded versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y ca-certificates git tini \
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
    RETUNE_POOL=cpu \
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
CMD ["cpu"]
