"""Broken files for every reader: what comes out is success or a MaetError of one line, and nothing else.

    python tests/fuzz.py                      all readers, a minute, a seed of its own
    python tests/fuzz.py pack keys --seconds 600 --seed 7
    python tests/fuzz.py pack --seed 7 --case 123      one case again, with all that is known of it

A case is determined by reader, seed and number. Cases run in forked children, which may die of a signal, of time or of memory."""
import argparse, faulthandler, gc, importlib, json, os, resource, shutil, signal, sys, tempfile, time, traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items(): os.environ.setdefault(name, value)
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the library beside this file

from maet.weights.tensors import MaetError
from mutate import BYTES, FILES, KINDS, TREE, mutate
from readers import READERS, Reader

LIMIT = 30       # seconds that one case may take on a busy machine
ROOM = 3 << 30   # bytes of memory that a child may take beside what it begins with
NOISE = 10       # lines that one case may print
LONGEST = 2000   # characters of a message
BATCH = 100      # cases of one child: what they leave in its memory is gone with it


# ---- in a child ----

def fence() -> None:
    "Nothing that a case does may reach beyond this process."
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages: resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def listing(folder: Path) -> list[str]: return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def judged(reader: Reader) -> tuple[str, str]: # accepted, refused or failed; what was said
    "Open the broken files of the working directory."
    before = listing(Path("."))
    try: reader.open()
    except reader.may as error: outcome, said = "refused", str(error)
    except MaetError as error:
        said = str(error)
        outcome = "refused" if len(said.splitlines()) == 1 and said.isprintable() and len(said) <= LONGEST else "failed"
        if outcome == "failed": said = f"a message of {len(said.splitlines())} lines and {len(said)} characters\n{said[:3000]!r}"
    except KeyboardInterrupt: raise
    except BaseException as error:  # what a Rust library calls a panic is no Exception
        where = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/maet/" in f.filename), None)
        at = f" in {where.name} ({Path(where.filename).name}, line {where.lineno})" if where else ""
        outcome, said = "failed", f"{type(error).__name__}{at}\n" + "".join(traceback.format_exception(error))[-6000:]
    else: outcome, said = "accepted", ""
    if outcome != "failed" and (left := set(listing(Path("."))) - set(before)): outcome, said = "failed", f"left {', '.join(sorted(left))}\n{said}"
    return outcome, said


def case(name: str, sample: Path, seed: int, number: int, room: Path, log) -> dict:
    "Break a copy of the sample and open it."
    reader, rng = READERS[name], Random(f"{seed}/{name}/{number}")
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(sample, room)
    os.chdir(room)
    files = sorted({path for pattern in reader.files for path in Path(".").glob(pattern) if path.is_file()})
    kinds = [(kind, str(file)) for kind, file in mutate(files, rng)]
    printed = log.tell()
    outcome, said = judged(reader)
    noise = os.pread(log.fileno(), 1 << 16, printed).decode(errors="replace")
    if outcome != "failed" and noise.count("\n") > NOISE: outcome, said = "failed", f"printed {noise.count(chr(10))} lines\n{noise}"
    log.seek(0, os.SEEK_END)
    return dict(case=number, outcome=outcome, said=said, kinds=kinds)


def in_child(work, log: Path, heard=None) -> tuple[list, int]: # what it told, and its exit status
    "Fork. In the child `work(tell, log)` runs, with what it prints in a file; `heard` is given what it tells, at once."
    read, write = os.pipe()
    if not (child := os.fork()):
        code = 1
        try:
            os.close(read)
            with open(log, "w+b", buffering=0) as file, open(write, "w", buffering=1) as answer:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
                work(lambda thing: print(json.dumps(thing), file=answer, flush=True), file)
            code = 0
        except KeyboardInterrupt: pass
        except BaseException: traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    told = []
    with open(read) as answers:
        for line in answers:
            if not line.endswith("\n"): break  # it died over it
            told.append(json.loads(line))
            if heard: heard(told[-1])
    return told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cases(name: str, sample: Path, seed: int, numbers: range, end: float, work: Path) -> list[dict]:
    "Some cases in a child, until a moment. The last one may be what killed it."
    def run(tell, log):
        fence()
        for number in numbers:
            tell(number)
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=log)
            tell(case(name, sample, seed, number, work/"case", log))
            if time.monotonic() > end: break
        faulthandler.cancel_dump_traceback_later()
    told, code = in_child(run, work/"log")
    found = [thing for thing in told if isinstance(thing, dict)]
    if code and told and isinstance(told[-1], int):
        log = (work/"log").read_text(errors="replace")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"more than {LIMIT} s" if "Timeout (" in log else f"exit code {code}"
        found.append(dict(case=told[-1], outcome="failed", said=f"{how}\n{log[-6000:]}", kinds=[]))
    return found


