"""`shoal serve MODEL`: the model behind an OpenAI-shaped API and a chat page, until Ctrl-C or SIGTERM."""

import argparse
import ipaddress
import logging
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.cli.accounts import add_db, journals, needs_serve, open_ledger
from shoal.cli.budget import add_memory, open_sized
from shoal.cli.opened import DTYPES, MODEL_HELP, Opened, turns_of
from shoal.cli.sizes import size
from shoal.errors import ConfigError, ResourceError
from shoal.model.gguf_config import is_gguf
from shoal.runtime import cache_root

CLOSE_SECONDS = 10.0  # for the engine's last step

if TYPE_CHECKING:
    from shoal.engine.engine import LocalEngine
    from shoal.engine.turns import Turns
    from shoal.server.http import Server
    from shoal.server.ledger import Ledger


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal serve", description="Serve a model: API, chat page, keys, ledger.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; anything else needs keys")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--name", help="what the API calls the model; default: its run or folder")
    parser.add_argument("--context", type=int, help="most tokens of prompt and completion; default: the model's")
    add_memory(parser)
    parser.add_argument(
        "--cache-disk", metavar="SIZE", help="keep that much of the cache in files too, also for the next start"
    )
    parser.add_argument(
        "--cache-folder", type=Path, metavar="PATH", help="for these files; default ~/.cache/shoal/pages"
    )
    parser.add_argument("--keys", choices=("required", "off"), help="default: off on loopback, required elsewhere")
    parser.add_argument("--prices", metavar="HIT/MISS/OUT", help="dollars a million tokens, like 0.07/0.27/1.10")
    parser.add_argument("--speculate", type=int, default=0, metavar="N", help="draft N tokens ahead; default 0")
    parser.add_argument("--deterministic", action="store_true", help="answers that don't depend on the batch; slower")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait; default 256")
    parser.add_argument("--drain", type=float, default=30.0, metavar="S", help="seconds to finish after SIGTERM")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default bfloat16")
    parser.add_argument("--threads", type=int, help="default: one a core")
    add_db(parser)
    args = parser.parse_args(argv)
    required = keys_required(args.host, args.keys)
    on_disk = None if args.cache_disk is None else size(args.cache_disk)
    args.port = free_port(args.host, args.port)
    try:
        import shoal.server.http  # noqa: F401  # before the weights are read: a missing package is said at once
    except ModuleNotFoundError as e:
        raise needs_serve(e) from None
    from shoal.server.ledger import Prices

    prices = None if args.prices is None else Prices.parse(args.prices)
    ledger = open_ledger(args.db)
    opened, cache = open_sized(args, args.threads, args.context)
    turns = turns_of(opened)
    engine = make_engine(opened, cache, on_disk, args)
    name = args.name or model_name(opened.folder)
    if prices is not None:
        ledger.set_prices(name, prices)
    server = make_server(name, engine, turns, ledger, required, args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    tell(server, required, ledger, args)
    try:
        server.run()
    finally:
        engine.close(CLOSE_SECONDS)
        turns.close()
        ledger.close()
    return 0 if server.started else 1


def keys_required(host: str, keys: str | None) -> bool:
    """Off loopback keys are required: whoever reaches the port would compute at your cost."""
    near = loopback(host)
    if keys == "off" and not near:
        fix = "leave --keys out, and make one with `shoal keys new`"
        raise ConfigError(f"--keys off on {host}", "keys wherever others can reach the server", fix)
    return not near if keys is None else keys == "required"


def loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int) -> int:
    """This one, or for 0 one that is free. Said before the weights are read, not after."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise ResourceError(f"{host} port {port}: {why}", "an address that is free here", "try --port 0") from None


def make_engine(opened: Opened, cache: int | None, on_disk: int | None, args: argparse.Namespace) -> "LocalEngine":
    from shoal.engine.disk import Disk, maker
    from shoal.engine.engine import LocalEngine

    folder = args.cache_folder or cache_root() / "pages"
    return LocalEngine(
        opened.model,
        cache,
        context=args.context,
        speculate=args.speculate,
        deterministic=args.deterministic,
        disk=None if on_disk is None else Disk(folder, on_disk, maker(opened.folder)),
        unchanged=opened.unchanged,
    )


def make_server(
    name: str,
    engine: "LocalEngine",
    turns: "Turns",
    ledger: "Ledger",
    required: bool,
    args: argparse.Namespace,
) -> "Server":
    from shoal.server.auth import Keys
    from shoal.server.http import Server, build
    from shoal.server.limits import Limits
    from shoal.server.service import Service

    limits = Limits(queue=args.queue, drain_seconds=args.drain)
    service = Service(engine, turns, name, ledger, journals(ledger), Keys(required), limits)
    return Server(service, build(service, frozenset({args.host.lower()})), args.host, args.port)


def model_name(folder: Path) -> str:
    """A checkpoint goes by its run's name, a GGUF file by its own without the ending."""
    folder = folder.resolve()
    if is_gguf(folder):
        return folder.stem
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def tell(server: "Server", required: bool, ledger: "Ledger", args: argparse.Namespace) -> None:
    service, say = server.service, partial(print, flush=True)
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{host}:{args.port}"
    say(f"{service.name}: context {service.engine.context:,} tokens")
    say(f"chat page {where}/    API {where}/v1    metrics {where}/metrics")
    if required and not any(key["revoked"] is None for key in ledger.all_keys()):
        say("keys are required, and there are none yet: shoal keys new NAME")
    elif not required:
        say("keys are off: only this machine can reach it")
    if not any(service.prices):
        say("no prices are set, so usage costs nothing: --prices HIT/MISS/OUT in dollars a million tokens")
