# The worker image: one process per GPU, each holding one Code Llama.
#
#   docker build -f docker/worker.Dockerfile -t codeherd-worker .
#
# The CUDA libraries come with torch's wheel, so the base needs no CUDA, only `python3` (3.11 or later)
# and its `venv` module. The host brings the driver (NVIDIA Container Toolkit).
ARG BASE=python:3.11-slim-bookworm

# Dependencies only, so that a change of our own code does not touch the layer of several gigabytes.
FROM ${BASE} AS dependencies
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# Two environments: pip's own stays here, the one that is shipped holds no pip.
RUN python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/codeherd \
    && python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['worker'], sep='\n')" > requirements.txt
# A pip configuration (a mirror, a certificate, another torch) may be lent as a secret; it never enters a layer.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/codeherd/bin/python install --no-cache-dir \
    --requirement requirements.txt --constraint constraints.txt

FROM dependencies AS package
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/pip/bin/pip wheel --no-cache-dir --no-deps --wheel-dir wheels . \
    && /opt/pip/bin/pip --python /opt/codeherd/bin/python install --no-cache-dir \
    --no-deps --no-index --root /package wheels/*.whl

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="codeherd-worker" \
      org.opencontainers.image.description="Runs Code Llama jobs, one process per GPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 codeherd \
    && useradd --uid 10001 --gid codeherd --no-log-init --create-home --shell /usr/sbin/nologin codeherd \
    && install --directory --owner codeherd --group codeherd /var/lib/codeherd /models
COPY --from=dependencies /opt/codeherd /opt/codeherd
COPY --from=package /package /
# The hub's cache lies on a volume that a worker only reads; caches that libraries want to write go to /tmp.
ENV PATH=/opt/codeherd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_CACHE=/models \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/tmp/cache \
    CODEHERD_DATA_DIR=/var/lib/codeherd
VOLUME /models
USER 10001:10001
WORKDIR /var/lib/codeherd
STOPSIGNAL SIGTERM
# Live, not ready: some who run images restart what is unhealthy, and a broker that is away is no reason.
HEALTHCHECK --interval=30s --timeout=20s --start-period=30m --retries=3 \
    CMD ["codeherd", "health", "worker", "--live"]
ENTRYPOINT ["codeherd"]
CMD ["worker"]
