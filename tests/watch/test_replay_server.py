"""The replay server as docs/watch.md tells people to use it."""

import json

from tests.watch.replay_server import Engine


def test_a_restart_needs_a_map(tmp_path):
    engine = Engine(tmp_path / "dumps", tmp_path / "map.json", "")
    status, text = engine.answer("POST", "/replay/restart")
    assert status == 409 and "no map yet" in text and engine.generation == engine.down == 0
    before = json.loads(engine.answer("GET", "/server_info")[1])
    map_LS = engine.map_LS[:, ::-1].tolist()
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": map_LS}))
    assert engine.answer("POST", "/replay/restart") == (200, "restarted\n") and engine.map_LS.tolist() == map_LS
    assert engine.answer("GET", "/server_info") is None
    after = json.loads(engine.answer("GET", "/server_info")[1])
    assert after["init_expert_location"] == str(tmp_path / "map.json")
    assert after["random_seed"] != before["random_seed"]
