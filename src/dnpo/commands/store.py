"""List the stages in a store, verify them, remove those that no run needs, and publish them in a remote store."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dnpo import disk
from dnpo.commands.grammar import Parser, parse, program
from dnpo.errors import DnpoError, StoreError, TrackingError
from dnpo.escape import say, tell
from dnpo.store import Remote, find_damage, inventory
from dnpo.store.inventory import Entry
from dnpo.store.remote import Gone
from dnpo.tracking.client import default_uri
from dnpo.wording import plural

SHOWN = 3  # runs named with each stage


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.store``. Errors that the user can correct become one line and exit status 1."""
    given = parse(_parser(), arguments)
    try:
        status = given.do(given)
    except DnpoError as error:
        _fail(str(error))
    except OSError as error:
        words = disk.explain(error, given.store.absolute())
        if words is None:
            raise
        _fail(f"store={given.store}: {words}")
    except Gone as error:
        _fail(f"remote={given.remote}: {error}")
    except KeyboardInterrupt:
        _fail("interrupted")
    sys.exit(status)


def _fail(message: str) -> None:
    say(f"error: {message}", error=True)
    sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("dnpo.store", "store"),
        description="List, verify, remove or publish the finished stages of runs.",
    )
    commands = parser.add_subparsers(required=True, metavar="list|verify|remove|publish")
    listing = commands.add_parser("list", help="sizes, what made each stage, and which tracked runs need it")
    verifying = commands.add_parser(
        "verify", help="compare every file with the size and SHA-256 in its stage's manifest"
    )
    removing = commands.add_parser(
        "remove",
        help="remove stages that no tracked run needs, or those named; without apply=true or yes=true, only list them",
        description="Without names: every stage that no tracked run needs, unfinished ones too (runs with tracking=off "
        "are not known here, and their stages count as not needed). Without apply=true or yes=true nothing is removed.",
    )
    publishing = commands.add_parser("publish", help="publish finished stages that the remote store does not have")
    for command, do in ((listing, show), (verifying, verify), (removing, remove), (publishing, publish)):
        command.set_defaults(do=do)
        command.add_argument(
            "--store", type=Path, default=Path("store"), help="folder of the stages (default: %(default)s)"
        )
        command.add_argument(
            "--remote",
            metavar="ADDRESS",
            required=command is publishing,
            help="s3://… or file://…, as in store.remote" + ("" if command is publishing else "; instead of store=…"),
        )
    for command in (verifying, removing, publishing):
        without = "all that no tracked run needs" if command is removing else "all"
        command.add_argument(
            "names", nargs="*", metavar="STAGE/KEY", help=f"as list shows them; without any, {without}"
        )
    uri = default_uri()
    for command in (listing, removing):
        command.add_argument(
            "--uri", action="append", help=f"where runs were tracked; can be given again (default: {uri})"
        )
    listing.add_argument("--wide", action="store_true", help="name the runs and what made each stage in the table")
    removing.add_argument("--apply", action="store_true", help="remove, after asking")
    removing.add_argument("--yes", action="store_true", help="remove without a question")
    removing.add_argument("--needed", action="store_true", help="remove named stages even if runs need them")
    return parser


def show(given: argparse.Namespace) -> int:
    """Print all stages."""
    if given.remote:
        entries = inventory.read_remote(Remote(given.remote), [], digests=False)
        _print(entries, {}, given.wide)
        say(f"{_count(entries)}, {_bytes(sum(entry.size for entry in entries))}")
        return 0
    entries = inventory.read_store(given.store)
    try:
        needs = inventory.find_needs(entries, _tracked(given))
    except TrackingError as error:
        tell(f"which runs need them is unknown: {error}\n")
        needs = {}
    _print(entries, needs, given.wide)
    if needs:
        tell(f"{_count(entries)}, {_bytes(sum(entry.size for entry in entries))}")
        if not given.wide:
            tell("runs: how many tracked runs need the stage; wide=true names them")
    return 0


