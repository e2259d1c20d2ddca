# stepfold with CUDA: docker build -t stepfold . && docker run --gpus all -v "$PWD:/workspace" stepfold doctor ./my-sana
# torch from pip's default index brings CUDA's libraries along; the host needs only the driver and the NVIDIA container toolkit.
FROM python:3.12-slim-bookworm

# a compiler and headers for training.compile
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt /opt/stepfold/
RUN pip install --no-cache-dir -c /opt/stepfold/constraints.txt torch==2.13.0
COPY . /opt/stepfold
RUN pip install --no-cache-dir -c /opt/stepfold/constraints.txt "/opt/stepfold[lora,images,web,prompts]" \
    && useradd --create-home --uid 1000 stepfold

# no root; what a run writes belongs to whoever is named here: docker run --user "$(id -u):$(id -g)"
USER 1000
ENV HF_HOME=/workspace/.cache/huggingface
WORKDIR /workspace
ENTRYPOINT ["stepfold"]
CMD ["--help"]
