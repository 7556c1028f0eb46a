"""Mutants of the CUDA kernels: each synchronisation taken out in turn, and whether the host executor's cases notice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_host import toolkit

ATOMICS = "Add|Sub|Exch|Min|Max|Inc|Dec|CAS|And|Or|Xor"
SITE = re.compile(
    rf"\b(?:(?P<call>__syncthreads\w*|__syncwarp|__threadfence\w*|atomic(?:{ATOMICS})(?:_block|_system)?)"
    r"|(?P<group>[A-Za-z_]\w*)\s*\.\s*sync|(?<!bool )(?P<last>arrive_last))\s*\("
)
NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
# How a case can notice. Anything else that ends a run (a missing library, no memory) proves nothing.
NOTICED = re.compile(r"data race|ThreadSanitizer:DEADLYSIGNAL|hexec: [^\n]{0,60}|FAILED: [^\n]*")


@dataclass(frozen=True)
class Mutant:
    id: int
    file: str
    line: int
    source: str  # the line as it stands in the file, stripped

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source}"


def plant(folder: Path) -> list[Mutant]:
    """Give every synchronisation in the sources of `folder` a switch (mutants.h), in place and line by line.

    Barriers and fences can be left out, atomics become a plain read-modify-write, and the `arrive_last` of a kernel
    can let every block finish. Arriving too early (before a fence or a barrier) is the same as leaving that one out.
    """
    found: list[Mutant] = []
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.h")]):
        text = path.read_text()
        code = NO_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        edits = []
        for m in SITE.finditer(code):
            line = code.count("\n", 0, m.start())
            mutant = Mutant(len(found) + 1, path.name, line + 1, text.split("\n")[line].strip())
            found.append(mutant)
            site, end = f"hexec::Site{{{mutant.id}}}", closing(code, m.end())
            if m["last"]:
                edits += [(m.start(), m.start(), f"hexec::last_or_every({site}, "), (end, end, ")")]
            elif m["group"]:
                edits.append((m.start(), m.end(), f"hexec::sync({site}, {m['group']}"))
            else:
                edits.append((m.end(), m.end(), site + (", " if code[m.end() : end].strip() else "")))
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new + text[end:]
        path.write_text(text)
    return found


def closing(code: str, start: int) -> int:
    """Where the parenthesis closes that was opened just before `start`."""
    depth, at = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        at += 1
    return at - 1


def families(root: Path, file: str) -> list[str]:
    """Whose cases run this file: its own family's, or those of all that include this header and then its direct ones."""
    known = [p.stem.removeprefix("main_") for p in (root / "tests" / "cuda_host").glob("main_*.inc")]
    if file.endswith(".cu"):
        own = [f for f in known if file.startswith(f)]
        assert own, f"{file}: no tests/cuda_host/main_FAMILY.inc runs it"
        return [max(own, key=len)]
    cuda = root / "csrc" / "cuda"
    users = {p.name for p in cuda.iterdir() if f'#include "{file}"' in p.read_text()}
    return [*sorted({f for user in users for f in families(root, user)} - {"common"}), "common"]


class Program:
    """The sanitizer program with a switch for each mutant."""

    def __init__(self, root: Path, mutants: list[Mutant]):
        self.root, self.mutants = root, mutants
        flags = ["-fsanitize=thread", "-include", str(root / "tests" / "cuda_host" / "mutants.h")]
        self.path = toolkit.build_host(root / "program", "main.cpp", *flags, root=root)

    def run(self, mutant: int, family: str) -> tuple[int, str]:
        """Exit status and words of the family's cases with this mutant; 0 is none."""
        options = {"TSAN_OPTIONS": "halt_on_error=1:symbolize=0", "ZSQ_MUTANT": str(mutant)}
        done = subprocess.run([str(self.path), "1", family], capture_output=True, text=True, env=os.environ | options)
        return done.returncode, done.stdout + done.stderr

    def survived(self, mutant: Mutant) -> str | None:
        """None when a family's cases notice, else what the last of them said.

        That they pass without a mutant is test_sanitized's business; only where they also pass with one are the results
        compared. Most mutants end early, a sound run is the dear part.
        """
        said = "no family runs it"
        for family in families(self.root, mutant.file):
            status, said = self.run(mutant.id, family)
            if status:
                assert NOTICED.search(said), f"{mutant}: ended with {status}\n{said[-2000:]}"
                return None
            status, sound = self.run(0, family)
            assert status == 0, sound[-4000:]
            if said.splitlines()[0] != sound.splitlines()[0]:
                return None
        return said.splitlines()[-1]

    def survivors(self) -> dict[Mutant, str]:
        """The mutants that go unnoticed, each with what its run said. Two runs at a time."""
        with ThreadPoolExecutor(2) as pool:
            said = pool.map(self.survived, self.mutants)
            return {mutant: words for mutant, words in zip(self.mutants, said, strict=True) if words is not None}


def copy_sources(root: Path) -> Path:
    """The kernel sources and the executor, copied under `root`; returns the folder of the kernels."""
    for part in ("csrc", "tests/cuda_host"):
        shutil.copytree(toolkit.REPO / part, root / part, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return root / "csrc" / "cuda"
