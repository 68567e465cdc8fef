"""SGLang's expert distribution recorder over HTTP: start, wait, stop, dump, read the file that it wrote.

Read in SGLang's ``http_server.py`` and ``eplb/expert_distribution.py`` (0.5.x; 0.5.23 at last). What shaped this file:

- the three endpoints answer POST (and GET) with 200 and a line of text, whatever came of it in most versions;
- where the engine was started without ``--expert-distribution-recorder-mode``, the first of them raises in the
  scheduler, which ends the engine in most versions. So the settings are read first (``/server_info``, before that
  ``/get_server_info``), and nothing is asked of an engine whose settings forbid it or cannot be read;
- ``--enable-eplb`` uses the same recorder for the engine's own rebalancing: stopping it would stop that;
- an engine draws ``random_seed`` when it is started without one: another seed is another start;
- starting what is started clears it, stopping what is stopped does nothing, dumping clears;
- the recorder endpoints take the admin key where there is one, the settings take the ordinary key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poise.engines import sglang
from poise.engines.slots import trivial_placement
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch
from poise.util.errors import CommunicationError, InputError, OptionError, PlacementError
from poise.util.jsonfile import parse_json
from poise.watch.asking import Asker, RefusedError, engine_address
from poise.watch.sources import DumpFolder, Polled

TIMEOUT_S = 60.0
"""Seconds that the answers to one look may take, all together: a dump is written before it is answered."""
LEAVE_S = 2.0
"""The same when leaving."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 30.0
SETTINGS = ("/server_info", "/get_server_info")
START, STOP, DUMP = (f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))
MODES = ("stat", "stat_approx")
"""Recorder modes that count all ranks' tokens step by step in one file."""
KEY = re.compile(r"[ -~]*")
"""What a header can carry, and engines compare with."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engine says about itself.

    Parameters
    ----------
    ep_size : expert-parallel ranks, None: it does not say.
    redundant : redundant slots a layer.
    init_location : its ``--init-expert-location``.
    seed : its random seed, None: it does not say.
    """

    ep_size: int | None
    redundant: int
    init_location: str
    seed: int | None = None

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> EngineSettings:
        """From the answer of ``/server_info``.

        Raises
        ------
        OptionError : the engine was started so that its recorder must not be used.
        """
        if "expert_distribution_recorder_mode" not in answer:
            raise OptionError("the engine does not say whether it records", hint="watch a folder of dumps instead")
        mode = answer["expert_distribution_recorder_mode"]
        if mode is None:
            raise OptionError(
                "the engine was started without its recorder, and asking for it would end it",
                hint="start it with --expert-distribution-recorder-mode stat",
            )
        if mode not in MODES:
            raise OptionError(
                f"the engine records {mode!r:.40}, watching needs {' or '.join(MODES)}",
                hint="start it with --expert-distribution-recorder-mode stat",
            )
        if answer.get("enable_eplb") is True:
            raise OptionError(
                "the engine rebalances by itself (--enable-eplb) with the same recorder",
                hint="start it without --enable-eplb, or watch a folder of dumps",
            )
        ranks, redundant = answer.get("ep_size"), answer.get("ep_num_redundant_experts")
        location, seed = answer.get("init_expert_location"), answer.get("random_seed")
        return cls(
            ranks if type(ranks) is int else None,
            redundant if type(redundant) is int and redundant >= 0 else 0,
            location if isinstance(location, str) else "trivial",
            seed if type(seed) is int else None,
        )


