# syntax=docker/dockerfile:1
# Two images: `producer` for services and tools, `worker` for a GPU.
#   docker build --target producer -t blipq .
#   docker build --target worker -t blipq-worker .

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY producer producer
COPY worker worker
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS producer
ENV PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 blipq
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt /wheels/blipq-*.whl
USER blipq
CMD ["blipq", "--help"]

# PyPI's torch for Linux brings CUDA along; the host gives the driver.
FROM python:3.11-slim AS worker
ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/weights \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 blipq && install --directory --owner=blipq /weights
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel="$(ls /wheels/blipq-*.whl)" && \
    pip install --no-cache-dir -c /tmp/constraints.txt "blipq[worker] @ file://$wheel"
USER blipq
VOLUME /weights
# Exec form: SIGTERM reaches the worker, which drains. Stop with a grace above the drain.
CMD ["blipq", "worker"]