def verify(given: argparse.Namespace) -> int:
    """Read all files of the stages and compare them with their manifests; 1 if some are damaged."""
    if given.remote:
        chosen = inventory.read_remote(Remote(given.remote), given.names, digests=True)
    else:
        entries = inventory.read_store(given.store)
        chosen = [each for each in inventory.select(entries, given.names) or entries if each.finished]
    damaged, unknown = 0, 0
    for entry in chosen:
        damage = entry.damage if given.remote else find_damage(entry.folder, digests=True)
        damaged += bool(damage)
        if damage:
            tell(f"damaged     {entry.name}: {'; '.join(damage)}", hang=12)
        elif "files" not in entry.content:
            unknown += 1
            tell(
                f"unverified  {entry.name}: an earlier version of dnpo wrote it, without digests of its files", hang=12
            )
    size = sum(entry.size for entry in chosen)
    tell(f"{_count(chosen)}, {_bytes(size)}: {damaged} damaged, {unknown} unverified, the others intact")
    if damaged:
        where = f"remote={given.remote}" if given.remote else f"store={shlex.quote(str(given.store))}"
        say(f"dnpo store remove STAGE/KEY {where} yes=true removes one; a run computes it again")
    return int(damaged > 0)


def remove(given: argparse.Namespace) -> int:
    """Remove stages, or show which would be removed."""
    remote = Remote(given.remote) if given.remote else None
    if remote is not None and not given.names:
        raise StoreError("remote: name the stages to remove; which of them runs elsewhere need is not known here")
    if remote is not None:
        chosen = inventory.read_remote(remote, given.names, digests=False)
    else:
        chosen = _choose(given, inventory.read_store(given.store))
    if not chosen:
        tell("nothing to remove: every stage is needed by a tracked run")
        return 0
    _print(chosen, {})
    size = f"{_count(chosen)}, {_bytes(sum(entry.size for entry in chosen))}"
    if not (given.apply or given.yes):
        tell(f"\n{size}. Nothing was removed: apply=true removes them after a question, yes=true without one")
        return 0
    if not given.yes and not _agrees(f"\nRemove {size}? [y/N] "):
        say("nothing was removed")
        return 1
    for entry in chosen:
        if remote is not None:
            remote.remove(entry.name)
        else:
            inventory.remove(entry)
    say(f"removed {size}")
    return 0


def publish(given: argparse.Namespace) -> int:
    """Publish finished stages that the remote store does not have; 1 if some are damaged here."""
    entries, remote = inventory.read_store(given.store), Remote(given.remote)
    chosen = [each for each in inventory.select(entries, given.names) or entries if each.finished]
    damaged = new = 0
    for entry in chosen:
        damage = find_damage(entry.folder, digests=True)
        if damage:
            damaged += 1
            tell(f"damaged     {entry.name}: {'; '.join(damage)}", hang=12)
        elif "files" in entry.content and remote.publish(entry.name, entry.content, entry.folder):
            new += 1
            say(f"published   {entry.name}")
    tell(f"{_count(chosen)}: {new} published, {damaged} damaged, the others are published already or have no digests")
    return int(damaged > 0)


def _choose(given: argparse.Namespace, entries: Sequence[Entry]) -> list[Entry]:
    """Return the stages to remove.

    Raises:
        DnpoError: a named stage is undamaged and a run needs it; or no stage is named and not all runs are known.
    """
    if given.names:
        named = inventory.select(entries, given.names)
        whole = [entry for entry in named if not find_damage(entry.folder, digests=True) or not entry.finished]
        if not whole or given.needed:
            return named
        needs = inventory.find_needs(entries, _tracked(given))
        for entry in whole:
            if needs[entry.name]:
                raise StoreError(
                    f"{entry.name}: is intact, and needed by {_name(needs[entry.name])}; needed=true removes it anyway"
                )
        return named
    unread = [entry.name for entry in entries if entry.finished and not entry.content]
    if unread:
        raise StoreError(
            f"{', '.join(unread)}: damaged, so what it was made from is not known; remove it by its name first"
        )
    runs = _tracked(given)
    elsewhere = _other_places(given)
    if elsewhere:
        raise StoreError(
            f"uri: stages of this store are also tracked in {', '.join(elsewhere)}; give uri=… for each of them, or "
            "the names of the stages to remove"
        )
    needs = inventory.find_needs(entries, runs)
    return [entry for entry in entries if not needs[entry.name]]


