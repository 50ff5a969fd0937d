"""
The server behind the page: it hands out pairs and stores keys. It listens on 127.0.0.1 only.

Other programs and other web pages on the same machine can reach this address, too. So:

- The address that a person opens ends in #TOKEN. A browser never sends what stands behind the #.
  The page's script reads it, and swaps it for a cookie that no script can read (HttpOnly) and that
  no other site's page can use (SameSite=Strict). Without this cookie, there are no data.
- A request whose Host or Origin is not this server's is refused. This keeps out other sites, and
  names that somebody lets point to 127.0.0.1 (DNS rebinding).
- What changes something is a POST of JSON, which no HTML form can send.
- The page may load nothing, run no script but its own, and may not be shown within another page
  (Content-Security-Policy).

Routes: GET / is the page. POST /session swaps the token for the cookie. GET /state is what the page
shows. POST /keys and POST /prompts store what a person did, and answer when it is on the disk.
"""

import hashlib
import hmac
import json
import logging
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from store import Refused, Store, StoreError, is_pair_number

logger = logging.getLogger("mingpt.chat")

PAGE = Path(__file__).with_name("page.html")
ADDRESS = "127.0.0.1"
LARGEST_BODY = 64 * 1024  # bytes
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Refusal(Exception):
    """A request that is answered with an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


class Routes:
    """What is answered, path by path.

    describe: gives what the page shows, as a dict that becomes JSON; its argument is the number of
    the pair that the page is showing, or None. who: is kept with each key. wake: is called when
    something was stored, so that the next pair can be sampled. may_write: whether answers and
    prompts of a person are taken.
    """

    def __init__(
        self,
        store: Store,
        describe: Callable[[int | None], dict[str, Any]],
        port: int,
        who: str,
        wake: Callable[[], None] = lambda: None,
        may_write: bool = True,
    ):
        self.store = store
        self.describe = describe
        self.port = port
        self.who = who
        self.wake = wake
        self.may_write = may_write

    def app(self) -> "Guard":
        """The web application."""
        routes = [
            Route("/", self.page),
            Route("/session", self.session, methods=["POST"]),
            Route("/state", self.state),
            Route("/keys", self.keys, methods=["POST"]),
            Route("/prompts", self.prompts, methods=["POST"]),
        ]
        return Guard(Starlette(routes=routes, exception_handlers=HANDLERS), self.store, self.port)

    async def page(self, request: Request) -> Response:
        """The page, which holds nothing but itself."""
        nonce = secrets.token_urlsafe(16)
        html = PAGE.read_text(encoding="utf-8").replace('nonce="NONCE"', f'nonce="{nonce}"')
        policy = POLICY.format(nonce=nonce)
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def session(self, request: Request) -> Response:
        """Swap the token for the cookie."""
        body = await read_json_body(request)
        token = token_of(self.store)
        if not hmac.compare_digest(text_field(body, "token").encode(), token.encode()):
            raise Refusal(403, "this is not the address that the terminal shows: open that one")
        response = JSONResponse({"ok": True})
        response.set_cookie(
            cookie_name(self.port),
            cookie_value(token),
            httponly=True,
            samesite="strict",
            path="/",
        )
        return response

    async def state(self, request: Request) -> Response:
        """What the page shows."""
        shown = request.query_params.get("pair", "")
        return await self.answer(int(shown) if shown.isdecimal() and len(shown) < 16 else None)

    async def keys(self, request: Request) -> Response:
        """Store a key."""
        body = await read_json_body(request)
        pressed = {name: body.get(name) for name in ("id", "pair", "choice", "better")}
        if pressed["choice"] == "better":
            self.check_writing()
        pair = await run_in_threadpool(lambda: self.store.press(who=self.who, **pressed))
        self.wake()
        # After an undo, its pair is what the page should show.
        return await self.answer(pair if pressed["choice"] == "undo" else None)

    async def prompts(self, request: Request) -> Response:
        """Store a prompt."""
        body = await read_json_body(request)
        self.check_writing()
        await run_in_threadpool(self.store.add_prompt, body.get("id"), body.get("prompt"))
        self.wake()
        # What the person is reading stays on the page.
        shown = body.get("pair")
        return await self.answer(shown if is_pair_number(shown) else None)

    def check_writing(self) -> None:
        """Raise Refusal where the person may only choose."""
        if not self.may_write:
            raise Refusal(400, "here answers are only compared: nothing can be written")

    async def answer(self, shown: int | None) -> Response:
        """What the page shows from now on."""
        return JSONResponse(await run_in_threadpool(self.describe, shown))


# --------------------------------------------------------------------------------------------------
# What is refused


class Guard:
    """Lets through only what comes from the page itself, and adds headers to each answer."""

    def __init__(self, app: Any, store: Store, port: int):
        self.app = app
        self.store = store
        self.port = port
        self.host = f"{ADDRESS}:{port}"

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer one request, as the protocol ASGI has it."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(Request(scope))
        except Refusal as refusal:
            await as_response(refusal.status, refusal.message)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def check(self, request: Request) -> None:
        """Raise Refusal for a request that does not come from the page."""
        headers = request.headers
        if headers.getlist("host") != [self.host]:
            raise Refusal(421, f"the Host must be {self.host}: open the address in the terminal")
        # Browsers send the Origin with each POST, and with each request to another site.
        origins = headers.getlist("origin")
        if origins not in ([], [f"http://{self.host}"]):
            raise Refusal(403, "a request of another Origin is refused")
        # The page itself holds no data: it may be opened by a link, from a file for example.
        is_page = request.method == "GET" and request.url.path == "/"
        site = headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") and not is_page:
            raise Refusal(403, "a request of another site is refused")
        if request.method == "POST":
            if not origins:
                raise Refusal(403, "a POST must name its Origin")
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refusal(415, "a POST must be application/json")
        # The page's script has yet to get the cookie.
        if not is_page and request.url.path != "/session":
            self.check_cookie(request)

    def check_cookie(self, request: Request) -> None:
        """Raise Refusal without the right cookie."""
        wanted = cookie_value(token_of(self.store))
        cookie = request.cookies.get(cookie_name(self.port), "")
        if not hmac.compare_digest(cookie.encode(), wanted.encode()):
            raise Refusal(401, "open the address that the terminal shows")


def token_of(store: Store) -> str:
    """The token that `listen` has made. Refusal without one: an empty token would let all in."""
    token = store.remembered("token")
    if not token:
        raise Refusal(403, "the server has no token: start it again")
    return token


def cookie_name(port: int) -> str:
    """Cookies of 127.0.0.1 belong to all its ports, so the name says which one is meant."""
    return f"minrlhf_chat_{port}"


def cookie_value(token: str) -> str:
    """Follows from the token, so that the cookie is still good when the server is restarted."""
    return hashlib.sha256(f"cookie of {token}".encode()).hexdigest()


async def read_json_body(request: Request) -> dict[str, Any]:
    """The JSON object in a request. Raises Refusal for anything else."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise Refusal(413, f"a request may have {LARGEST_BODY} bytes")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refusal(400, "the request must be a JSON object")
    return value


