"""Do people prefer it? A small web page that shows a prompt and two pictures, in random order, and counts the choices.

    python study.py --eval eval --out study.db                       # what evaluate.py drew; at http://127.0.0.1:8000/
    python study.py --eval table --sides baseline,hg-dpo --out study.db          # two of the sides of a --compare
    python study.py --out study.db --export eval-study               # win rates, and pairs to learn from
    python build_dataset.py --from-pairs eval-study/pairs.jsonl --out human

OUT                     SQLite: a row a participant and pair, on the disk before the next pair is shown
EXPORT/study.json       the candidate's win rates with 95 % intervals: of all answers, of majorities, of each person
EXPORT/pairs.jsonl      a line a pair that has a majority: prompt, winner, loser, which lie in EXPORT/images/

Nothing on the page tells the sides apart: each participant has an order of pairs and sides of their own, addresses
count the pairs as they are shown, and pictures are sent without the settings that generate.py writes into them.
"""

import cli

# isort: split
import contextlib
import hashlib
import io
import json
import logging
import math
import random
import re
import shutil
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from evaluate import print_table, won
from judgement import wilson, win_rate
from model.errors import UserError
from model.files import read_json, write_text
from pictures import open_picture
from report import KEPT_AREA
from score import read_listing
from sides import Side