def _tracked(given: argparse.Namespace) -> dict[str, set[str]]:
    from dnpo.tracking.reading import read_stage_keys

    runs: dict[str, set[str]] = {}
    for uri in _uris(given):
        runs |= read_stage_keys(uri)
    return runs


def _uris(given: argparse.Namespace) -> list[str]:
    return given.uri or [default_uri()]


def _other_places(given: argparse.Namespace) -> list[str]:
    """Return the tracking stores that track stages of this store but are not given."""
    from dnpo.tracking.client import make_absolute, strip_password
    from dnpo.tracking.writing import TrackedSteps

    known = {strip_password(make_absolute(uri)) for uri in _uris(given)}
    return sorted(TrackedSteps.places(given.store) - known)


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # the standard input is closed
        say()
        return False


def _print(entries: Sequence[Entry], needs: Mapping[str, Sequence[str]], wide: bool = False) -> None:
    """Print a line for each stage. To fit 80 columns, runs are counted, and makers have numbers, explained below.

    Args:
        needs: the runs that need each stage; empty if that is not known.
        wide: whether to name runs and makers in the table.
    """
    from rich.text import Text

    from dnpo.running.console import Console
    from dnpo.screen import ScreenTable

    table, console = ScreenTable(box=None, pad_edge=False, header_style="bold"), Console()
    runs = ("needed by" if wide else "runs",) if needs else ()
    for heading in ("stage", "size", "made", *runs, "by", "what"):  # the last one may be cut
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("size", "runs") else "left")
    makers = list(dict.fromkeys(maker for entry in entries if (maker := _maker(entry))))
    for entry in entries:
        maker, needing = _maker(entry), needs.get(entry.name, ())
        title, made = str(entry.content.get("title", "")), str(entry.content.get("started", "")).replace("T", " ")
        if not wide:  # the stage's name says the rest of its title
            title = title.rpartition(" · ")[0] or title
        cells = [entry.name, _bytes(entry.size), made[:16] if wide else made[:10]]
        cells += [_name(needing) if wide else str(len(needing))] if needs else []
        cells += [maker if wide else str(makers.index(maker) + 1) if maker else ""]
        what = title if entry.finished else "unfinished"
        table.add_row(*map(Text, [*cells, f"damaged: {'; '.join(entry.damage)}" if entry.damage else what]))
    if wide:
        console.table(table, split=True)
        return
    console.table_cut(table)
    for number, maker in enumerate(makers, 1):
        console.tell(f"by {number}: {maker}", hang=6)


def _maker(entry: Entry) -> str:
    """Versions, commit and device of the process that made a stage; empty if that is not known."""
    made = entry.content.get("made_by", {})
    if not made:
        return ""
    commit = f"{made['commit'][:8]}{'+' * made['commit'].endswith('+')}"
    packages = [f"{name} {made[name]}" for name in ("torch", "transformers") if name in made]
    return ", ".join(filter(None, [f"dnpo {made['dnpo']}", commit, *packages, made.get("device", "")]))


def _name(runs: Sequence[str]) -> str:
    more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    return f"{', '.join(runs[:SHOWN])}{more}" if runs else "no run"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _count(entries: Sequence[Entry]) -> str:
    return plural(len(entries), "stage")
