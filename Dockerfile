# syntax=docker/dockerfile:1

FROM python:3.13-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements.lock requirements.run.lock ./
# What runs stands in requirements.run.lock; setuptools, which only builds, comes out of the larger lock.
RUN python -m venv /opt/penstock \
    && /opt/penstock/bin/pip install --require-hashes -r requirements.run.lock \
    && sed -n '/^setuptools==/,/[^\\]$/p' requirements.lock > requirements.build.lock \
    && pip install --require-hashes -r requirements.build.lock
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/penstock/bin/pip install --no-deps --no-index wheels/*.whl \
    && /opt/penstock/bin/pip uninstall --yes pip \
    && python -m compileall -q /opt/penstock

FROM python:3.13-slim
COPY --from=build /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A number, so that "must not run as root" can be checked without a user list. Files and batches are kept in a volume, if
# there is one: mount it here, and set PENSTOCK_STATE__PATH.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/penstock
USER 10001:10001
WORKDIR /
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
admin = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PENSTOCK_SERVER__ADMIN_PORT', 8081)), timeout=2); \
admin.request('GET', '/readyz'); \
sys.exit(admin.getresponse().status != 200)"]
ENTRYPOINT ["penstock"]
CMD ["serve"]
