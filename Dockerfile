# syntax=docker/dockerfile:1
# CPU by default:   docker build -t loramux .
# For GPUs:         docker build -t loramux:cuda --build-arg EXTRAS=cuda --build-arg TORCH_INDEX= .
#
# TORCH_INDEX is the package index for torch, for example the one of its CPU builds. If it is empty, torch comes from
# pip's default index; that build includes the CUDA libraries.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRAS=
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/loramux
ENV PATH=/opt/loramux/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" torch; fi
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY adapters adapters
COPY benchmarks benchmarks
COPY server server
RUN pip install ".[hub${EXTRAS:+,$EXTRAS}]"

FROM python:${PYTHON}-slim
ARG EXTRAS=
# Triton compiles its launchers with a C compiler when a kernel is first used.
RUN case ",$EXTRAS," in *,cuda,*) \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*;; esac
# The home directory is readable for other users, so that `docker run --user` works.
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/loramux loramux && chmod 755 /var/lib/loramux
COPY --from=build /opt/loramux /opt/loramux
# HF_HOME is in the state directory, because Compose mounts the rest of the file system read-only.
ENV PATH=/opt/loramux/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LORAMUX_STATE_DIR=/var/lib/loramux/data LORAMUX_HOST=0.0.0.0 HF_HOME=/var/lib/loramux/data/cache/huggingface
USER 10001
WORKDIR /var/lib/loramux
RUN mkdir data
VOLUME /var/lib/loramux/data
EXPOSE 8000
STOPSIGNAL SIGTERM
# The check ignores proxies. Kubernetes may set LORAMUX_PORT to tcp://... for a Service named loramux; that is ignored.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import os; from urllib.request import ProxyHandler, build_opener; \
port = os.environ.get('LORAMUX_PORT', ''); url = 'http://127.0.0.1:' + (port if port.isdigit() else '8000'); \
build_opener(ProxyHandler({})).open(url + '/health/ready', timeout=2)"]
# The server listens on all addresses of the container, so it requires keys (LORAMUX_API_KEYS or
# LORAMUX_API_KEYS_FILE) or LORAMUX_INSECURE=1.
ENTRYPOINT ["loramux"]
CMD ["serve"]
