"""The page of search.py: the HTML of results, and a server of it for this computer alone.

    /?q=TEXT  /?like=N             results of a text; pictures that are like picture N
    /look/N?q=TEXT                 picture N, and which parts of it speak for the text
    /small/N  /large/N             picture N
    /cosine/N?q=  /attention/N?q=  picture N, darkened where evaluate.cosine_map or .attention_map
                                   is low

The server reads and never writes. A picture has a number, so no path comes from outside. It listens
on 127.0.0.1 and answers requests that name it by this address or localhost: another site's name
that leads here (DNS rebinding) is refused, and another site's page may not show the pictures.
"""
import base64
import functools
import hashlib
import html
import http.server
import io
import re
import sys
import threading
import urllib.parse

from formats.records import BadRecord, printable, reason

SMALL = 320                                     # pixels of the longer side
LARGE = 800                                     # the same, alone on a page
LONGEST = 1000                                  # characters of a query
TOP = 24                                        # pictures on a page
PATIENCE = 10                                   # seconds in which a request must arrive
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
h1, h2 {font-size: 1.25rem; margin: 1rem 0 .5rem}
.results {display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem}
.maps {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr));
  gap: 1rem}
figure {margin: 0; break-inside: avoid}
img {display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882;
  border-radius: .5rem}
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
    script = f"<script>{script}</script>" if script else ""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{body}{script}</body></html>")


def figure(source, name, caption, link=None):
    """A picture and its caption, which is HTML. source, link: addresses."""
    image = f'<img alt="{html.escape(name)}" src="{source}">'
    if link:
        image = f'<a href="{link}">{image}</a>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def results(title, figures):
    """A heading and a grid of figures."""
    return (f'<h1 dir="auto">{html.escape(printable(title))}</h1>'
            f'<div class="results">{"".join(figures)}</div>')


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

class Refused(Exception):
    """A request that gets a status and a line instead of a page."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Site:
    """Path and query of a request -> (type, bytes). One thread at a time computes; the others wait.
    library: search.Library"""

    def __init__(self, library):
        self.library = library
        self.lock = threading.Lock()
        # About 20 KB each. As somebody types, the same ones are asked for again.
        self.small = functools.lru_cache(2000)(lambda number: jpeg(library.image(number, SMALL)))

    def answer(self, path, words):
        """words: {"q": TEXT, "like": N}, each of them or not. Refused where there is no answer."""
        query = words.get("q", "").strip()
        if len(query) > LONGEST:
            raise Refused(414, f"a query has at most {LONGEST:,} characters, not {len(query):,}")
        parts = re.fullmatch(r"/(?:(small|large|look|cosine|attention)/([0-9]{1,9}))?", path)
        if not parts:
            raise Refused(404, "no such page")
        what, number = parts.groups()
        with self.lock:
            try:
                if not what:
                    return "text/html", self.found(query, words.get("like")).encode()
                number = self.number(number)
                if what == "look":
                    return "text/html", self.look(number, query).encode()
                if what == "small":
                    return "image/jpeg", self.small(number)
                return "image/jpeg", jpeg(self.picture(what, number, query))
            except BadRecord as error:
                raise Refused(404, f"this picture can no longer be read: {error}") from None

    def number(self, text):
        """The number of a picture."""
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(self.library.pictures):
            raise Refused(404, "no such picture")
        return int(text)

    def picture(self, what, number, query):
        if what == "large":
            return self.library.image(number, LARGE)
        if not query:
            raise Refused(400, "for which text?")
        return self.library.map(what, number, query, LARGE)

    def found(self, query, like):
        """The page of results; without a question it shows the first pictures."""
        library = self.library
        if like:
            number = self.number(like)
            title = f"Like {library.name(number)}"
            found = library.like(number, TOP)
        elif query:
            title = library.told(query)
            found = library.best([query], TOP)[0]
        else:
            title = f"{len(library.pictures):,} pictures"
            found = [(None, i) for i in range(min(TOP, len(library.pictures)))]
        figures = [self.hit(rank, *hit, query) for rank, hit in enumerate(found, 1)]
        body = f"<main>{results(title, figures)}</main>"
        return page(title, self.form(query) + body, SCRIPT)

    def hit(self, rank, score, number, query):
        name = self.library.name(number)
        order = "" if score is None else f"{rank}. "
        cosine = "" if score is None else f" {score:.3f}"
        caption = (f"{order}{html.escape(name)}{cosine}<br>"
                   f'<a href="/?like={number}">more like this</a>')
        link = f"/look/{number}?q={urllib.parse.quote(query)}"
        return figure(f"/small/{number}", name, caption, link)

    def form(self, query):
        return (f'<form action="/"><input name="q" type="search" value="{html.escape(query)}" '
                f'dir="auto" maxlength="{LONGEST}" autocomplete="off" autofocus '
                'aria-label="Search in any language" placeholder="Search in any language">'
                "<button>Search</button></form>")

    def look(self, number, query):
        name = self.library.name(number)
        figures = [figure(f"/large/{number}", name, html.escape(self.library.pictures[number].name)
                          + f'<br><a href="/?like={number}">more like this</a>')]
        if query:
            for what, meaning in MAPS.items():
                source = f"/{what}/{number}?q={urllib.parse.quote(query)}"
                figures.append(figure(source, f"{name}: {meaning}", html.escape(meaning)))
        title = query or name
        body = (f'<main><h1 dir="auto">{html.escape(title)}</h1>'
                f'<div class="maps">{"".join(figures)}</div></main>')
        return page(title, self.form(query) + body, SCRIPT)


# --------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------

def csp_hash(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; img-src 'self' data:; connect-src 'self'; "
                               f"style-src {csp_hash(STYLE)}; script-src {csp_hash(SCRIPT)}; "
                               "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",                # of the next start, /small/3 is another picture
}


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version = "search"
    sys_version = ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def do_GET(self):
        try:
            kind, body = self.server.site.answer(*self.request_words())
            status = 200
        except Refused as error:
            status, kind, body = error.status, "text/html", refusal(error)
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if "text" in kind else kind)
        self.send_header("Content-Length", str(len(body)))
        for header, value in HEADERS.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def request_words(self):
        """-> path, {name: value}."""
        port = self.server.server_port
        if self.headers.get_all("Host") not in ([f"127.0.0.1:{port}"], [f"localhost:{port}"]):
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        try:
            url = urllib.parse.urlsplit(self.path)
            pairs = urllib.parse.parse_qsl(url.query, errors="strict", max_num_fields=9)
        except ValueError:
            raise Refused(400, "this is not an address in UTF-8") from None
        return url.path, dict(pairs)

    def log_message(self, *_):
        """A request for each letter is no news."""


def refusal(error):
    line = html.escape(printable(str(error)))
    return page("Refused", f'<main><p role="alert">{line}</p><a href="/">Search</a></main>').encode()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """What fails in a request is one line. That the other side left is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print("error:", reason(error), file=sys.stderr)


def open_server(port):
    """-> Server, whose attribute `site` is still to be set. port 0: a free one. ValueError where the
    port cannot be had."""
    try:
        return Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--serve {port}: {reason(error)}") from None
