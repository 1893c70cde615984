# dnpo in a container, by the two commands of the README. It is linted and compared with the README by a test, but NOT
# BUILT there: build it once before you rely on it.
#
#   docker build -t dnpo .
#   docker run --rm -v "$PWD/runs:/runs" dnpo                       # the main job; its files are in runs/
#   docker run --rm -v "$PWD/runs:/runs" dnpo dnpo train method=spin
#   docker run --rm -w /dnpo dnpo python -m pytest                  # the tests
#
# For GPUs add `--gpus all` to docker run.
FROM python:3.11-slim-bookworm

WORKDIR /dnpo
COPY . .
RUN python -m pip install --no-cache-dir -c constraints.txt -e ".[dev]"

# Runs write into the current folder.
WORKDIR /runs
CMD ["python", "-m", "dnpo.train"]
