# Carrara with all it needs, for a head, a worker, a rank or a command; the same image on every node.
#
#   docker build --tag carrara:0.1.0 .                               CUDA: PyTorch's wheels bring their own libraries
#   docker build --tag carrara:0.1.0-cpu --build-arg DEVICE=cpu .
#   docker run --rm --gpus all --shm-size 8g --volume /data:/data carrara:0.1.0 all --config /data/mine.yaml
#
# Dependencies lie in a layer of their own, which is built again only when pyproject.toml or constraints.txt changes.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG DEVICE=cuda
# Some dependencies have no wheel for every Python.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN case "${DEVICE}" in cpu|cuda) ;; *) echo "DEVICE is '${DEVICE}'; it is cpu or cuda" >&2; exit 2 ;; esac \
    && python -m pip install --no-cache-dir --constraint constraints.txt uv \
    && uv venv /opt/carrara
ENV VIRTUAL_ENV=/opt/carrara UV_LINK_MODE=copy
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "${DEVICE}" = cpu ]; then export UV_TORCH_BACKEND=cpu; fi \
    && uv pip install --compile-bytecode --constraint constraints.txt --requirements pyproject.toml \
        --extra s3 --extra gcs --extra azure --extra trackers
COPY README.md LICENSE ./
COPY shards shards
COPY ingest ingest
COPY curate curate
COPY latents latents
COPY train train
COPY eval eval
COPY demo demo
COPY orchestration orchestration
RUN uv pip install --no-deps --compile-bytecode .

FROM python:${PYTHON}-slim-bookworm
# g++ for the setting `compile`, wget for KubeRay's probes, procps for its hook, pdsh and ssh for a hostfile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client pdsh procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 carrara \
    && useradd --uid 1000 --gid 1000 --create-home carrara
COPY --from=build /opt/carrara /opt/carrara
ENV PATH=/opt/carrara/bin:$PATH \
    VIRTUAL_ENV=/opt/carrara \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_JOB_STOP_WAIT_TIME_S=25
USER 1000:1000
WORKDIR /home/carrara
# That the interpreter, the installed version and the names of its packages are in order; Kubernetes has probes instead.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s CMD ["carrara", "--version"]
ENTRYPOINT ["carrara"]
CMD ["--help"]
