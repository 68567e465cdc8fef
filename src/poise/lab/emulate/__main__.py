"""``python -m poise.lab.emulate --cluster 2x4 --intra 200e6 --inter 50e6 -- script.py args``, or ``--selftest``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from poise.lab.emulate.launch import run
from poise.lab.emulate.selftest import SIZES, selftest
from poise.lab.emulate.spec import EmulatedCluster, parse_shape
from poise.machine.cluster import Cluster
from poise.util.errors import InputError, OptionError, PoiseError
from poise.util.files import check_output, write_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script or the self-test.

    0 if all is well, 1 if a rank failed, time ran out or others kept the machine too busy to tell, 2 for wrong input.
    """
    options = parser().parse_args(argv)
    try:
        spec = spec_of(options)
        if options.selftest:
            if options.output:
                check_output(options.output, OptionError)
            result = selftest(
                spec, sizes=[int(size * 2**20) for size in options.sizes], find_limit=not options.no_limit
            )
            if options.output:
                write_whole(options.output, f"{result.to_json()}\n", OptionError)
            print(result.to_json() if options.json else result)
            return 1 if result.inconclusive else 0
        if not options.command:
            raise OptionError("no script to run", hint="-- script.py args, or --selftest")
        run(spec, options.command[0], options.command[1:], timeout=options.timeout)
        return 0
    except PoiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m poise.lab.emulate", description=__doc__)
    out.add_argument("--cluster", required=True, help="NxD; with --dilation any cluster: 2x8:h100, or a YAML file")
    out.add_argument("--intra", type=float, help="bytes/s of a device's port into its node (default: no limit)")
    out.add_argument("--inter", type=float, help="bytes/s of a device's network port (default: no limit)")
    out.add_argument("--nic-shared", action="store_true", help="--inter is of a node, not of a device")
    out.add_argument("--dilation", type=float, help="take the cluster's own links, this many times slower")
    out.add_argument("--limit", type=float, help="bytes/s all ports may have together (see --selftest)")
    out.add_argument("--timeout", type=float, default=600.0, help="seconds (default: 600)")
    out.add_argument("--selftest", action="store_true", help="measure what the machine holds instead of running")
    out.add_argument(
        "--sizes",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[size / 2**20 for size in SIZES],
        help="MiB a device, of --selftest",
    )
    out.add_argument("--no-limit", action="store_true", help="--selftest without the search for the limit")
    out.add_argument("--output", "-o", help="JSON file of --selftest")
    out.add_argument("--json", action="store_true", help="print --selftest as JSON")
    out.add_argument("command", nargs="*", help="script or -m module, and its arguments, after --")
    return out


def spec_of(options: argparse.Namespace) -> EmulatedCluster:
    """The emulated cluster the options ask for."""
    if options.dilation is not None:
        if options.intra is not None or options.inter is not None or options.nic_shared:
            raise OptionError("--dilation takes the links of the cluster; --intra, --inter, --nic-shared set them")
        return EmulatedCluster.from_cluster(
            Cluster.parse(options.cluster), options.dilation, limit_bytes_per_s=options.limit
        )
    nodes, devices = parse_shape(options.cluster)
    limit = {} if options.limit is None else {"limit_bytes_per_s": options.limit}
    return EmulatedCluster(nodes, devices, options.intra, options.inter, nic_shared=options.nic_shared, **limit)


if __name__ == "__main__":
    sys.exit(main())
