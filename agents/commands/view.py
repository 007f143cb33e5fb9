"""`view`: the page of a run, opened in a browser."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import tyro

from agents.reporting.viewer import read_report, render_page, write_page
from textenv.training.files import is_locked

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How the page of a run is shown."""

    port: int = 0  # of a run that goes on, on this machine; 0: any that is free
    browser: bool = True  # open it in a browser

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must lie in [0, 65535], got {self.port}.")


DEFAULT = ViewConfig()


def view_command(
    folder: Annotated[Path, tyro.conf.arg(name="run")], config: tyro.conf.OmitArgPrefixes[ViewConfig] = DEFAULT
) -> None:
    """Look at a run: learning curves, alarms, and every token of its responses.

    A finished run has its page in report.html, which this opens. The page of a run that goes on is served on this
    machine alone, and refreshes, until the command is stopped with Ctrl-C.

    Args:
        folder: Run folder written by `train`.
        config: How it is shown.
    """
    report = read_report(folder, running=False)
    if report.summary is None and is_locked(folder):
        serve(folder, config)
        return
    try:
        path = write_page(folder, report)
    except OSError as error:
        raise ValueError(f"the page of {str(folder)!r} cannot be written: {error.strerror}.") from error
    print(f"the page of the run: {path}")
    if config.browser:
        webbrowser.open(path.absolute().as_uri())


def serve(folder: Path, config: ViewConfig) -> None:
    """Serve the page of a run that goes on until Ctrl-C. Raises ValueError if the port is not free."""
    try:
        server = ThreadingHTTPServer((HOST, config.port), partial(PageHandler, folder))
    except OSError as error:
        raise ValueError(f"port {config.port} cannot be used ({error.strerror}); choose another --port.") from error
    address = f"http://{HOST}:{server.server_port}/"
    with server:
        print(f"the run goes on; its page, which refreshes: {address} (Ctrl-C ends this)", flush=True)
        if config.browser:
            webbrowser.open(address)
        server.serve_forever()


class PageHandler(BaseHTTPRequestHandler):
    """Answers with the page of a run as it is now, and with nothing else."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def handle(self) -> None:
        """Answer, or end without a word where the browser has gone away."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """The page, for requests to this machine by its own name: other names are those of other people's pages."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if self.path != "/" or host not in NAMES:
            self.send_error(404)
            return
        page = render_page(read_report(self.folder, running=is_locked(self.folder)))
        self.send_response(200)
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(page))}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing of single requests."""
