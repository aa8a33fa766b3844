"""A study: the pairs that people choose from, the database of their answers, the page, and what comes of it. study.py
says how it is used.
"""

import contextlib
import hashlib
import io
import json
import math
import random
import re
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dataset.images import open_picture, read_captions
from model.errors import CONTROLS, UserError
from model.files import read_json, write_bytes, write_text

from .report import KEPT_AREA
from .sides import Side
from .statistics import percent_and_interval, wilson, win_rate

LONGEST_NAME = 60
LARGEST_ANSWER = 10_000                        # bytes of a form; the page's own have some hundreds
PATIENCE = 300                                 # seconds for which a connection may be silent
STYLE = Path(__file__).with_name("study.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("study.js").read_text(encoding="utf-8")
SCHEMA = (
    "CREATE TABLE study (digest TEXT, folder TEXT, baseline TEXT, candidate TEXT)",
    # `preferred` is a side's name, or NULL where there is no difference.
    "CREATE TABLE answers (participant TEXT, pair INTEGER, preferred TEXT, at TEXT DEFAULT CURRENT_TIMESTAMP, "
    "PRIMARY KEY (participant, pair))")
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
        rng, n = random.Random(f"{self.digest} {participant}"), len(self.pairs)
        extra = rng.randrange(2)
        pairs, lefts = list(range(n)), [(i + extra) % 2 == 0 for i in range(n)]
        rng.shuffle(pairs)
        rng.shuffle(lefts)
        return list(zip(pairs, lefts))


def read_study(folder: Path, names: list[str] | None) -> Study:
    """The pairs of a finished evaluation. `names` are the baseline's and the candidate's, None where it has just two
    sides. All pictures are opened: a damaged one is found before anyone is asked.

    Raises UserError where there is no finished evaluation, no such sides, or pictures of several sizes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one that evaluate.py wrote")
    if not (folder / "report.json").is_file():
        raise UserError(f"{folder}: no report.json, so no finished evaluation; run evaluate.py's command again first")
    models = read_json(folder / "report.json").get("sides")
    if not isinstance(models, dict):
        raise UserError(f"{folder}: an evaluation of scorers, not of pictures; give one that compares two sides")
    for name, model in models.items():
        if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(model, str):
            raise UserError(f"{folder / 'report.json'}: {name!r:.60} is no side that evaluate.py writes; make it again")
    names = names or list(models)
    if len(set(names)) != 2 or len(names) != 2 or not set(names) <= set(models):
        raise UserError(f"{folder}: give two of its sides, as in --sides {','.join(list(models)[:2])}; it has "
                        f"{', '.join(models)}")
    folders = [Side(name, models[name]).folder(folder) for name in names]
    pairs, sizes, digest = [], set(), hashlib.sha256(repr(names).encode())
    for row in read_captions(folder / f"scores-{names[0]}.jsonl", folders):
        file, prompt = row["file"], row["prompt"]
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


def open_study(path: Path, folder: Path | None = None, names: list[str] | None = None) -> Study:
    """Begins a database, or goes on with one; refuses that of another study. The evaluation's folder and the names of
    its two sides are, where None, those that the database was begun with."""
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
    study = read_study(Path(folder or row[1]).resolve(), names or row and list(row[2:]))
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
    app = flask.Flask(__name__, static_folder=None, template_folder=".")
    app.config["TRUSTED_HOSTS"] = trusted      # else a page from elsewhere, its name led to 127.0.0.1, could read this
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_ANSWER      # else an upload fills the folder of temporary files
    total, mark = len(study.pairs), study.digest[:12]                # pages and pictures of another study have another
    render = partial(flask.render_template, "study.html", style=STYLE, script=SCRIPT, total=total, mark=mark)

    def participant() -> str:
        """The name, in one spelling; without what would command the terminal that --export prints it to."""
        name = CONTROLS.sub(" ", flask.request.values.get("name", ""))
        return " ".join(name.split())[:LONGEST_NAME].rstrip()

    def place(name: str, number: int) -> tuple[int, bool]:
        return study.order(name)[number - 1] if 1 <= number <= total else flask.abort(404)

    def address(number: int | None = None) -> str:
        return flask.url_for("show", name=participant(), number=number)

    def picture_address(number: int, side: str) -> str:
        # The study is named because browsers keep pictures: at the same place may soon be another's.
        return flask.url_for("picture", number=number, side=side, name=participant(), study=mark)

    @app.after_request
    def add_headers(response):
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.errorhandler(UserError)
    def failed(error):
        print(f"study.py: {CONTROLS.sub(' ', str(error))}", file=sys.stderr)     # it names files: not for participants
        return "This cannot be shown now. Please tell whoever asked you.", 500

    @app.get("/")
    def start():
        return render(longest=LONGEST_NAME)

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
            return render(name=name, address=address)
        pair, candidate_left = place(name, number)
        chosen = {None: "same", study.sides[candidate_left]: "left", study.sides[not candidate_left]: "right"}
        return render(
            name=name, number=number, prompt=study.pairs[pair][0], size=study.size,
            chosen=chosen[answers[pair]] if pair in answers else None, tiny=math.prod(study.size) <= KEPT_AREA,
            address=address, picture=picture_address)

    @app.get("/picture/<int:number>/<any(left, right):side>")
    def picture(number: int, side: str):
        if flask.request.args.get("study", mark) != mark:
            flask.abort(404)                   # the browser would keep this study's picture as the other's
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
        if origin is not None and origin.partition("//")[2] != flask.request.host:
            flask.abort(403)                   # another site's form
        name, choice = participant(), flask.request.form.get("choice")
        if not name or choice not in ("left", "right", "same"):
            flask.abort(400)
        if flask.request.form.get("study") != mark:
            flask.abort(409, "This page is of another study, and nothing was kept. Please begin anew.")
        pair, candidate_left = place(name, flask.request.form.get("number", 0, type=int))
        preferred = None if choice == "same" else study.sides[(choice == "left") == candidate_left]
        with database(path) as db:
            db.execute("INSERT OR REPLACE INTO answers (participant, pair, preferred) VALUES (?, ?, ?)",
                       (name, pair, preferred))
        return flask.redirect(address(), 303)

    return app


def serve(study: Study, path: Path, host: str, port: int) -> None:
    app = make_app(study, path, ["127.0.0.1", "localhost"] if host in ("127.0.0.1", "localhost") else None)
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        timeout = PATIENCE                     # else each phone that went off keeps a thread and a socket for good

        def run_wsgi(self) -> None:
            try:
                super().run_wsgi()
            except ValueError:                 # an address that cannot be taken apart, such as http://[/
                self.send_error(400)

        def log_request(self, *_) -> None:     # not a line a picture; and werkzeug's takes the address apart, too
            pass

    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
    with listener:
        server = make_server(host, port, app, threaded=True, request_handler=Handler, fd=listener.fileno())
        print(f"{len(study.pairs)} pairs of {' and '.join(study.sides)} at http://{host}:{server.port}/, answers to "
              f"{path}; Ctrl-C ends it", flush=True)
        server.serve_forever()                 # it returns on Ctrl-C
    print(f"\nstopped; every answer is in {path}, and --export DIR counts them")


# The outcome

def rate(votes: list[int]) -> dict:
    """1, 0 and -1 are votes for the candidate, for neither and for the baseline. A tie varies less than the half win it
    is counted as, so that the interval which Wilson's score gives with ties is on the wide side."""
    rates = win_rate(votes, [0] * len(votes))
    bounds = wilson(rates["wins"] + rates["ties"] / 2, len(votes))
    return rates | {"ci95_ties_half": [100 * bound for bound in bounds]}


def export(study: Study, path: Path, out: Path) -> tuple[list[list[str]], int]:
    """Writes study.json, and pairs.jsonl with its images. -> the rows of a table (whose answers, the candidate's win
    rate, that with a tie as half a win, how many answers), and the number of decided pairs written. Those of which no
    side has more answers are written as ties.

    `all` takes answers as independent. People who saw the same pair are not quite: its interval is then narrow, and
    that of `majority`, in which every pair counts once, is the one to go by.
    """
    answers = read_answers(study, path)
    if not answers:
        raise UserError(f"{path}: no answers in it yet")
    known = (out / "study.json").is_file() and read_json(out / "study.json").get("digest") == study.digest
    if out.is_dir() and any(out.iterdir()) and not known:
        raise UserError(f"{out}: holds other files, or another study's; choose another --export")
    votes: dict[str, list[int]] = {}
    sums: Counter[int] = Counter()
    for name, pair, preferred in answers:
        vote = {study.sides[0]: -1, None: 0, study.sides[1]: 1}[preferred]
        votes.setdefault(name, []).append(vote)
        sums[pair] += vote
    rates = {"all": rate([vote for own in votes.values() for vote in own]), "majority": rate(list(sums.values()))}
    participants = {name: rate(own) for name, own in votes.items()}
    manifest = {
        "evaluation": str(study.folder), "baseline": study.sides[0], "candidate": study.sides[1],
        "digest": study.digest, "pairs": len(study.pairs), **rates, "participants": participants}
    write_text(out / "study.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    preferences = []
    for pair in sorted(sums):
        prompt, *sources = study.pairs[pair]
        files = [f"images/{side}/{pair:05d}{source.suffix}" for side, source in zip(study.sides, sources)]
        for file, source in zip(files, sources):
            write_bytes(out / file, source.read_bytes())
        winner, loser = files[::-1] if sums[pair] > 0 else files
        preferences.append({"prompt": prompt, "winner": winner, "loser": loser} | ({} if sums[pair] else {"tie": True}))
    lines = [json.dumps(preference, ensure_ascii=False) + "\n" for preference in preferences]
    write_text(out / "pairs.jsonl", "".join(lines))
    table = [
        [name, percent_and_interval(one), f"{one['percent_ties_half']:.1f} %",
         str(one["wins"] + one["ties"] + one["losses"])]
        for name, one in [*rates.items(), *participants.items()]]
    return table, sum(sums[pair] != 0 for pair in sums)