class SGLangRecorder:
    """A source that records between one look and the next. A folder of dumps says where the engine's files come.

    Parameters
    ----------
    url : of the engine, ``http://host:port``.
    folder : the engine's SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, as it is reached from here.
    api_key, admin_api_key : the engine's keys, where it has them.
    num_devices : D, which must be the engine's ``ep_size``.

    Raises
    ------
    OptionError : the address is none, or a key is one that no header can carry.
    """

    def __init__(
        self, url: str, folder: DumpFolder, *, num_devices: int, api_key: str | None = None,
        admin_api_key: str | None = None, timeout_s: float = TIMEOUT_S,
    ) -> None:  # fmt: skip
        self.url = engine_address(url)
        self._folder, self._devices = folder, num_devices
        self._key, self._admin_key = _key("API key", api_key), _key("admin API key", admin_api_key) or api_key
        self._timeout_s, self._until = timeout_s, 0.0
        self._asker = Asker(self.url)
        self._recording = self._refused = self._restarted = False
        self._without_file = 0
        self._retry_s = FIRST_RETRY_S
        self.settings: EngineSettings | None = None
        folder.skip_present()

    def poll(self, *, last: bool = False) -> Polled:
        """Dump what was recorded since the last look, and record on.

        Raises
        ------
        OptionError : the engine's settings do not allow it; no retry would mend that.
        """
        dumped, problem = False, ""
        self._until = time.monotonic() + self._timeout_s
        try:
            self._meet()
            if self._recording:
                self._ask(STOP)
                self._recording = False
                self._ask(DUMP)
                dumped = True
            self._recording = True
            self._ask(START)
        except CommunicationError as error:
            self._recording = False
            problem = error.message
        except OptionError:  # started anew, perhaps so that even stopping its recorder would harm
            self._recording = False
            raise
        return self._read(dumped, problem)

    def first_placement(self, steps: RoutingBatch, num_devices: int) -> Placement | None:
        """What the engine was started with: a map that can be read from here, or slot p holding expert p mod E.

        Raises
        ------
        OptionError : it was started with a map that cannot be read from here.
        """
        if self.settings is None:
            return None
        location, experts = self.settings.init_location, steps.num_experts
        if location != "trivial":
            try:
                if not location.endswith(".json"):
                    raise PlacementError("not a .json file")
                return sglang.read(location, num_devices=num_devices, num_experts=experts)
            except PlacementError as error:
                raise OptionError(
                    f"the engine was started with --init-expert-location {location:.80}: {error.message}",
                    hint="name what it runs with --placement",
                ) from None
        return trivial_placement(experts, experts + self.settings.redundant, num_devices, steps.layer_ids_L)

    def close(self) -> None:
        """Stop recording, if the engine still answers and its settings still allow it."""
        if self._recording:
            self._recording, self._until = False, time.monotonic() + min(LEAVE_S, self._timeout_s)
            try:
                self._meet()
                self._ask(STOP)
            except (CommunicationError, OptionError):  # it is gone, and its recorder with it
                return

    def _read(self, dumped: bool, problem: str) -> Polled:
        got = self._folder.poll(whole=True)  # a dump is answered once it is written
        problems = list(got.problems)
        self._without_file = self._without_file + 1 if dumped and not (got.dumps or got.errors) else 0
        if self._without_file == 2:  # one may come late over a network
            problems.append(
                f"the engine dumped twice, and no file came to {self._folder.folder}: is that its "
                "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR?"
            )
        wait_s = None
        if problem:
            problems.append(problem)
            wait_s, self._retry_s = self._retry_s, min(LONGEST_RETRY_S, 2 * self._retry_s)
        else:
            self._retry_s = FIRST_RETRY_S
        restarted, self._restarted = self._restarted, False
        return Polled(
            got.arrivals, not problem, got.dumps, got.errors, tuple(problems), wait_s, notes=got.notes,
            restarted=restarted,
        )  # fmt: skip

    def _meet(self) -> None:
        """Read the engine's settings, each time: it may have been started anew, with others.

        It was if it has other settings than before, or refused a connection in between.
        """
        for path in SETTINGS:
            try:
                text = self._ask(path, get=True)
                break
            except _NotFound:
                continue
        else:
            raise CommunicationError(f"{self.url} has neither {' nor '.join(SETTINGS)}: is it SGLang?")
        try:
            answer = parse_json(text, InputError)
        except InputError as error:
            said = f"{self.url}{path} does not answer with JSON: is it SGLang? ({error.message})"
            raise CommunicationError(said) from None
        if not isinstance(answer, dict):
            raise CommunicationError(f"{self.url}{path} answers with {type(answer).__name__}, not with settings")
        settings = EngineSettings.parse(answer)
        if settings.ep_size not in (None, self._devices):
            raise OptionError(
                f"the engine runs {settings.ep_size} expert-parallel ranks, the cluster has {self._devices} devices"
            )
        self._restarted |= self.settings is not None and (self._refused or settings != self.settings)
        self.settings, self._refused = settings, False

    def _ask(self, path: str, *, get: bool = False) -> bytes:
        headers = {"Accept": "*/*", "User-Agent": "poise", "Connection": "close"}
        key = self._key if get else self._admin_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            answer = self._asker.ask("GET" if get else "POST", path, headers, until=self._until)
        except RefusedError:
            self._refused = True
            raise
        if answer.status in (401, 403):
            raise OptionError(
                f"{self.url}{path} refuses with {answer.status}", hint="give --api-key, --admin-api-key or both"
            )
        if not 200 <= answer.status < 300:
            text = answer.body[:200].decode("utf-8", "replace").strip()
            said = f"{self.url}{path} answers {answer.status}" + (f": {text}" if text else "")
            raise (_NotFound if answer.status == 404 else CommunicationError)(said)
        return answer.body


class _NotFound(CommunicationError):
    """The engine has no such endpoint."""


def _key(name: str, key: str | None) -> str | None:
    """The key; what a header cannot carry is refused without showing it."""
    if key is not None and not KEY.fullmatch(key):
        raise OptionError(
            f"the {name} has a character that no HTTP header can carry", hint="does it end with a line break?"
        )
    return key
