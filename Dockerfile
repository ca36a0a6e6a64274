# syntax=docker/dockerfile:1
# Targets:
#   serve-cpu   serves and watches on the CPU; no torch, so it adapts nothing, and says so
#   serve-gpu   the same on NVIDIA GPUs: with CUDA's libraries
#   full        serves, watches and adapts, on GPUs where there are some; the default
# BASE is any Debian-based image with Python 3.11 or later and its venv module. `deploy/build.sh` builds without a docker
# engine, and without any image to start from.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tta" \
      org.opencontainers.image.description="Continual test-time adaptation daemon for vision classifiers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    ORT_DISABLE_TELEMETRY=1 \
    PATH=/opt/venv/bin:$PATH
RUN useradd --uid 10001 --create-home tta && mkdir /state /models && chown tta /state && python3 -m venv /opt/venv
WORKDIR /opt/tta
# What tta needs comes first, by a package of that name with nothing in it: a change of the code leaves that layer alone.
COPY pyproject.toml README.md LICENSE deploy/constraints.txt ./
RUN mkdir tta && echo '__version__ = "0"' > tta/__init__.py
VOLUME /state
EXPOSE 5555 5556 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tta"]
CMD ["serve", "--config", "/etc/tta/docker.yaml", "--deploy"]

FROM base AS serve-cpu
RUN pip install -c constraints.txt '.[serve-cpu]'
COPY configs /etc/tta
COPY tta ./tta
RUN pip install --no-deps --force-reinstall .
USER tta

FROM base AS serve-gpu
RUN pip install -c constraints.txt '.[serve]' 'onnxruntime-gpu[cuda,cudnn]'
COPY configs /etc/tta
COPY tta ./tta
RUN pip install --no-deps --force-reinstall .
USER tta

FROM base AS full
RUN pip install -c constraints.txt '.[serve,adapt]'
COPY configs /etc/tta
COPY tta ./tta
RUN pip install --no-deps --force-reinstall .
USER tta