def text_field(body: dict[str, Any], name: str) -> str:
    """A text in a request."""
    value = body.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise Refusal(400, f"the request must have {name!r} as text")
    return value


def as_response(status: int, message: str) -> JSONResponse:
    """An error, as the page reads it."""
    return JSONResponse({"error": message}, status_code=status)


async def refuse(request: Request, error: Exception) -> Response:
    """What was refused is never tried again by the page."""
    status = error.status if isinstance(error, Refusal) else 409
    return as_response(status, str(error))


async def fail(request: Request, error: Exception) -> Response:
    """What could not be stored is sent again by the page, until it can."""
    logger.error("%s", error)
    return as_response(507, str(error))


HANDLERS: Any = {Refusal: refuse, Refused: refuse, StoreError: fail}


# --------------------------------------------------------------------------------------------------
# Listening


def listen(store: Store, port: int = 0) -> socket.socket:
    """A socket on 127.0.0.1, bound to the port: 0 means the one of last time, or any free one.

    The port and the token are remembered, so that a page that is open goes on working when the
    server is started again. ValueError if the port is not free.
    """
    remembered = int(store.remembered("port") or 0)
    wanted = port or remembered
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if sys.platform != "win32":  # there it would let two servers have the same port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, wanted))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"port {wanted} of {ADDRESS} cannot be had ({error}). Does label.py run in another "
            "terminal? Stop it there, or give another --port"
        ) from None
    token = store.remembered("token") or secrets.token_urlsafe(32)
    store.remember(port=str(listener.getsockname()[1]), token=token)
    return listener


def address(store: Store) -> str:
    """What a person opens in the browser."""
    return f"http://{ADDRESS}:{store.remembered('port')}/#{store.remembered('token')}"


def serve(app: Guard, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])
