# One image for all roles:  docker build -t arcbridge .  &&  docker run --rm arcbridge --version
#
# Made to run without root, without a writable root file system and without capabilities:
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges …
# A relay also needs its data directory on a volume that user 65532 may write.

# By digest: an image that was looked at stays the one that is built on. SECURITY.md says how to check and renew it.
# Behind a mirror:  docker build --build-arg BASE=MIRROR/python:3.13-slim-trixie@sha256:… (the digest is the same there).
ARG BASE=python:3.13-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM ${BASE} AS build
WORKDIR /src
COPY config/locks ./config/locks
# Every file by its hash. Wheels run no code here; nkeys, which is published as source alone, is built by what the build lock names.
RUN python -m venv /opt/tools \
    && /opt/tools/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: -r config/locks/build.txt \
    && /opt/tools/bin/python -m pip wheel --no-cache-dir --require-hashes --only-binary :all: --no-binary nkeys \
        --no-build-isolation --wheel-dir /opt/wheels -r config/locks/runtime.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
# What `config init` writes travels in the wheel.
COPY config/agent-authentication.yaml config/agent.toml config/client.toml ./config/
COPY config/policy.toml config/relay-authentication.yaml config/relay.toml ./config/
COPY config/man ./config/man
COPY arcbridge ./arcbridge
# --without-pip: what installs things has no place in the image that runs. --no-index: nothing comes that is not locked.
RUN /opt/tools/bin/python -m hatchling build --directory /opt/wheels --target wheel \
    && python -m venv --without-pip /opt/arcbridge \
    && python -m pip --python /opt/arcbridge/bin/python install --no-cache-dir --no-compile \
        --no-index --find-links /opt/wheels "arcbridge[cel,fleet,truststore]" \
    # Compiled here, because nothing can be written later; by hash, so that timestamps do not matter.
    && /opt/arcbridge/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/arcbridge/lib

FROM ${BASE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="arcbridge" \
      org.opencontainers.image.description="kubectl access to Kubernetes clusters behind firewalls, through a blind relay" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/arcbridge /opt/arcbridge
# Safe path: a file in the working directory can never be imported. The interpreter's own settings, nothing of ours.
# The allocator's thresholds are what every role sets at its start, said here too for whatever else runs in the image.
ENV PATH=/opt/arcbridge/bin:$PATH \
    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1
# A number, so that Kubernetes can see that it is not root. No entry in /etc/passwd is needed.
USER 65532:65532
WORKDIR /
# No HEALTHCHECK: orchestrators probe /livez and /readyz on the role's own listener.
ENTRYPOINT ["/opt/arcbridge/bin/arcbridge"]
CMD ["--help"]
