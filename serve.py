"""The page of search.py: the HTML of results, and a server of it for this computer alone.

    /?q=TEXT                       pictures for a text
    /like/N                        pictures that are like picture N
    /look/N?q=TEXT                 picture N, and which parts of it speak for the text
    /picture/N                     picture N itself
    /cosine/N?q=  /attention/N?q=  the same, darkened where that map of evaluate.py is low

The server reads and never writes. A picture has a number, so no path comes from outside. It listens
on 127.0.0.1 and answers requests that name it by this address or localhost: another site's name
that leads here (DNS rebinding) is refused, and another site's page may not show the pictures.
"""
import base64
import functools
import html
import http.server
import io
import re
import sys
import threading
import urllib.parse

from formats.records import BadRecord, printable, reason

SIZE = 640                                      # pixels of a picture's longer side
LONGEST = 1000                                  # characters of a query
TOP = 24                                        # pictures on a page
ADDRESS = re.compile("/(?:(like|look|picture|cosine|attention)/([0-9]{1,9}))?")
MAPS = {"cosine": "Parts of the score: how much of the cosine comes from each patch.",
        "attention": "Fusion encoder: what its answer that both belong together owes to each patch "
                     "(cross-attention, times its gradient)."}

# --------------------------------------------------------------------------------------------------
# HTML
# --------------------------------------------------------------------------------------------------

# Canvas and CanvasText follow the system: dark on light, or light on dark.
STYLE = """
:root {color-scheme: light dark; --line: #8886}
body {font: 1rem/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 0 1rem 2rem;
  background: Canvas; color: CanvasText; overflow-wrap: anywhere}
form {position: sticky; top: 0; z-index: 1; display: flex; gap: .5rem; padding: 1rem 0;
  background: Canvas}
input {flex: 1; min-width: 0}
input, button {font: inherit; padding: .5rem .75rem; border: 1px solid var(--line);
  border-radius: .5rem}
h1 {font-size: 1.25rem; margin: 1rem 0 .5rem}
.results {display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem}
.maps {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr));
  gap: 1rem}
figure {margin: 0; break-inside: avoid}
img {display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882;
  outline: 1px solid var(--line); border-radius: .5rem}
figcaption {font-size: .875rem; padding-top: .25rem}
@media (prefers-color-scheme: dark) {:root {--line: #fff4} a {color: #9cf}}
@media print {form, figcaption a {display: none} .results {grid-template-columns: repeat(5, 1fr)}}
"""

# The page asks for itself with another query and takes over what is new in it.
SCRIPT = """
const box = document.querySelector("input");
let asked = 0, timer;
async function ask() {
  const number = ++asked, url = "/?q=" + encodeURIComponent(box.value);
  const text = await (await fetch(url)).text();
  const page = new DOMParser().parseFromString(text, "text/html");
  if (number < asked) return;
  document.querySelector("main").replaceWith(page.querySelector("main"));
  document.title = page.title;
  history.replaceState(null, "", url);
}
box.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(ask, 120); });
"""


def page(title, body, script=""):
    """A whole HTML page. Only `title` is escaped here."""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
            f"<style>{STYLE}</style></head><body>{body}{script}</body></html>")


def figure(source, name, caption, link=None):
    """A picture and its caption, which is HTML. source, link: addresses."""
    image = f'<img alt="{html.escape(name)}" src="{source}">'
    if link:
        image = f'<a href="{link}">{image}</a>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def results(title, figures, kind="results"):
    """A heading and a grid of figures."""
    return (f'<h1 dir="auto">{html.escape(printable(title))}</h1>'
            f'<div class="{kind}">{"".join(figures)}</div>')


