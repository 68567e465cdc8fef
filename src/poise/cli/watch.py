"""poise watch: a placement that follows the traffic of a growing trace, a folder of dumps, or a serving engine."""

from __future__ import annotations

from contextlib import ExitStack, closing

from poise.cli import options as o
from poise.cli.ending import WatchEnding
from poise.cli.watch_options import WatchOptions
from poise.cli.watch_output import Teller, say_listening
from poise.util.errors import TraceError
from poise.watch.board import Board
from poise.watch.metrics import Metrics
from poise.watch.page import Page, answers, listen_address
from poise.watch.service import Service
from poise.watch.sources import Tail

GENERIC = "no model was named (--model), so sizes are generic: gains, and what is worth it, are not yours"
STALE_S = 120.0
"""Seconds without a look, beside ten intervals, after which the watch calls itself ill."""


@o.grouped
def watch(*, asked: WatchOptions) -> None:
    """Watch traffic, and plan anew when it drifts and the gain is worth the moves.

    Moves are taken to be made at once; with --export or --sglang a new map serves from the engine's next start on, and
    what runs and what would run after a restart are told apart. Ends with --once at the file's end, else when
    interrupted.

    Example: poise watch trace.npz --cluster 2x8:h100 --redundant 16 --model deepseek-v3 --max-moves 64 -o now.npz

    Beside an engine: poise watch --sglang http://127.0.0.1:30000 --dump-dir /dumps --cluster 1x8:h100
    --model deepseek-v3 --export sglang:/maps/map.json --listen 9464
    """
    with o.errors():
        outputs = asked.written.outputs()
        setup = asked.setup()
        effects = asked.heard.effects(follow=asked.follow)
        source = asked.source(setup)
        ending, generic = WatchEnding(), setup.model is None
        service = Service(source, setup, outputs, measured=asked.shown.listen is not None, whole=ending.later,
                          effects=effects)  # fmt: skip
        with ending, ExitStack() as stack:
            listeners: list[Board | Metrics] = []
            if asked.shown.listen is not None:
                names = ", ".join(str(one.path) for one in outputs)
                about = {"source": asked.recorded.sglang or asked.trace, "cluster": asked.cluster,
                         "model": asked.priced.model or "generic model", "method": asked.control.method,
                         "outputs": names or "writes nothing"}  # fmt: skip
                board, metrics = Board(about, window=asked.control.window), Metrics()
                listeners = [board, metrics]
                answer = answers(board, metrics, stale_s=10 * asked.interval_s + STALE_S)
                page = Page(listen_address(asked.shown.listen), answer, hosts=asked.shown.allow_host or ())
                page.start()
                stack.callback(page.close)
                say_listening(page.url, asked.json)
            if generic:
                o.talk.print(GENERIC)
            teller = Teller(asked.written.output, asked.at_start, asked.json, generic=generic)
            events = service.run(once=not asked.follow, interval_s=asked.interval_s, wait=ending.wait)
            for event in stack.enter_context(closing(events)):
                for listener in listeners:
                    listener.note(event)
                teller.say(event)
        if service.controller is None and not asked.follow and isinstance(source, Tail):
            raise TraceError(f"{asked.trace} holds {source.tokens} rows, less than a step of {source.tokens_per_step}")
        if service.controller is None and not asked.follow:
            raise TraceError(f"{asked.trace} holds no dump with traffic")
        o.talk.print(f"{0 if service.controller is None else service.controller.step} steps watched")
        ending.leave()
