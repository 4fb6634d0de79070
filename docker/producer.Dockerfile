# The light image: submit, dispatcher, Flower, database migrations. No torch.
#
#   docker build -f docker/producer.Dockerfile -t codeherd-producer .
#
# Any image with `python3` (3.11 or later) and its `venv` module can be the base.
ARG BASE=python:3.11-slim-bookworm

# Dependencies only, so that a change of our own code does not touch the large layer.
FROM ${BASE} AS dependencies
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# Two environments: pip's own stays here, the one that is shipped holds no pip.
RUN python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/codeherd \
    && python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['monitor'], sep='\n')" > requirements.txt
# A pip configuration (a mirror, a certificate) may be lent as a secret; it never enters a layer.
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
LABEL org.opencontainers.image.title="codeherd-producer" \
      org.opencontainers.image.description="Submits code generation jobs, hands them to workers, shows them in Flower" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 codeherd \
    && useradd --uid 10001 --gid codeherd --no-log-init --create-home --shell /usr/sbin/nologin codeherd \
    && install --directory --owner codeherd --group codeherd /var/lib/codeherd
COPY --from=dependencies /opt/codeherd /opt/codeherd
COPY --from=package /package /
ENV PATH=/opt/codeherd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CODEHERD_DATA_DIR=/var/lib/codeherd
USER 10001:10001
WORKDIR /var/lib/codeherd
STOPSIGNAL SIGTERM
# Live, not ready: some who run images restart what is unhealthy, and a broker that is away is no reason.
# compose.yaml asks Flower something else.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 \
    CMD ["codeherd", "health", "dispatcher", "--live"]
ENTRYPOINT ["codeherd"]
CMD ["--help"]