def jpeg(image):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def picture_url(image):
    """A picture as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()


# --------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------

def quote(query):
    return urllib.parse.quote(query, safe="")


def form(query):
    return (f'<form action="/"><input name="q" type="search" value="{html.escape(query)}" '
            f'dir="auto" maxlength="{LONGEST}" autocomplete="off" autofocus '
            'aria-label="Search in any language" placeholder="Search in any language">'
            "<button>Search</button></form>")


def more_like(number):
    return f'<a href="/like/{number}">more like this</a>'


def hit(name, number, cosine, query):
    """A picture among results. cosine: None where no question was asked."""
    score = "" if cosine is None else f" {cosine:.3f}"
    return figure(f"/picture/{number}", name, f"{html.escape(name)}{score}<br>{more_like(number)}",
                  f"/look/{number}?q={quote(query)}")


def looks(name, where, number, query):
    """A picture alone, and what speaks for the query in it."""
    figures = [figure(f"/picture/{number}", name, f"{html.escape(where)}<br>{more_like(number)}")]
    for kind, meaning in MAPS.items() if query else ():
        source = f"/{kind}/{number}?q={quote(query)}"
        figures.append(figure(source, f"{name}. {meaning}", meaning))
    return figures


def answer_page(library, kind, number, query):
    """library: search.Library; kind: "look", "like" or None -> HTML."""
    name = library.name(number)
    if kind == "look":
        title = query or name
        where = printable(library.pictures[number].name)
        body = results(title, looks(name, where, number, query), "maps")
    else:
        if kind == "like":
            title = f"Like {name}"
            found = library.like(number, TOP)
        elif query:
            title = library.heading(query)
            found = library.best([query], TOP)[0]
        else:                                   # the first pictures
            title = f"{len(library.pictures):,} pictures"
            found = [(None, i) for i in range(min(TOP, len(library.pictures)))]
        body = results(title, [hit(library.name(i), i, cosine, query) for cosine, i in found])
    return page(title, f"{form(query)}<main>{body}</main>", f"<script>{SCRIPT}</script>")


# --------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------

HEADERS = {
    # Nothing is fetched from other places, nor sent there.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; form-action 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",                # after the next start, /picture/3 is another
}


class Refused(Exception):
    """The status of a request that gets no answer, and why."""


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 10                                # seconds in which a request must arrive
    server_version = "search"
    sys_version = ""
    # SCRIPT expects <main>. send_error escapes what it fills in.
    error_message_format = page("Refused", '<main><p role="alert">%(explain)s</p>'
                                '<a href="/">Search</a></main>').replace("100%", "100%%")

    def do_GET(self):
        try:
            body = self.server.answer(*self.address())
        except Refused as error:
            status, why = error.args
            self.send_error(status, explain=why)
            return
        kind = "image/jpeg"
        if isinstance(body, str):
            kind = "text/html; charset=utf-8"
            body = body.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address(self):
        """-> (kind or None, number, query), checked."""
        port = self.server.server_port
        if self.headers.get_all("Host") not in ([f"127.0.0.1:{port}"], [f"localhost:{port}"]):
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        try:
            url = urllib.parse.urlsplit(self.path)
            words = urllib.parse.parse_qsl(url.query, errors="strict")
        except ValueError:
            raise Refused(400, "this is not an address in UTF-8") from None
        query = dict(words).get("q", "").strip()
        if len(query) > LONGEST:
            raise Refused(414, f"a query has at most {LONGEST:,} characters, not {len(query):,}")
        found = ADDRESS.fullmatch(url.path)
        number = int(found[2] or 0) if found else 0
        if not found or number >= len(self.server.library.pictures):
            raise Refused(404, "no such page")
        if found[1] in MAPS and not query:
            raise Refused(400, "for which text?")
        return found[1], number, query

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_):
        """A request for each letter is no news."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port, library):
        super().__init__(("127.0.0.1", port), Handler)
        self.library = library
        self.lock = threading.Lock()            # one thread at a time computes; the others wait
        # About 60 KB each. As somebody types, the same ones are asked for again.
        self.picture = functools.lru_cache(1000)(lambda number: jpeg(library.image(number, SIZE)))

    def answer(self, kind, number, query):
        """-> HTML (str) or a JPEG (bytes)."""
        with self.lock:
            try:
                if kind == "picture":
                    return self.picture(number)
                if kind in MAPS:
                    return jpeg(self.library.map(kind, number, query, SIZE))
                return answer_page(self.library, kind, number, query)
            except BadRecord as error:
                raise Refused(404, f"this picture can no longer be read: {error}") from None

    def handle_error(self, request, client_address):
        """What fails in a request is one line. That the other side left is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print("error:", reason(error), file=sys.stderr)


def open_server(port, library=None):
    """port 0: a free one. ValueError where the port cannot be had."""
    try:
        return Server(port, library)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--serve {port}: {reason(error)}") from None
