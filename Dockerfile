# JupyterLab on the tour, with the environment of `make study`: docker build -t asap . &&
# docker run -p 8888:8888 asap
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 asap
USER asap
WORKDIR /home/asap/asap
COPY --chown=asap . .
RUN make .venv/done
ENV PATH=/home/asap/asap/.venv/bin:$PATH
EXPOSE 8888
CMD ["jupyter", "lab", "nbs/000_tour.ipynb", "--ip=0.0.0.0", "--no-browser"]
