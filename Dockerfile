# One image with everything: `docker run -p 8080:8080 -v meshboard:/data meshboard` starts the whole mesh.
# A single service instead: `docker run meshboard .venv/bin/python -m services.user_svc`, with its settings in the
# environment (docs/deployment.md).
FROM python:3.13-slim-bookworm
RUN useradd --create-home --uid 10001 meshboard && install -d -o meshboard /app /data
USER meshboard
WORKDIR /app
COPY --chown=meshboard pyproject.toml uv.lock dev README.md LICENSE ./
COPY --chown=meshboard gen gen
COPY --chown=meshboard services services
COPY --chown=meshboard cli cli
COPY --chown=meshboard edge edge
COPY --chown=meshboard examples examples
# Finds no uv, installs it from PyPI, and syncs what uv.lock says.
RUN ./dev --help >/dev/null
ENV MESHBOARD_DATA=/data PYTHONUNBUFFERED=1
EXPOSE 8080
VOLUME /data
CMD ["./dev", "up", "--host", "0.0.0.0"]
