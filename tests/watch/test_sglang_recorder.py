"""The recorder's HTTP side against a server that answers as told: order, keys, refusals, engines that come and go."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tests.watch.test_sources import read

from poise.engines import sglang
from poise.planning.placement import Placement
from poise.routing.trace import LoadProfile
from poise.util.errors import OptionError
from poise.watch.sglang_recorder import FIRST_RETRY_S, SGLangRecorder
from poise.watch.sources import DumpFolder, recorded_steps

GOOD = {"expert_distribution_recorder_mode": "stat", "ep_size": 4, "ep_num_redundant_experts": 4, "enable_eplb": False,
        "init_expert_location": "trivial"}  # fmt: skip
START, STOP, DUMP = (f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))
INFO = "/server_info"


class Engine(ThreadingHTTPServer):
    """Answers with ``replies`` by path; a dump writes a file. ``asked`` are the requests with their keys."""

    daemon_threads = True

    def __init__(self, folder, port=0):
        self.folder, self.asked, self.settings = folder, [], dict(GOOD)
        self.replies, self.silent = {}, False
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.shutdown()
        self.server_close()

    def paths(self):
        out, self.asked = [f"{method} {path}" for method, path, _ in self.asked], []
        return out

    def reply(self, path):
        if path in self.replies:
            return self.replies[path]
        if path == INFO:
            return 200, json.dumps(self.settings)
        if path == DUMP and not self.silent:
            (self.folder / f"d{len(list(self.folder.iterdir()))}").write_text(json.dumps(np.ones((2, 3, 8)).tolist()))
        return 200, "as SGLang says\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        status, text = self.server.reply(self.path)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def engine(tmp_path):
    server = Engine(tmp_path)
    yield server
    server.close()


def recorder(engine, **options):
    options = {"num_devices": 4, "timeout_s": 5.0, **options}
    return SGLangRecorder(engine.url + "/", DumpFolder(engine.folder, read=read), **options)


def test_it_records_between_looks_and_leaves_the_recorder_stopped(engine):
    (engine.folder / "old").write_text("from before")
    source = recorder(engine)
    first, second = source.poll(), source.poll()
    assert engine.paths() == [
        f"GET {INFO}",
        f"POST {START}",
        f"GET {INFO}",
        f"POST {STOP}",
        f"POST {DUMP}",
        f"POST {START}",
    ]
    assert first.up and first.arrivals == () and first.dumps == 0
    assert second.dumps == 1 and second.arrivals[0].steps.num_steps == 2 and second.wait_s is None
    source.close()
    source.close()
    assert engine.paths() == [f"GET {INFO}", f"POST {STOP}"]


def test_keys_go_where_they_belong(engine):
    source = recorder(engine, api_key="one", admin_api_key="two")
    source.poll()
    assert [key for _, _, key in engine.asked] == ["Bearer one", "Bearer two"]
    engine.asked.clear()
    recorder(engine, api_key="one").poll()
    assert [key for _, _, key in engine.asked] == ["Bearer one", "Bearer one"]
    engine.asked.clear()
    recorder(engine).poll()
    assert [key for _, _, key in engine.asked] == [None, None]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("path", [INFO, START])
def test_a_refused_key_is_said(engine, status, path):
    engine.replies[path] = status, '{"error": "Unauthorized"}'
    source = recorder(engine)
    with pytest.raises(OptionError, match=f"refuses with {status}"):
        source.poll()
    source.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"expert_distribution_recorder_mode": None}, "without its recorder"), ({"expert_distribution_recorder_mode": "per_token"}, "'per_token'"),
     ({}, "does not say whether it records"), ({"enable_eplb": True}, "rebalances by itself"), ({"ep_size": 8}, "8 expert-parallel ranks, the cluster has 4")],
)  # fmt: skip
def test_an_engine_that_must_not_be_recorded_is_not_asked(engine, settings, words):
    engine.settings = settings if not settings else {**GOOD, **settings}
    with pytest.raises(OptionError, match=words):
        recorder(engine).poll()
    assert engine.paths() == [f"GET {INFO}"]


@pytest.mark.parametrize("settings", [{"expert_distribution_recorder_mode": None}, {"enable_eplb": True}])
def test_an_engine_started_anew_with_other_settings_is_not_asked_either(engine, settings):
    """Nor when leaving: the request to stop would end it, or stop its own rebalancing."""
    source, leaving = recorder(engine), recorder(engine)
    source.poll()
    leaving.poll()
    engine.paths()
    engine.settings.update(settings)
    with pytest.raises(OptionError):
        source.poll()
    source.close()
    assert engine.paths() == [f"GET {INFO}"]
    leaving.close()
    assert engine.paths() == [f"GET {INFO}"]


def test_a_start_anew_is_met(engine):
    source = recorder(engine)
    engine.settings["random_seed"] = 1

    def restarted():
        return source.poll().restarted

    assert [restarted(), restarted()] == [False, False]
    for settings in ({"random_seed": 2}, {"init_expert_location": "/maps/map.json"}):
        engine.settings.update(settings)
        assert [restarted(), restarted()] == [True, False]
    engine.replies[INFO] = 500, "busy"
    assert not restarted()
    engine.replies.clear()
    assert not restarted()


def test_old_engines_are_asked_by_the_old_name(engine):
    engine.replies[INFO] = 404, "{}"
    engine.replies["/get_server_info"] = 200, json.dumps(GOOD)
    assert recorder(engine).poll().up
    assert engine.paths() == [f"GET {INFO}", "GET /get_server_info", f"POST {START}"]


@pytest.mark.parametrize(
    ("replies", "words"),
    [({INFO: (404, ""), "/get_server_info": (404, "")}, "has neither /server_info nor /get_server_info"),
     ({INFO: (200, "hello")}, "does not answer with JSON"), ({INFO: (200, "[]")}, "answers with list"),
     ({START: (500, "disabled")}, "answers 500: disabled"), ({START: (404, "")}, "answers 404"),
     ({INFO: (302, "http://127.0.0.1:1/elsewhere")}, "answers 302")],
)  # fmt: skip
def test_other_answers_are_told_and_tried_again(engine, replies, words):
    engine.replies.update(replies)
    source = recorder(engine, api_key="secret")
    got = source.poll()
    assert not got.up and words in got.problems[0] and got.wait_s == FIRST_RETRY_S
    engine.replies.clear()
    assert source.poll().up


def test_an_engine_that_is_down_is_waited_for(tmp_path):
    engine = Engine(tmp_path)
    source, port = recorder(engine), engine.server_port
    source.poll()
    engine.close()
    down = [source.poll() for _ in range(3)]
    assert [got.wait_s for got in down] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S] and not any(
        got.up for got in down
    )
    assert all("no answer from" in got.problems[0] for got in down)
    engine = Engine(tmp_path, port)
    try:
        got = source.poll()
        assert got.up and got.restarted and engine.paths() == [f"GET {INFO}", f"POST {START}"]
        engine.close()
        source.close()  # gone: nothing to stop
    finally:
        engine.server_close()


def test_a_dump_that_never_comes_is_told_once(engine):
    engine.silent = True
    source = recorder(engine)
    told = [source.poll().problems for _ in range(5)]
    assert [len(each) for each in told] == [0, 0, 1, 0, 0] and "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR" in told[2][0]


def test_the_start_is_what_the_engine_was_started_with(engine, tmp_path):
    steps = recorded_steps(LoadProfile(np.ones((2, 3, 8)), layer_ids=np.array([1, 2, 5])))
    source = recorder(engine)
    assert source.first_placement(steps, 4) is None
    source.poll()
    start = source.first_placement(steps, 4)
    assert start.slot_expert_LS.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    ] * 3 and start.layer_ids_L.tolist() == [1, 2, 5]
    whole = Placement(np.tile(np.arange(8)[::-1], (6, 1)), np.repeat(np.arange(4), 2), 8, 4)
    sglang.write(whole, tmp_path / "map.json", num_hidden_layers=6)
    engine.settings["init_expert_location"] = str(tmp_path / "map.json")
    source.poll()
    np.testing.assert_array_equal(source.first_placement(steps, 4).slot_expert_LS, whole.slot_expert_LS)
    for location in (str(tmp_path / "none.json"), str(tmp_path / "map.pt"), '{"physical_to_logical_map": []}'):
        engine.settings["init_expert_location"] = location
        source.poll()
        with pytest.raises(OptionError, match="--init-expert-location"):
            source.first_placement(steps, 4)
    engine.settings.update(init_expert_location="trivial", ep_num_redundant_experts=3)
    source.poll()
    with pytest.raises(OptionError, match="11 slots cannot be shared evenly by 4"):
        source.first_placement(steps, 4)


@pytest.mark.parametrize(
    "url", ["", "localhost:30000", "ftp://a", "http://", "http://u:p@host", "http://host:port", "http://h?x=1"]
)
def test_addresses(tmp_path, url):
    with pytest.raises(OptionError, match="no address"):
        SGLangRecorder(url, DumpFolder(tmp_path, read=read), num_devices=4)
