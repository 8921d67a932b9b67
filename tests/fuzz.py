"""Broken files for every reader: what comes out is success or a MaetError of one line, and nothing else.

    python tests/fuzz.py                      all readers, a minute, a seed of its own
    python tests/fuzz.py pack keys --seconds 600 --seed 7
    python tests/fuzz.py pack --seed 7 --case 123      one case again, with all that is known of it

A case is determined by reader, seed and number. Cases run in forked children, which may die of a signal, of time or of memory."""
import argparse, faulthandler, importlib, json, os, resource, shutil, signal, sys, tempfile, time, traceback
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items(): os.environ.setdefault(name, value)

from maet.tensors import MaetError
from mutate import KINDS, mutate
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


def in_child(work, log: Path):
    "Fork. In the child `work(tell)` runs, with what it prints in a file; gives what was told, and the exit status."
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
    with open(read) as answers: told = [json.loads(line) for line in answers if line.endswith("\n")]
    return told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cases(name: str, sample: Path, seed: int, first: int, most: int, seconds: float, work: Path) -> list[dict]:
    "Some cases in a child. The last one may be what killed it."
    def run(tell, log):
        fence()
        end = time.monotonic() + seconds
        for number in range(first, first + most):
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
    elif code and code != 1: raise RuntimeError((work/"log").read_text(errors="replace"))
    return found


# ---- many of them ----

@dataclass
class Tally:
    "What became of the cases of a reader."
    outcomes: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    failures: dict = field(default_factory=dict)  # first line of what was said -> first case of it
    next: int = 0
    seconds: float = 0.

    def add(self, found: list[dict]) -> list[dict]: # failures that are new
        new = []
        for one in found:
            self.outcomes[one["outcome"]] += 1
            self.kinds.update(kind for kind, _ in one["kinds"])
            if one["outcome"] == "failed" and (head := one["said"].splitlines()[0]) not in self.failures:
                self.failures[head] = one
                new.append(one)
        self.next = max([self.next, *(one["case"] + 1 for one in found)])
        return new


def make_sample(name: str, folder: Path) -> None:
    "A valid sample, and the proof that it is one."
    def run(tell, log):
        os.chdir(folder)
        READERS[name].make(Path("."))
        outcome, said = judged(READERS[name])
        assert outcome == "accepted", said
    folder.mkdir()
    if in_child(run, folder.with_suffix(".log"))[1]: raise RuntimeError(f"{name}: its sample is not right\n{folder.with_suffix('.log').read_text(errors='replace')}")


def again(name: str, seed: int, number: int) -> str: return f"python tests/fuzz.py {name} --seed {seed} --case {number}"


def fuzz(names: list[str], seconds: float, seed: int, least: int, work: Path) -> dict[str, Tally]:
    "In turn a second of each reader, until the time is over and each had at least so many cases."
    tallies = {name: Tally() for name in names}
    for name in names: make_sample(name, work/name)
    share = seconds / len(names)
    for turn in count(1):
        for name, tally in tallies.items():
            while tally.seconds < min(turn, share) or (turn > share and tally.next < least):
                began = time.monotonic()
                for one in tally.add(cases(name, work/name, seed, tally.next, BATCH, max(.1, min(turn, share) - tally.seconds), work)):
                    print(f"FAILED {name}, after {', '.join(f'{kind} {file}' for kind, file in one['kinds']) or 'a change that killed the process'}: {one['said'].splitlines()[0]}\n"
                          f"       {again(name, seed, one['case'])}", flush=True)
                tally.seconds += time.monotonic() - began
        if turn >= share: return tallies


def told(tallies: dict[str, Tally], seed: int) -> str:
    "The counts as a table, and a closing line."
    used = [kind for kind in KINDS if any(tally.kinds[kind] for tally in tallies.values())]
    heads = ["reader", "cases", "accepted", "refused", "failed", *used]
    rows = [[name, sum(t.outcomes.values()), *(t.outcomes[o] for o in heads[2:5]), *(t.kinds[kind] for kind in used)] for name, t in tallies.items()]
    rows.append(["all", *(sum(column) for column in list(zip(*rows))[1:])])
    lines = [heads, *([f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = "\n".join("  ".join(cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in enumerate(zip(line, widths))) for line in lines)
    _, number, accepted, refused, failed = rows[-1][:5]
    return f"{table}\n\nseed {seed}: {number:,} cases, {accepted:,} accepted, {refused:,} refused in one line, {failed:,} failed in {sum(len(t.failures) for t in tallies.values())} ways"


def replay(name: str, seed: int, number: int, work: Path) -> int: # exit code
    "One case, with all that is known of it; the broken files stay."
    make_sample(name, work/name)
    one, = cases(name, work/name, seed, number, 1, LIMIT, work)
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
