"""study.py: what people see and choose, in a real browser too; what is kept, and what comes of it."""

import contextlib
import io
import json
import os
import queue
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection, HTTPException
from itertools import product
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image

import build_dataset
import study
from dataset.preferences import read_rankings
from evaluation.statistics import win_rate
from evaluation.study import LARGEST_ANSWER, LONGEST_NAME, make_app, open_study, serve
from model.files import read_lines
from pictures import write_png

ROOT = Path(__file__).parent.parent
PROMPTS = [
    "a man", 'a "woman" </script><img src=x onerror="alert(1)"> & <b>', "雨", "a boy", "a girl", "a crowd", "a man"]
N = len(PROMPTS)
RED = (200, 10, 10)                            # all of the candidate's pictures; the baseline's are the tiny model's


@pytest.fixture(scope="module")
def evaluation(tiny, tiny_scorer, tmp_path_factory):
    """evaluate.py's own: a baseline that it drew, and a candidate that was drawn elsewhere."""
    folder = tmp_path_factory.mktemp("evaluation")
    for i in range(N):
        write_png(folder / "tuned" / f"{i:05d}.png", Image.new("RGB", (32, 32), RED), {"parameters": "secret-lora"})
    rows = [{"file": f"{i:05d}.png", "prompt": prompt, "seed": i} for i, prompt in enumerate(PROMPTS)]
    (folder / "tuned" / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(
        [sys.executable, "evaluate.py", "--model", tiny, "--candidate", folder / "tuned", "--scorers", tiny_scorer,
         "--steps", "2", "--out", folder / "eval"], cwd=ROOT, check=True, capture_output=True)
    return folder / "eval"


@pytest.fixture
def begun(evaluation, tmp_path):
    """The database of a new study, and a client of its page."""
    path = tmp_path / "study.db"
    app = make_app(open_study(path, evaluation), path, ["localhost"])
    app.testing = True
    return path, app.test_client()


@pytest.fixture
def wire(evaluation, tmp_path, monkeypatch):
    """`serve`'s own server, within this process: the database, and a function that sends bytes and returns those that
    come back."""
    from werkzeug import serving
    path, make_server, servers = tmp_path / "study.db", serving.make_server, queue.Queue()

    def make_and_tell(*arguments, **options):
        servers.put(server := make_server(*arguments, **options))
        return server

    def send(message: bytes, ends: bool = True) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(message)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    monkeypatch.setattr(serving, "make_server", make_and_tell)
    monkeypatch.setattr("evaluation.study.PATIENCE", 2)
    thread = threading.Thread(target=serve, args=(open_study(path, evaluation), path, "127.0.0.1", 0), daemon=True)
    thread.start()
    server = servers.get(timeout=60)
    yield path, send
    server.shutdown()
    thread.join()


def candidate_left(client, name, number) -> bool:
    """Told by the pixels, as the page tells nobody."""
    answer = client.get(f"/picture/{number}/left", query_string={"name": name})
    return Image.open(io.BytesIO(answer.data)).getpixel((0, 0)) == RED


def shown(client, name, **query) -> str:
    return client.get("/pair", query_string={"name": name, **query}).text


def mark(client) -> str:
    """By which the page's forms are known."""
    return re.search(r'name="study" value="(\w+)"', shown(client, "anyone"))[1]


def choose(client, name, number, choice, **more):
    data = {"name": name, "number": number, "choice": choice, "study": mark(client)}
    return client.post("/pair", data=data, **more)


def rows_of(path) -> list[tuple]:
    return sqlite3.connect(path).execute("SELECT participant, pair, preferred FROM answers ORDER BY rowid").fetchall()


# What is shown

def test_everyone_has_an_order_and_sides_of_their_own(evaluation, tmp_path):
    one = open_study(tmp_path / "study.db", evaluation)
    again = open_study(tmp_path / "study.db")
    orders = [one.order(f"person {i}") for i in range(400)]
    assert orders == [again.order(f"person {i}") for i in range(400)]            # a reload shows the same
    assert len({str(order) for order in orders}) > 390
    for order in orders:
        assert sorted(pair for pair, _ in order) == list(range(N))
        assert sum(left for _, left in order) in (N // 2, N - N // 2)            # half of them, for everyone
    for i in range(N):                         # and neither a place nor a pair leans to a side: 4 deviations are 40
        assert abs(sum(order[i][1] for order in orders) - 200) < 40
        assert abs(sum(dict(order)[i] for order in orders) - 200) < 40


def test_nothing_tells_the_sides_apart(begun, evaluation):
    path, client = begun
    pages = [client.get("/"), *(client.get(f"/pair?name=ann&number={n}") for n in range(1, N + 1))]
    pictures = [client.get(f"/picture/{n}/{side}?name=ann") for n in range(1, N + 1) for side in ("left", "right")]
    for answer in (*pages, *pictures):
        assert answer.status_code == 200
        everything = answer.data + str(answer.headers).encode()
        for word in (b"baseline", b"candidate", b"tuned", b"secret", b".png", b"parameters", b"Last-Modified"):
            assert word not in everything
    for answer in pictures:
        image = Image.open(io.BytesIO(answer.data))
        assert image.size == (32, 32) and not image.info
    assert all(answer.text.count("<script") <= 1 and "<b>" not in answer.text for answer in pages)      # escaped
    # Each pair's two pictures are one of each side, the baseline's just as it was drawn.
    drawn = [Image.open(file).tobytes() for file in sorted((evaluation / "images/baseline").glob("*.png"))]
    for n in range(1, N + 1):
        other = client.get(f"/picture/{n}/{'right' if candidate_left(client, 'ann', n) else 'left'}?name=ann")
        number = drawn.index(Image.open(io.BytesIO(other.data)).tobytes())
        assert PROMPTS[number].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace(
            '"', "&#34;") in shown(client, "ann", number=n)


def test_only_the_studys_pictures_and_only_its_own_page(begun):
    path, client = begun
    for address in ("/picture/0/left", f"/picture/{N + 1}/left", "/picture/1/up", "/picture/../study.db", "/static/x",
                    "/picture/1/..%2f..%2fstudy.db", "/picture/-1/left", "/%2e%2e/%2e%2e/etc/passwd"):
        assert client.get(address, query_string={"name": "ann"}).status_code == 404
    for origin in ("http://evil.example", "http://localhost:1", "http://localhost@evil.example", "http://[", "null"):
        assert choose(client, "ann", 1, "left", headers={"Origin": origin}).status_code == 403
    assert client.get("/", headers={"Host": "rebound.example:8000"}).status_code == 400
    for name, number, choice, code in (("", 1, "left", 400), ("ann", 1, "both", 400), ("ann", 0, "left", 404),
                                       ("ann", N + 1, "left", 404), ("ann", "x", "left", 404)):
        assert choose(client, name, number, choice).status_code == code
    assert rows_of(path) == []
    assert choose(client, "ann", 1, "left", headers={"Origin": "http://localhost"}).status_code == 303
    assert client.get("/pair?name=+").location == "/"


def test_what_no_page_sends_is_refused_and_nothing_of_it_is_kept(wire, capsys):
    path, send = wire
    answer = b"name=ann&number=1&choice=left"
    upload = b'--x\r\nContent-Disposition: form-data; name="f"; filename="../f"\r\n\r\n' + b"z" * LARGEST_ANSWER

    def status(header: str, body: bytes) -> int:
        head = f"POST /pair HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n"
        return int(send(head.encode() + body).split()[1])

    def form(header: str, body: bytes) -> int:
        return status(f"Content-Type: application/x-www-form-urlencoded\r\n{header}", body)

    assert form(f"Content-Length: {LARGEST_ANSWER + 1}", answer + b"&" * LARGEST_ANSWER) == 413
    assert status(f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(upload)}", upload) == 413
    for length in (b"no number", b"-1", b"fffffff"):                 # the last body ends long before that
        assert form("Transfer-Encoding: chunked", length + b"\r\n" + answer) == 400
    for host, code in ((b"localhost", b"200"), (b"127.0.0.1:80", b"200"), (b"rebound.example", b"400")):
        assert send(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").split()[1] == code
    assert rows_of(path) == [] and capsys.readouterr().err == ""
    assert send(b"GET http://[/ HTTP/1.1\r\n\r\n").split()[1] == b"400"
    assert "Traceback" not in capsys.readouterr().err


def test_who_falls_silent_is_not_waited_for_forever(wire):
    half = (b"", b"GET /pa", b"POST /pair HTTP/1.0\r\nContent-Length: 9\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n\r\nname")
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(partial(wire[1], ends=False), half))
    assert [answer[:12] for answer in answers] == [b"", b"", b"HTTP/1.1 400"]


# What is kept

def test_goes_on_where_one_was_and_a_changed_answer_replaces(begun):
    path, client = begun
    assert f"1 of {N}" in shown(client, "ann")
    left = candidate_left(client, "ann", 1)
    for _ in range(2):                         # a double-click is one answer
        assert choose(client, "ann", 1, "left").location == "/pair?name=ann"
    assert [row[2] for row in rows_of(path)] == ["candidate" if left else "baseline"]
    assert f"2 of {N}" in shown(client, "ann") and f"1 of {N}" in shown(client, "bob")
    assert 'value="left" data-key="ArrowLeft" class="chosen"' in shown(client, "ann", number=1)          # back
    choose(client, "ann", 1, "same")
    assert [row[2] for row in rows_of(path)] == [None]
    assert 'data-key="ArrowDown" class="chosen"' in shown(client, "ann", number=1)
    for n in range(2, N + 1):
        choose(client, "  ann ", n, "right")   # blanks make no other person
    assert "Thank you, ann!" in shown(client, "ann") and len(rows_of(path)) == N
    assert f"{N} of {N}" in shown(client, "ann", number=N)


def test_a_page_of_another_study_is_not_counted(begun, evaluation, tmp_path):
    """It was left open while the next study began at its address: what it showed is not what is there now."""
    path, client = begun
    folder = shutil.copytree(evaluation, tmp_path / "eval")
    Image.new("RGB", (32, 32)).save(folder / "images/baseline/00003.png")
    other = make_app(open_study(tmp_path / "other.db", folder), tmp_path / "other.db").test_client()
    for data in ({"study": mark(client)}, {}):
        answer = other.post("/pair", data={"name": "ann", "number": 1, "choice": "left", **data})
        assert answer.status_code == 409 and "nothing was kept" in answer.text
    sources = re.findall(r'<img src="([^"]+)"', shown(client, "ann"))
    assert [one.get(source.replace("&amp;", "&")).status_code for source in sources for one in (client, other)] == [
        200, 404] * 2
    assert rows_of(tmp_path / "other.db") == []
    assert choose(other, "ann", 1, "left").status_code == 303


def test_a_name_has_one_spelling_and_commands_no_terminal(begun, program, tmp_path, capsys):
    path, client = begun
    long = "n" * (LONGEST_NAME - 1)
    assert f'value="{long}"' in shown(client, f"{long} b")           # cut behind a blank, and posted as it was shown
    for name in (f"{long} b", "ann\x1b[2J", "\0ann\x9b31m\x7f"):
        choose(client, name, 1, "left")
    assert [name for name, *_ in rows_of(path)] == [long, "ann [2J", "ann 31m"]
    assert program(study, "--out", path, "--export", tmp_path / "export") == 0
    assert "ann [2J" in capsys.readouterr().out


def test_a_hundred_at_once_and_a_kill_lose_no_answer(evaluation, tmp_path):
    """Each of a hundred people answers two pairs, all at once; when half of the answers are confirmed, the server is
    killed. What was confirmed is there, once, as it was chosen; and when the others answer again, all answers are."""
    path, people, numbers, confirmed = tmp_path / "study.db", range(100), (1, 2), set()
    process, address = served(path, "--eval", evaluation, "--port", 0)
    opened, begin = open_study(path), threading.Barrier(len(people))
    client = make_app(opened, path).test_client()
    known_by = mark(client)

    def form(k: int, number: int) -> dict:
        choice = ("left", "right", "same")[(k + number) % 3]
        return {"name": f"person {k}", "number": number, "choice": choice, "study": known_by}

    def row(k: int, number: int) -> tuple:
        pair, candidate_left = opened.order(f"person {k}")[number - 1]
        left, right = ("candidate", "baseline") if candidate_left else ("baseline", "candidate")
        return f"person {k}", pair, {"left": left, "right": right, "same": None}[form(k, number)["choice"]]

    def answer(k: int) -> None:
        begin.wait()
        with contextlib.suppress(OSError, HTTPException):                        # the killed server's
            for number in numbers:
                connection = HTTPConnection(urlsplit(address).netloc, timeout=60)
                connection.request("POST", "/pair", urlencode(form(k, number)), {
                    "Content-Type": "application/x-www-form-urlencoded", "Origin": address.rstrip("/")})
                assert connection.getresponse().status == 303
                confirmed.add(row(k, number))
                if len(confirmed) >= len(people):
                    process.kill()

    with process:
        try:
            with ThreadPoolExecutor(len(people)) as threads:
                list(threads.map(answer, people))
        finally:
            process.kill()
    rows, everything = rows_of(path), {row(*one) for one in product(people, numbers)}
    assert len(rows) == len(set(rows)) and confirmed <= set(rows) <= everything
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert len(confirmed) >= len(people)
    for k, number in product(people, numbers):
        assert row(k, number) in confirmed or client.post("/pair", data=form(k, number)).status_code == 303
    assert sorted(rows_of(path), key=str) == sorted(everything, key=str)


# What comes of it

def test_export_by_hand_and_on_into_a_dataset(begun, evaluation, program, tiny, tmp_path, capsys):
    """ann prefers the candidate but for one tie; bob the baseline in pairs 0 and 1, and the candidate in pair 2."""
    path, client = begun
    pairs = {"ann": [1] * (N - 1) + [0], "bob": [-1, -1, 1]}
    opened = open_study(path)
    for name, votes in pairs.items():
        for n, (pair, _) in enumerate(opened.order(name), 1):
            if pair < len(votes):
                better = votes[pair] > 0
                side = "left" if candidate_left(client, name, n) == better else "right"
                choose(client, name, n, side if votes[pair] else "same")
    out = tmp_path / "export"
    assert program(study, "--out", path, "--export", out) == 0
    about = json.loads((out / "study.json").read_text())
    assert (about["baseline"], about["candidate"], about["pairs"]) == ("baseline", "candidate", N)

    def figures(found):
        return found["wins"], found["ties"], found["losses"]

    assert figures(about["participants"]["ann"]) == (N - 1, 1, 0) and figures(about["participants"]["bob"]) == (1, 0, 2)
    assert figures(about["all"]) == (N, 1, 2) and figures(about["majority"]) == (N - 3, 3, 0)
    assert about["all"].items() >= win_rate([1] * N + [0] + [-1] * 2, [0] * (N + 3)).items()
    assert about["all"]["percent"] == pytest.approx(100 * N / (N + 2))
    low, high = about["all"]["ci95_ties_half"]
    assert low < about["all"]["percent_ties_half"] < high
    assert about["all"]["percent_ties_half"] == pytest.approx(100 * (N + 0.5) / (N + 3))
    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines if "tie" not in line] == PROMPTS[2:-1]
    assert len(lines) == N and len(read_rankings(out / "pairs.jsonl")) == N      # with the ties of two people
    assert "ann" in capsys.readouterr().out

    # bob is of another mind about pair 0 now, and alone with pair N - 1.
    for n, (pair, _) in enumerate(opened.order("bob"), 1):
        if pair in (0, N - 1):
            choose(client, "bob", n, "left" if candidate_left(client, "bob", n) == (pair == 0) else "right")
    assert program(study, "--out", path, "--export", out) == 0
    data = tmp_path / "data"
    assert program(build_dataset, "--model", tiny, "--from-pairs", out / "pairs.jsonl", "--out", data) == 0
    rows = [row for file in sorted(data.glob("pairs-*.jsonl")) for row in read_lines(file)]
    assert [row["prompt"] for row in rows] == [PROMPTS[i] for i in range(N) if i != 1]
    for i, row in enumerate(rows):
        reds = [Image.open(data / f"images/{row['id']}_{side}.png").getpixel((0, 0)) == RED for side in "wl"]
        assert reds == ([False, True] if i == N - 2 else [True, False])
    assert program(study, "--out", path, "--export", evaluation.parent / "tuned") == 2


def test_exported_pictures_are_those_that_were_shown(evaluation, program, tmp_path):
    """Though two of them have the same name, in folders of their own."""
    folder, path, out = shutil.copytree(evaluation, tmp_path / "eval"), tmp_path / "study.db", tmp_path / "export"
    names = [f"{i}/same.png" for i in range(N)]
    for i, name in enumerate(names):
        for side in ("baseline", "candidate"):
            write_png(folder / "images" / side / name, Image.new("RGB", (32, 32), (i, i, side == "candidate")))
    rows = [{"file": name, "prompt": prompt} for name, prompt in zip(names, PROMPTS)]
    (folder / "scores-baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(about | {"sides": {"baseline": "x", "candidate": "y"}}))
    client = make_app(open_study(path, folder), path).test_client()
    for n in range(1, N + 1):
        blue = Image.open(io.BytesIO(client.get(f"/picture/{n}/left?name=ann").data)).getpixel((0, 0))[2]
        choose(client, "ann", n, "left" if blue else "right")
    assert program(study, "--out", path, "--export", out) == 0
    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    for key, blue in (("winner", 1), ("loser", 0)):
        assert [Image.open(out / line[key]).getpixel((0, 0)) for line in lines] == [(i, i, blue) for i in range(N)]


def test_an_export_touches_nothing_of_others(begun, evaluation, program, tmp_path, capsys):
    """Not another study's export, whose list would stand over these pictures, and nothing that a link leads to."""
    path, client = begun
    choose(client, "ann", 1, "left")
    out = tmp_path / "export"
    assert program(study, "--out", path, "--export", out) == 0
    picture = next(out.glob("images/baseline/*"))
    (tmp_path / "mine.png").write_bytes(b"mine")
    picture.unlink()
    picture.symlink_to(tmp_path / "mine.png")
    assert program(study, "--out", path, "--export", out) == 0
    assert (tmp_path / "mine.png").read_bytes() == b"mine" and Image.open(picture).size == (32, 32)

    folder, other = shutil.copytree(evaluation, tmp_path / "eval"), tmp_path / "other.db"
    Image.new("RGB", (32, 32)).save(folder / "images/baseline/00003.png")
    choose(make_app(open_study(other, folder), other).test_client(), "ann", 1, "left")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert program(study, "--out", other, "--export", out) == 2
    assert "another study's; choose another --export" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


# What is refused

def test_other_pictures_and_files_are_refused_in_a_line(begun, evaluation, program, tmp_path, capsys):
    path, _ = begun

    def refused(*arguments) -> str:
        assert program(study, *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("study.py: ") and said.count("\n") == 1
        return said

    def changed(name, change) -> Path:
        folder = tmp_path / name
        shutil.copytree(evaluation, folder)
        change(folder)
        return folder

    def three_sides(folder):
        about = json.loads((folder / "report.json").read_text())
        about["sides"]["more"] = about["sides"]["candidate"]
        (folder / "report.json").write_text(json.dumps(about))

    def resized(folder):
        Image.new("RGB", (40, 32)).save(folder / "images/baseline/00003.png")

    def redrawn(folder):
        Image.new("RGB", (32, 32)).save(folder / "images/baseline/00003.png")

    assert "no such folder" in refused("--eval", tmp_path / "no", "--out", path)
    assert "no finished evaluation" in refused(
        "--eval", changed("unfinished", lambda folder: (folder / "report.json").unlink()), "--out", path)
    assert "of scorers, not of pictures" in refused("--eval", changed(
        "judges", lambda folder: (folder / "report.json").write_text('{"pairs": 3}')), "--out", tmp_path / "new.db")
    assert "32x32 and 40x32" in refused("--eval", changed("resized", resized), "--out", path)
    assert "00002.png" in refused("--eval", changed(
        "lost", lambda folder: (folder / "images/baseline/00002.png").unlink()), "--out", path)
    assert "begun with other" in refused("--eval", changed("redrawn", redrawn), "--out", path)
    several = changed("several", three_sides)
    assert "--sides baseline,candidate" in refused("--eval", several, "--out", tmp_path / "new.db")
    assert "it has baseline, candidate, more" in refused("--eval", several, "--sides", "more,x", "--out", path)
    assert "begun with other" in refused("--eval", several, "--sides", "baseline, more", "--out", path)
    assert "no study in it yet" in refused("--out", tmp_path / "new.db")
    assert "no answers" in refused("--out", path, "--export", tmp_path / "export")
    (tmp_path / "text.db").write_text("not a database, and longer than its header " * 9)
    assert "not a database" in refused("--eval", evaluation, "--out", tmp_path / "text.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE photos (name TEXT)")
    assert "something else" in refused("--eval", evaluation, "--out", tmp_path / "other.db")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in refused("--eval", evaluation, "--out", path, "--port", port)
    assert not (tmp_path / "new.db").exists()


def test_damaged_files_are_refused_in_a_line(begun, evaluation, program, tmp_path, capsys):
    folder = shutil.copytree(evaluation, tmp_path / "eval")
    report, scores = (folder / name for name in ("report.json", "scores-baseline.jsonl"))
    whole = {file: file.read_bytes() for file in (report, scores)}
    about = json.loads(whole[report])

    def refused(words, out, *arguments):
        assert program(study, "--out", out, *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("study.py: ") and said.count("\n") == 1 and words in said and "\x1b" not in said, said

    def with_sides(sides) -> bytes:
        return json.dumps(about | {"sides": sides}).encode()

    for file, content, words in (
            (report, b"", "report.json: not JSON"), (report, whole[report][:-9], "report.json: not JSON"),
            (report, b"[" * 100_000, "report.json: not JSON"), (report, b"[]", "report.json: [] where an object"),
            (report, b'{"sides": "caf\xe9"}', "report.json: not JSON or text in UTF-8"),
            (report, with_sides(["baseline", "candidate"]), "of scorers, not of pictures"),
            (report, with_sides({}), "give two of its sides"),
            (report, with_sides({"baseline": "x", "candidate": 3}), "'candidate' is no side"),
            (report, with_sides({"baseline": "x", "../tuned": "x"}), "'../tuned' is no side"),
            (report, with_sides({"baseline": "x", "candidate": "half \ud83d\0"}), "no such picture"),
            (scores, b"", "no picture in it"), (scores, whole[scores][:-9], "line 7: not JSON"),
            (scores, b'{"file": 3, "prompt": "a"}', "line 1: file is 3"),
            (scores, b'{"file": "\\u001b[2J.png", "prompt": "a"}', " [2J.png: no such picture"),
            (scores, b'{"file": "../x.png", "prompt": "a"}', "lies outside the folder")):
        file.write_bytes(content)
        refused(words, tmp_path / "new.db", "--eval", folder)
        file.write_bytes(whole[file])
    link = folder / "images" / "baseline" / "00003.png"              # an export would copy what it leads to
    link.rename(tmp_path / "secret.png")
    link.symlink_to(tmp_path / "secret.png")
    refused("'00003.png' lies outside the folder, or is a link to there", tmp_path / "new.db", "--eval", folder)
    (tmp_path / "secret.png").replace(link)
    report.write_bytes(b"\xef\xbb\xbf" + whole[report])             # a byte order mark does no harm
    open_study(tmp_path / "marked.db", folder)

    path, client = begun
    choose(client, "ann", 1, "left")
    for change, words in (
            ("UPDATE answers SET preferred = 'other'", "an answer ('ann', "),
            ("UPDATE answers SET pair = 99", ", 99, "), ("UPDATE answers SET pair = 'x'", "'x'"),
            ("UPDATE answers SET participant = x'ff'", "an answer (b"),
            ("UPDATE study SET folder = NULL", "a damaged database"),
            ("ALTER TABLE study DROP digest", "no such column")):
        broken = shutil.copy(path, tmp_path / "broken.db")
        with sqlite3.connect(broken) as db:
            db.execute(change)
        db.close()
        refused(words, broken, "--export", tmp_path / "export")
    refused("unable to open", tmp_path, "--eval", evaluation)
    for port in (-1, 65536, "http"):
        refused("must be a whole number from 0 to 65535", path, "--port", port)


def test_a_lost_picture_stops_no_page_and_names_no_file(evaluation, tmp_path, capsys):
    folder, path = shutil.copytree(evaluation, tmp_path / "eval"), tmp_path / "study.db"
    client = make_app(open_study(path, folder), path).test_client()
    for file in (folder / "images/baseline").glob("*.png"):
        file.unlink()
    answers = [client.get(f"/picture/1/{side}?name=ann") for side in ("left", "right")]
    assert sorted(answer.status_code for answer in answers) == [200, 500]
    assert not any(b".png" in answer.data for answer in answers if answer.status_code == 500)
    said = capsys.readouterr().err
    assert said.startswith("study.py: ") and said.endswith(": no such picture\n") and said.count("\n") == 1


def test_without_flask(begun, evaluation, program, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flask", None)
    assert program(study, "--eval", evaluation, "--out", begun[0]) == 2
    assert capsys.readouterr().err == 'study.py: the page needs Flask: pip install "hg-dpo[study]"\n'


# In a browser

@pytest.fixture
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium (or google-chrome) and chromedriver")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def served(path, *arguments):
    """The program itself -> its process, and its address."""
    process = subprocess.Popen(
        [sys.executable, "study.py", "--out", str(path), *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    said = process.stdout.readline()
    assert f"{N} pairs of baseline and candidate at http://127.0.0.1:" in said, said + process.stdout.read()
    return process, said.split(" at ")[1].split(",")[0]


def test_in_a_browser(browser, evaluation, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    path = tmp_path / "study.db"
    process, address = served(path, "--eval", evaluation, "--port", 0)
    try:
        def body() -> str:
            return browser.execute_script("return document.body ? document.body.innerText : ''")

        def until(text: str) -> None:
            end = time.monotonic() + 60
            # `ready` is the page's own: a choice counts from shortly after both pictures are there.
            while text not in body() or not browser.execute_script("return typeof ready === 'undefined' || ready"):
                assert time.monotonic() < end, f"{text!r} is not on the page: {body()!r}"
                time.sleep(0.05)

        def press(key) -> None:
            browser.find_element(By.TAG_NAME, "body").send_keys(key)

        def click(choice) -> None:
            browser.find_element(By.CSS_SELECTOR, f"button[value={choice}]").click()

        browser.get(address)
        browser.find_element(By.NAME, "name").send_keys("Ann Example", Keys.ENTER)
        until(f"1 of {N}")
        sizes = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.width, i.x, i.y])")
        assert [size[0] for size in sizes] == [32, 32] and all(size[1] > 150 for size in sizes)          # enlarged
        assert sizes[0][2] < sizes[1][2] and sizes[0][3] == sizes[1][3]                                  # side by side
        browser.execute_script(                # the second click of a double-click
            "const one = document.querySelector('[value=left]'); one.click(); one.click()")
        until(f"2 of {N}")
        browser.refresh()
        until(f"2 of {N}")
        press(Keys.ARROW_RIGHT)
        until(f"3 of {N}")
        press(Keys.ARROW_DOWN)
        until(f"4 of {N}")
        answers = rows_of(path)
        assert len(answers) == 3 and answers[2][2] is None
        browser.find_element(By.ID, "back").click()
        until(f"3 of {N}")
        click("right")                         # of another mind
        until(f"4 of {N}")
        press(Keys.BACKSPACE)
        until(f"3 of {N}")
        assert browser.find_element(By.CSS_SELECTOR, "button.chosen").get_attribute("value") == "right"
        browser.find_element(By.LINK_TEXT, "Go on").click()
        until(f"4 of {N}")
        assert len(rows_of(path)) == 3 and rows_of(path)[-1][2] is not None

        process.kill()                         # nothing is lost; the page goes on with another server at its place
        process.wait()
        process, _ = served(path, "--port", address.rstrip("/").rpartition(":")[2])
        click("same")
        for n in range(5, N + 1):
            until(f"{n} of {N}")
            press(Keys.ARROW_LEFT)
        until("Thank you, Ann Example!")
        assert [name for name, *_ in rows_of(path)] == ["Ann Example"] * N
        browser.set_window_size(390, 844)      # a phone's
        browser.find_element(By.LINK_TEXT, "Back to the last pair").click()
        until(f"{N} of {N}")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert [entry["message"] for entry in browser.get_log("browser")] == []
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "stopped; every answer is in" in said and "Traceback" not in said
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
