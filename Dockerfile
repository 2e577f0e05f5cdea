# syntax=docker/dockerfile:1
# Three images: `producer` for services and the HTTP door, `datasets` for tools, `worker` for a GPU.
#   docker build --target producer -t blipq .
#   docker build --target datasets -t blipq-tools .
#   docker build --target worker -t blipq-worker .

FROM python:3.11-slim AS wheels
WORKDIR /source
COPY producer producer
COPY api api
COPY worker worker
COPY datasets datasets
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./producer ./api ./worker ./datasets

FROM python:3.11-slim AS producer
ENV PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 blipq && \
    install --directory --owner=blipq --mode=0700 /keys
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt \
    "$(echo /wheels/blipq-*.whl)[otel]" /wheels/blipq_api-*.whl
USER blipq
CMD ["blipq", "--help"]

# Whoever submits whole datasets: what reads and writes them, and draws reports, is not for services.
FROM producer AS datasets
USER root
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt \
    "$(echo /wheels/blipq-*.whl)[otel,search]" /wheels/blipq_datasets-*.whl
USER blipq
CMD ["blipq", "bulk", "--help"]

# PyPI's torch for Linux brings CUDA along; the host gives the driver. All wheels are named, so
# that pip looks for none of ours on a package index.
FROM python:3.11-slim AS worker
ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/weights \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 blipq && install --directory --owner=blipq /weights
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt \
    /wheels/blipq-*.whl /wheels/blipq_worker-*.whl
USER blipq
VOLUME /weights
# Exec form: SIGTERM reaches the worker, which drains. Stop with a grace above the drain.
CMD ["blipq", "worker"]