LONGEST_NAME = 60
SCHEMA = (
    "CREATE TABLE study (digest TEXT, folder TEXT, baseline TEXT, candidate TEXT)",
    # `preferred` is a side's name, or NULL where there is no difference.
    "CREATE TABLE answers (participant TEXT, pair INTEGER, preferred TEXT, at TEXT DEFAULT CURRENT_TIMESTAMP, "
    "PRIMARY KEY (participant, pair))")
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Which picture is better?</title><style>
:root { color-scheme: light; --page: #fafaf8; --card: #fff; --text: #1d1f23; --soft: #646a73; --line: #d9dbd7;
  --accent: #2468c4; }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark; --page: #15171a; --card: #1e2125; --text: #e8e9ea;
  --soft: #9aa0a8; --line: #3a3f46; --accent: #6ea6f2; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; text-align: center; }
main { width: 100%; max-width: 1100px; padding: 1rem; } .narrow { max-width: 30rem; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 .75rem; } p { margin: .5rem 0; } a { color: var(--accent); }
.soft { color: var(--soft); font-size: .9rem; } nav { display: grid; grid-template-columns: 1fr auto 1fr; gap: 1rem; }
nav :first-child { text-align: left; } nav > :last-child { text-align: right; overflow-wrap: anywhere; }
progress { display: block; width: 100%; height: 4px; margin: .4rem 0 1rem; accent-color: var(--accent); }
.prompt { font-size: 1.15rem; line-height: 1.4; margin: .1rem auto 1rem; max-width: 46rem; max-height: 7em;
  overflow: auto; overflow-wrap: anywhere; }
input, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: .65rem 1.2rem; } input { width: 100%; margin: .75rem 0; text-align: center; }
button { cursor: pointer; touch-action: manipulation; }
button:hover, button:focus-visible { border-color: var(--accent); }
button.chosen { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.sides { display: flex; justify-content: center; gap: .8rem; margin-bottom: .8rem; }
.sides button { padding: .5rem; width: min(50%, 56vh * var(--ratio) + 1rem, var(--most) + 1rem); }
img { display: block; width: 100%; height: auto; border-radius: 5px; margin-bottom: .4rem; }
.tiny img { image-rendering: pixelated; } kbd { font: inherit; color: var(--soft); }
@media (hover: none) { kbd { display: none; } }
@media (max-width: 640px) { main { padding: .6rem; } .sides { gap: .4rem; } .sides button { padding: .25rem; }
  .prompt { font-size: 1rem; max-height: 10em; } }
</style></head><body>
{% if number %}<main{% if tiny %} class="tiny"{% endif %}>
<nav class="soft"><span>{% if number > 1 %}<a id="back" href="{{ address(number - 1) }}">Back</a>{% endif %}</span>
<span>{{ number }} of {{ total }}</span>
<span>{% if chosen %}<a href="{{ address() }}">Go on</a>{% else %}{{ name }}{% endif %}</span></nav>
<progress value="{{ number - 1 }}" max="{{ total }}" aria-label="progress"></progress>
<p class="soft">Which picture is better for this text?</p><p class="prompt">{{ prompt }}</p>
<form method="post" action="/pair" style="--ratio: {{ size[0] / size[1] }}; --most: {{ 4096 if tiny else size[0] }}px">
<input type="hidden" name="name" value="{{ name }}"><input type="hidden" name="number" value="{{ number }}">
<div class="sides">{% for side, arrow in (("left", "←"), ("right", "→")) %}
<button name="choice" value="{{ side }}" data-key="Arrow{{ side.title() }}"{% if chosen == side %} class="chosen"
  {%- endif %}><img src="{{ picture(number, side) }}" width="{{ size[0] }}" height="{{ size[1] }}" alt="{{ side }}">
{{ side.title() }} <kbd>{{ arrow }}</kbd></button>{% endfor %}</div>
<button name="choice" value="same" data-key="ArrowDown"{% if chosen == "same" %} class="chosen"{% endif %}>No difference
<kbd>↓</kbd></button></form>
<p id="lost" hidden>A picture did not load. Please reload the page.</p><script>
const form = document.forms[0], buttons = [...form.querySelectorAll('button')]
let ready = false
// Who has not seen both pictures cannot choose; nor does the second click of a double-click answer the next pair.
addEventListener('pageshow', () => {
  ready = false
  Promise.all([...form.querySelectorAll('img')].map(image => image.decode())).then(
    () => setTimeout(() => ready = true, 300),
    () => document.getElementById('lost').hidden = false)
  {% if number < total %}for (const url of {{ [picture(number + 1, "left"), picture(number + 1, "right")] | tojson }})
    new Image().src = url{% endif %}
})
form.onsubmit = event => { if (!ready) event.preventDefault(); ready = false }
addEventListener('keydown', event => {
  const target = event.key === 'Backspace' ? document.getElementById('back')
    : buttons.find(button => button.dataset.key === event.key)
  if (!target || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return
  event.preventDefault()
  target.click()
})
</script></main>
{% elif name %}<main class="narrow"><h1>Thank you, {{ name }}!</h1><p>You have answered all {{ total }}.
You can close this page now.</p><p class="soft"><a href="{{ address(total) }}">Back to the last pair</a></p></main>
{% else %}<main class="narrow"><h1>Which picture is better?</h1>
<p>You will see {{ total }} pairs of pictures, each with the text that both were made from. Choose the better one by a
click, a tap, or the arrow keys.</p><p class="soft">Every answer is kept at once. You can stop at any time and go on
later under the same name; please take one that nobody else has.</p>
<form action="/pair"><input name="name" required maxlength="{{ longest }}" placeholder="Your name"
  aria-label="Your name" autocomplete="off" autocapitalize="off" spellcheck="false" autofocus>
  <button>Begin</button></form></main>{% endif %}</body></html>
"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}


@dataclass(frozen=True)
class Study:
    folder: Path
    sides: tuple[str, str]                     # the baseline, the candidate
    pairs: list[tuple[str, Path, Path]]        # prompt, the baseline's picture, the candidate's
    size: tuple[int, int]
    digest: str                                # changes with the sides' names, the prompts and the pictures

    def order(self, participant: str) -> list[tuple[int, bool]]:
        """As this participant sees them: which pair, and whether the candidate is on the left, as it is in half."""
        draw, n = random.Random(f"{self.digest} {participant}"), len(self.pairs)
        extra = draw.randrange(2)
        pairs, lefts = list(range(n)), [(i + extra) % 2 == 0 for i in range(n)]
        draw.shuffle(pairs)
        draw.shuffle(lefts)
        return list(zip(pairs, lefts))


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--eval", metavar="DIR", help="what evaluate.py wrote (default: what OUT was begun with)")
    parser.add_argument("--sides", metavar="BASELINE,CANDIDATE", help="two of its sides (default: where it has two)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the database; the same command goes on with it")
    parser.add_argument("--export", metavar="DIR", help="instead of the page: write what was chosen so far")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets in other machines, without a password")
    parser.add_argument("--port", type=cli.whole(0, 65535), default=8000, help="0 takes any that is free")
    return parser.parse_args()


def read_study(folder: Path, wanted: list[str] | None) -> Study:
    """The pairs of a finished evaluation. All pictures are opened: a damaged one is found before anyone is asked."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one that evaluate.py wrote")
    if not (folder / "report.json").is_file():
        raise UserError(f"{folder}: no report.json, so no finished evaluation; run evaluate.py's command again first")
    said = read_json(folder / "report.json").get("sides")
    if not isinstance(said, dict):
        raise UserError(f"{folder}: an evaluation of scorers, not of pictures; give one that compares two sides")
    for name, made_of in said.items():
        if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(made_of, str):
            raise UserError(f"{folder / 'report.json'}: {name!r:.60} is no side that evaluate.py writes; make it again")
    names = wanted or list(said)
    if len(set(names)) != 2 or len(names) != 2 or not set(names) <= set(said):
        raise UserError(f"{folder}: give two of its sides, as in --sides {','.join(list(said)[:2])}; it has "
                        f"{', '.join(said)}")
    folders = [Side(name, said[name]).folder(folder) for name in names]
    pairs, sizes, digest = [], set(), hashlib.sha256(repr(names).encode())
    for file, prompt in read_listing(folder / f"scores-{names[0]}.jsonl"):
        paths = [one / file for one in folders]
        sizes.update(open_picture(path).size for path in paths)
        if len(sizes) > 1:
            raise UserError(f"{folder}: pictures of {' and '.join(f'{w}x{h}' for w, h in sorted(sizes))} (at {file}); "
                            "this would tell the sides apart, draw them alike")
        for content in (prompt.encode(), *(path.read_bytes() for path in paths)):
            digest.update(hashlib.sha256(content).digest())
        pairs.append((prompt, *paths))
    return Study(folder, (names[0], names[1]), pairs, next(iter(sizes)), digest.hexdigest())


# The database

@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction of its own: it is on the disk when the block ends, or nothing of it is."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as db, db:
            yield db
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}; is it the database of a study?") from None


def open_study(path: Path, folder: str | None, sides: str | None) -> Study:
    """Begins a database, or goes on with one; refuses that of another study."""
    row = None
    if path.exists():
        with database(path) as db:
            tables = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and not {"study", "answers"} <= tables:
                raise UserError(f"{path}: a database of something else; choose another --out")
            row = db.execute("SELECT digest, folder, baseline, candidate FROM study").fetchone() if tables else None
        if row is not None and not all(isinstance(text, str) for text in row):
            raise UserError(f"{path}: a damaged database; take an older copy, or choose another --out")
    if row is None and folder is None:
        raise UserError(f"{path}: no study in it yet; begin one with --eval DIR")
    wanted = [name.strip() for name in sides.split(",")] if sides else row and list(row[2:])
    study = read_study(Path(folder or row[1]).resolve(), wanted)
    if row is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with database(path) as db:
            for statement in ("BEGIN", *SCHEMA):                     # all or nothing: a study is never half begun
                db.execute(statement)
            db.execute("INSERT INTO study VALUES (?, ?, ?, ?)", (study.digest, str(study.folder), *study.sides))
    elif row[0] != study.digest:
        raise UserError(f"{path}: begun with other sides, prompts or pictures than {study.folder} has; choose another "
                        "--out")
    return study


def read_answers(study: Study, path: Path) -> list[tuple[str, int, str | None]]:
    """(participant, pair, preferred) of all answers."""
    with database(path) as db:
        rows = db.execute("SELECT participant, pair, preferred FROM answers ORDER BY participant, pair").fetchall()
    for name, pair, preferred in rows:
        if not isinstance(name, str) or pair not in range(len(study.pairs)) or preferred not in (None, *study.sides):
            raise UserError(f"{path}: an answer {(name, pair, preferred)!r:.80}, which is none to these pairs; damaged")
    return rows


# The page

def make_app(study: Study, path: Path, trusted: list[str] | None = None):
    """The Flask application. `trusted` are the host names that it answers to; None is any."""
    try:
        import flask
    except ImportError:
        raise UserError('the page needs Flask: pip install "hg-dpo[study]"') from None
    app = flask.Flask("study", static_folder=None)
    app.config["TRUSTED_HOSTS"] = trusted      # else a page from elsewhere, its name led to 127.0.0.1, could read this
    total = len(study.pairs)

    def participant() -> str:
        return " ".join(flask.request.values.get("name", "").split())[:LONGEST_NAME]

    def place(name: str, number: int) -> tuple[int, bool]:
        return study.order(name)[number - 1] if 1 <= number <= total else flask.abort(404)

    def address(number: int | None = None) -> str:
        return flask.url_for("show", name=participant(), number=number)

    def picture_address(number: int, side: str) -> str:
        # The study is named because browsers keep pictures: at the same place may soon be another's.
        return flask.url_for("picture", number=number, side=side, name=participant(), study=study.digest[:12])

    @app.after_request
    def add_headers(response):
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.errorhandler(UserError)
    def failed(error):
        print(f"study.py: {error}", file=sys.stderr)                 # it names files: nothing for participants
        return "This cannot be shown now. Please tell whoever asked you.", 500

    @app.get("/")
    def start():
        return flask.render_template_string(PAGE, total=total, longest=LONGEST_NAME)

    @app.get("/pair")
    def show():
        """The pair that is asked for, else the first without an answer, else thanks."""
        if not (name := participant()):
            return flask.redirect("/")
        answers = {pair: preferred for who, pair, preferred in read_answers(study, path) if who == name}
        left_over = (number for number, (pair, _) in enumerate(study.order(name), 1) if pair not in answers)
        number = flask.request.args.get("number", type=int)
        number = next(left_over, None) if number is None else number
        if number is None:
            return flask.render_template_string(PAGE, name=name, total=total, address=address)
        pair, candidate_left = place(name, number)
        chosen = {None: "same", study.sides[candidate_left]: "left", study.sides[not candidate_left]: "right"}
        return flask.render_template_string(
            PAGE, name=name, number=number, total=total, prompt=study.pairs[pair][0], size=study.size,
            chosen=chosen[answers[pair]] if pair in answers else None, tiny=math.prod(study.size) <= KEPT_AREA,
            address=address, picture=picture_address)

    @app.get("/picture/<int:number>/<any(left, right):side>")
    def picture(number: int, side: str):
        pair, candidate_left = place(participant(), number)
        image = open_picture(study.pairs[pair][1 + ((side == "left") == candidate_left)])
        image.info.clear()                     # generate.py's settings in it name the LoRA
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return flask.Response(file.getvalue(), mimetype="image/png", headers=headers)

    @app.post("/pair")
    def choose():
        origin = flask.request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != flask.request.host:
            flask.abort(403)                   # another site's form
        name, choice = participant(), flask.request.form.get("choice")
        if not name or choice not in ("left", "right", "same"):
            flask.abort(400)
        pair, candidate_left = place(name, flask.request.form.get("number", 0, type=int))
        preferred = None if choice == "same" else study.sides[(choice == "left") == candidate_left]
        with database(path) as db:
            db.execute("INSERT OR REPLACE INTO answers (participant, pair, preferred) VALUES (?, ?, ?)",
                       (name, pair, preferred))
        return flask.redirect(address(), 303)

    return app


def serve(study: Study, path: Path, host: str, port: int) -> None:
    app = make_app(study, path, ["127.0.0.1", "localhost"] if host in ("127.0.0.1", "localhost") else None)
    from werkzeug.serving import make_server
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
    with listener:
        server = make_server(host, port, app, threaded=True, fd=listener.fileno())
        logging.getLogger("werkzeug").setLevel(logging.ERROR)        # not a line a picture
        print(f"{len(study.pairs)} pairs of {' and '.join(study.sides)} at http://{host}:{server.port}/, answers to "
              f"{path}; Ctrl-C ends it", flush=True)
        server.serve_forever()                 # it returns on Ctrl-C
    print(f"\nstopped; every answer is in {path}, and --export DIR counts them")


# The outcome

def rate(votes: list[int]) -> dict:
    """1, 0 and -1 are votes for the candidate, for neither and for the baseline. A tie varies less than the half win it
    is counted as, so that the interval which Wilson's score gives with ties is on the wide side."""
    found = win_rate(votes, [0] * len(votes))
    bounds = wilson(found["wins"] + found["ties"] / 2, len(votes))
    return found | {"ci95_ties_half": [100 * bound for bound in bounds]}


def export(study: Study, path: Path, out: Path) -> None:
    """`all` takes answers as independent. People who saw the same pair are not quite: its interval is then narrow, and
    that of `majority`, in which every pair counts once, is the one to go by."""
    rows = read_answers(study, path)
    if not rows:
        raise UserError(f"{path}: no answers in it yet")
    if out.is_dir() and any(out.iterdir()) and not (out / "study.json").is_file():
        raise UserError(f"{out}: holds other files; choose another --export")
    people: dict[str, list[int]] = {}
    sums: Counter[int] = Counter()
    for name, pair, preferred in rows:
        vote = {study.sides[0]: -1, None: 0, study.sides[1]: 1}[preferred]
        people.setdefault(name, []).append(vote)
        sums[pair] += vote
    rates = {"all": rate([vote for own in people.values() for vote in own]), "majority": rate(list(sums.values()))}
    each = {name: rate(own) for name, own in people.items()}
    about = {"evaluation": str(study.folder), "baseline": study.sides[0], "candidate": study.sides[1],
             "pairs": len(study.pairs), **rates, "participants": each}
    write_text(out / "study.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    lines = []
    for pair in sorted(pair for pair in sums if sums[pair]):
        prompt, *sources = study.pairs[pair]
        files = [f"images/{side}/{source.name}" for side, source in zip(study.sides, sources)]
        for file, source in zip(files, sources):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / file)
        winner, loser = files[::-1] if sums[pair] > 0 else files
        lines.append({"prompt": prompt, "winner": winner, "loser": loser})
    write_text(out / "pairs.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print_table(
        [f"{study.sides[1]} against {study.sides[0]}", "wins (95 % interval)", "ties as half", "answers"],
        [[name, won(found), f"{found['percent_ties_half']:.1f} %", str(found["wins"] + found["ties"] + found["losses"])]
         for name, found in [*rates.items(), *each.items()]])
    print(f"{out / 'pairs.jsonl'}: {len(lines)} pairs")


def main() -> None:
    args = parse_args()
    path = Path(args.out)
    study = open_study(path, args.eval, args.sides)
    if args.export:
        export(study, path, Path(args.export))
    else:
        serve(study, path, args.host, args.port)


if __name__ == "__main__":
    cli.run(main)