def of_reader(name: str, seed: int, first: int, seconds: float, least: int, work: Path, heard) -> None:
    "Cases of one reader, in children of a child that has made the sample and opened it once: what that imports is there for all."
    sample = work/name
    def run(tell, log):
        shutil.rmtree(work/"case", ignore_errors=True)
        (work/"case").mkdir()  # made where its copies will lie: some files name others by their whole path
        os.chdir(work/"case")
        READERS[name].make(Path("."))
        shutil.copytree(work/"case", sample)
        outcome, said = judged(READERS[name])
        assert outcome == "accepted", said
        gc.freeze()
        number, end = first, time.monotonic() + seconds
        while number < first + least or time.monotonic() < end:
            for one in cases(name, sample, seed, range(number, number + BATCH), end, work):
                tell(one)
                number = one["case"] + 1
    if in_child(run, sample.with_suffix(".log"), heard)[1]:
        raise RuntimeError(f"{name}: its sample is not right\n{sample.with_suffix('.log').read_text(errors='replace')}")


# ---- many of them ----

@dataclass
class Tally:
    "What became of the cases of a reader."
    outcomes: Counter = field(default_factory=Counter)
    kinds: dict = field(default_factory=lambda: defaultdict(Counter)) # of mutation -> outcomes
    failures: dict = field(default_factory=dict)  # first line of what was said -> first case of it

    def add(self, one: dict) -> bool: # a failure of a new kind
        self.outcomes[one["outcome"]] += 1
        for kind, _ in one["kinds"]: self.kinds[kind][one["outcome"]] += 1
        head = one["said"].partition("\n")[0]
        if one["outcome"] != "failed" or head in self.failures: return False
        self.failures[head] = one
        return True


def again(name: str, seed: int, number: int) -> str: return f"python tests/fuzz.py {name} --seed {seed} --case {number}"


def fuzz(names: list[str], seconds: float, seed: int, least: int, work: Path) -> dict[str, Tally]:
    "All readers, one after another; they share the time."
    tallies = {}
    def heard(one):
        if not tally.add(one): return
        how = ", ".join(f"{kind} {file}" for kind, file in one["kinds"]) or "a change that killed the process"
        print(f"FAILED {name}, after {how}: {one['said'].partition(chr(10))[0]}\n       {again(name, seed, one['case'])}", flush=True)
    for name in names:
        tally = tallies[name] = Tally()
        try: of_reader(name, seed, 0, seconds / len(names), least, work, heard)
        except KeyboardInterrupt: break
    return tallies


def table(heads: list[str], rows: list[list]) -> str:
    "Columns of equal width, words to the left, numbers to the right; and a sum of each."
    rows = [*rows, ["all", *(sum(column) for column in list(zip(*rows))[1:])]]
    lines = [heads, *([f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in enumerate(zip(line, widths))) for line in lines)


OUTCOMES = ("accepted", "refused", "failed")


def told(tallies: dict[str, Tally], seed: int) -> str:
    "Counts by reader, counts by kind of mutation, and a closing line."
    def row(name, outcomes, *more): return [name, sum(outcomes.values()), *(outcomes[o] for o in OUTCOMES), *more]
    by_group = lambda tally: [sum(tally.kinds[how.__name__].total() for how in group) for group in (FILES, BYTES, TREE)]
    by_reader = [row(name, tally.outcomes, *by_group(tally)) for name, tally in tallies.items()]
    by_kind = [row(kind, sum((tally.kinds[kind] for tally in tallies.values()), Counter())) for kind in KINDS]
    total, ways = sum((tally.outcomes for tally in tallies.values()), Counter()), sum(len(tally.failures) for tally in tallies.values())
    return "\n\n".join([table(["reader", "cases", *OUTCOMES, "files changed", "bytes changed", "meaning changed"], by_reader),
                        table(["change", "changes", *OUTCOMES], by_kind),
                        f"seed {seed}: {total.total():,} cases of {len(tallies)} readers, {total['accepted']:,} accepted, {total['refused']:,} refused in one line, "
                        f"{total['failed']:,} failed in {ways} ways"])


def replay(name: str, seed: int, number: int, work: Path) -> int: # exit code
    "One case, with all that is known of it; the broken files stay."
    found = []
    of_reader(name, seed, number, 0, 1, work, found.append)
    one = found[0]
    print(f"{name}, seed {seed}, case {number}: {', '.join(f'{kind} {file}' for kind, file in one['kinds'])}\n{one['outcome']}: {one['said']}\nthe files are in {work/'case'}")
    return one["outcome"] == "failed"


def main() -> int: # exit code: 0, or 1 if something failed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="reader", help=f"of {', '.join(READERS)}; without one, all")
    parser.add_argument("--seconds", type=float, default=60, help="shared by the readers")
    parser.add_argument("--seed", type=int, help="without it, the time")
    parser.add_argument("--case", type=int, help="only this one, of one reader")
    parser.add_argument("--least", type=int, default=1, help="cases of each reader, however long they take")
    asked = parser.parse_args()
    if unknown := set(asked.readers) - READERS.keys(): parser.error(f"no reader {', '.join(unknown)}")
    names, seed = asked.readers or list(READERS), int(time.time()) if asked.seed is None else asked.seed
    for module in {module for name in names for module in READERS[name].imports}: importlib.import_module(module)  # once, not in every child
    work = Path(tempfile.mkdtemp(prefix="maet-fuzz-"))
    if asked.case is not None: return replay(names[0], seed, asked.case, work)
    try: tallies = fuzz(names, asked.seconds, seed, asked.least, work)
    finally: shutil.rmtree(work, ignore_errors=True)
    print(told(tallies, seed))
    return any(tally.failures for tally in tallies.values())


if __name__ == "__main__": sys.exit(main())
