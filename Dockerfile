# chitu in a container, on a CPU:   docker build -t chitu .
#                      on GPUs:     docker build -t chitu --build-arg TORCH=cuda .
# docker run --rm -v chitu-cache:/cache -v "$PWD:/videos" chitu generate "A cat walking on grass" -o cat.mp4
# docker run --rm -p 127.0.0.1:8000:8000 -v chitu-data:/data -v "$PWD/keys:/keys:ro" chitu serve --host 0.0.0.0 \
#   --data /data --key-file /keys            (a key a line, ck_...; several machines: deploy/)
# (with --gpus all for GPUs; with --user "$(id -u)" where the folder is not of user 1000)
FROM python:3.11-slim AS build
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/chitu
WORKDIR /src
COPY constraints.txt ./
RUN case "$TORCH" in \
        cpu) index="--index-url https://download.pytorch.org/whl/cpu" ;; \
        cuda) index= ;; \
        *) echo "TORCH=$TORCH: use cpu or cuda" >&2; exit 1 ;; \
    esac && \
    /opt/chitu/bin/pip install --no-deps $index "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY chitu_diffusion chitu_diffusion
RUN /opt/chitu/bin/pip install ".[serve,postgres]" -c constraints.txt

FROM python:3.11-slim
ARG TORCH=cpu
# Triton builds its kernels' launchers with a C compiler when they first run.
RUN if [ "$TORCH" = cuda ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 1000 --create-home chitu && \
    mkdir /cache /data /videos && \
    chown chitu /cache /data /videos && \
    chmod 1777 /cache /data /videos
COPY --from=build /opt/chitu /opt/chitu
ENV PATH=/opt/chitu/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton
USER chitu
VOLUME /cache
WORKDIR /videos
ENTRYPOINT ["chitu"]
CMD ["--help"]
