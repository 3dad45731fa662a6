# The container image `peermem`: the daemon, its tool and the Python client, on Debian 13 (trixie).
#
# * Python, pyverbs, libibverbs and the NICs' provider libraries are the distribution's, of one release: pyverbs fits
#   no other libibverbs. The rest are the releases of requirements/image.txt, by hash, as wheels: nothing is compiled.
# * The last stage has no compiler, no pip and no program that gives its caller other rights.
# * It runs as a user without rights, and serves its own host and nobody else, until a configuration says more. RDMA
#   needs locked memory and /dev/infiniband: deploy/k8s and deploy/README.md say what to give it.
# * There is no HEALTHCHECK: Kubernetes ignores it and asks /healthz and /readyz itself, and the image has no curl.
#
# `make image` builds it. Where the network has an index or authorities of its own, set PIP_INDEX_URL and PIP_CERT as for
# pip itself: `make image` hands them in, the latter as a secret. BASE names another place to take Debian from.

ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_CERT
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-hatchling python3-pip
COPY requirements/image.txt /build/requirements/
RUN --mount=type=secret,id=authorities,target=/run/authorities.pem \
    pip3 install --no-warn-script-location --root /out --ignore-installed --no-deps --no-compile --require-hashes \
        --only-binary :all: --requirement /build/requirements/image.txt
COPY pyproject.toml README.md LICENSE /build/
COPY service /build/service
RUN pip3 install --no-warn-script-location --root /out --no-deps --no-compile --no-index --no-build-isolation /build \
    && python3 -m compileall -q --invalidation-mode unchecked-hash -s /out /out/usr/local/lib

FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="peermem" \
    org.opencontainers.image.description="A node daemon that makes device BAR memory reachable over RDMA and moves bytes between nodes" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="docker.io/library/debian:trixie-slim"
# python3-pyverbs wants rdma-core, whose services are the host's affair; with the udev and systemd that it wants in its
# turn it is a quarter of what this stage adds.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates ibverbs-providers python3 python3-pyverbs \
    && dpkg --purge --force-depends rdma-core udev systemd libsystemd-shared libapparmor1 libkmod2 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 7470 peermem \
    && useradd --uid 7470 --gid 7470 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin peermem \
    && install --directory --owner peermem --group peermem /run/peermem \
    && install --directory /etc/peermem
COPY --from=build /out/usr/local/lib /usr/local/lib
COPY --from=build /out/usr/local/bin/peermemd /out/usr/local/bin/peermemctl /usr/local/bin/
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 7470:7470
EXPOSE 7470 7471 7472
ENTRYPOINT ["/usr/local/bin/peermemd"]
