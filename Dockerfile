# syntax=docker/dockerfile:1
# Targets: `serve` (no torch: watches, serves, recalls; cannot adapt) and `full` (with the adapter; the default).
# BASE is any Debian-based Python 3.11 or later.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1
RUN useradd --create-home --uid 10001 tta && mkdir -p /state /models && chown tta /state
WORKDIR /opt/tta

FROM base AS serve
COPY pyproject.toml README.md LICENSE ./
COPY tta ./tta
RUN pip install '.[serve]'
COPY configs /etc/tta
USER tta
VOLUME /state
EXPOSE 5555 5556 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/readyz', timeout=2)"
STOPSIGNAL SIGTERM
ENTRYPOINT ["tta"]
CMD ["serve", "--config", "/etc/tta/docker.yaml"]

FROM serve AS full
USER root
RUN pip install '.[serve,adapt]'
USER tta
