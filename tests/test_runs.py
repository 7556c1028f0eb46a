"""Run directories: nothing is lost to kills, full disks, bit rot or a second writer, and nothing wrong is loaded."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from zsq_fast import errors
from zsq_fast.errors import BadFileError, StorageError, UsageError
from zsq_fast.runs import Progress, RunDir, StopRequest, storage

# Other processes import the package that is tested here, be it installed or the source tree.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(errors.__file__).parents[1])}


def groups_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Small tensors of every awkward kind, a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    weight[0, 0, 0] = torch.tensor([float("nan"), -0.0, float("inf")])
    model = {"w": weight, "shared": weight, "strided": weight[:, 1:, ::2], "step": torch.tensor(step)}
    model |= {"empty": torch.empty(0, 3), "half": torch.randn(5, generator=generator).bfloat16()}
    return {"student": model, "rng": {"cpu": generator.get_state(), "flag": torch.tensor([True, False])}}


def state_of(step: int) -> dict:
    return {"lr": 0.1 / (step + 1), "loss": float("inf"), "epoch": step // 3, "names": ["a", "é"]}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def assert_is_step(loaded: object, step: int) -> None:
    assert loaded is not None
    found, groups, state = loaded
    expected = groups_of(step)
    assert (found, state, groups.keys()) == (step, state_of(step), expected.keys())
    for name, tensors in expected.items():
        assert groups[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert same(groups[name][key], tensor), (name, key)


def save(run: RunDir, step: int) -> None:
    run.log(step=step, loss=1.0 / step)
    run.save_checkpoint(step, groups_of(step), state_of(step))


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path / "run", {"recipe": "x"}, {"seed": 0}) as directory:
        yield directory


def saved_steps(run: RunDir) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def test_round_trip_keeps_two_and_stores_contiguous(run):
    for step in (1, 2, 30):
        save(run, step)
    assert saved_steps(run) == ["step-00000002", "step-00000030"]
    loaded = run.load_checkpoint()
    assert_is_step(loaded, 30)
    assert all(tensor.is_contiguous() for tensors in loaded[1].values() for tensor in tensors.values())
    loaded[1]["student"]["w"].zero_()  # writable


def test_a_step_can_be_saved_again(run):
    run.save_checkpoint(7, {"a": {"x": torch.zeros(2)}}, {})
    save(run, 7)
    assert_is_step(run.load_checkpoint(), 7)
    assert saved_steps(run) == ["step-00000007"]


def test_checkpoint_moved_aside_by_a_killed_writer_comes_back(run):
    save(run, 7)
    root = run.path / "checkpoints"
    (root / "step-00000007").rename(root / ".replaced-step-00000007")
    (root / ".tmp-step-00000008-1").mkdir()
    (run.path / ".tmp-result.json-1").write_text("{")
    run.close()
    with RunDir.open(run.path) as again:
        assert_is_step(again.load_checkpoint(), 7)
        assert saved_steps(again) == ["step-00000007"]
        assert not list(run.path.glob(".tmp-*"))


def test_metrics_are_valid_json_and_cut_back_to_the_checkpoint(run):
    run.log(step=1, loss=float("nan"), top1=torch.tensor(0.5), path=Path("a"), many=[float("-inf")])
    save(run, 2)
    whole = (run.path / "metrics.jsonl").read_bytes()
    run.log(step=3, loss=0.0)
    run.log(note="after step 3")
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo')
    first = json.loads(whole.splitlines()[0], parse_constant=lambda name: pytest.fail(name))
    assert first == {"step": 1, "loss": "nan", "top1": 0.5, "path": "a", "many": ["-inf"]}
    assert [record.get("step") for record in run.read_metrics()] == [1, 2, 3, None]
    run.close()
    with RunDir.open(run.path) as again:
        assert_is_step(again.load_checkpoint(), 2)
        assert (run.path / "metrics.jsonl").read_bytes() == whole
        again.log(step=3)
        assert len(again.read_metrics()) == 3


def test_metrics_of_a_run_without_checkpoint_start_again(run):
    run.log(step=1)
    assert run.load_checkpoint() is None
    assert run.read_metrics() == []


def test_damaged_checkpoints_are_skipped_reported_and_replaced(run, caplog):
    for step in (1, 2):
        save(run, step)
    victim = run.path / "checkpoints" / "step-00000002" / "student.safetensors"
    blob = bytearray(victim.read_bytes())
    blob[-3] ^= 1
    victim.write_bytes(blob)
    with caplog.at_level(logging.WARNING, "zsq_fast.runs"):
        assert_is_step(run.load_checkpoint(), 1)
    assert "step 2" in caplog.text and "in tensor '" in caplog.text
    assert [record["step"] for record in run.read_metrics()] == [1]
    save(run, 2)
    assert_is_step(run.load_checkpoint(), 2)
    assert saved_steps(run) == ["step-00000001", "step-00000002"]


def mutate(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    at = rng.randrange(len(data))
    if kind == 0:
        data = data[:at]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + 16] = rng.randbytes(16)
    else:
        data += rng.randbytes(1 + at % 9)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["student.safetensors", "rng.safetensors", "state.json", "MANIFEST.json"])
def test_mutated_checkpoints_never_load_wrong(run, name):
    for step in (1, 2):
        save(run, step)
    files = [run.path / "checkpoints" / f"step-0000000{step}" / name for step in (1, 2)]
    good, rng, skipped = [path.read_bytes() for path in files], random.Random(name), 0
    for round_ in range(120):
        mutate(files[1], rng)
        both = round_ % 4 == 0
        if both:
            mutate(files[0], rng)
        try:
            loaded = run.load_checkpoint()
        except BadFileError:
            assert both
            skipped += 1
        else:
            assert_is_step(loaded, loaded[0])  # whatever is loaded is right
            skipped += loaded[0] == 1
        for path, data in zip(files, good, strict=True):
            path.write_bytes(data)
    assert skipped > 100  # a mutation may be harmless (white space of the manifest), most are not
    assert_is_step(run.load_checkpoint(), 2)


def test_renamed_names_reach_the_disk(tmp_path, monkeypatch):
    """Each new name is synced in its directory, and a replaced checkpoint goes only when its successor's name is safe."""
    events = []

    def record(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: events.append((name, Path(a[0]).name)) or real(*a, **k))

    record(storage, "sync_directory")
    with RunDir.create(tmp_path / "new" / "run", {}, {}) as run:
        synced = [place for _, place in events]
        assert {"run", "new", tmp_path.name} <= set(synced)
        events.clear()
        run.log(step=7)
        assert events == [("sync_directory", "run")]
        save(run, 7)
        assert events[1] == ("sync_directory", "run") and events[-1] == ("sync_directory", "checkpoints")
        record(os, "rename")
        record(shutil, "rmtree")
        events.clear()
        save(run, 7)
    removed = len(events) - 1 - events[::-1].index(("rmtree", ".replaced-step-00000007"))
    renamed = max(i for i, (kind, _) in enumerate(events) if kind == "rename")
    assert renamed < events.index(("sync_directory", "checkpoints")) < removed


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".hidden", "", "x\0y"])
def test_names_cannot_leave_the_run_directory(run, name):
    (run.path.parent / "evil.safetensors").write_bytes(b"")
    with pytest.raises(BadFileError):
        run.write_json(name, {})
    with pytest.raises(BadFileError):
        run.save_checkpoint(1, {name: {"x": torch.ones(1)}}, {})
    assert run.load_checkpoint() is None
    manifest = json.loads((run.path / "MANIFEST.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (run.path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(BadFileError):
        run.load_tensors(name)


def test_equal_tensors_give_equal_files(run):
    """The library orders metadata at random in each process; files are compared by SHA-256."""
    metadata = {name: f"é{name}" for name in "qwertzuiop"}
    tensors = {"b": torch.ones(3), "a": torch.tensor([float("nan")])}
    path = run.save_tensors("student.safetensors", tensors, metadata)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(same(file.get_tensor(name), tensors[name]) for name in tensors)
    header = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")
    assert list(header["__metadata__"]) == sorted(metadata)
    assert same(run.load_tensors("student.safetensors")["a"], tensors["a"])


def test_links_out_of_the_run_directory_are_refused(run, tmp_path):
    path = run.save_tensors("student.safetensors", {"x": torch.ones(3)}, {"bits": "4"})
    assert torch.equal(run.load_tensors("student.safetensors")["x"], torch.ones(3))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFileError, match="not a regular file"):
        run.load_tensors("student.safetensors")


def test_changed_recipe_or_missing_manifest_is_no_run(run):
    run.close()
    recipe = run.path / "recipe.json"
    recipe.write_text(recipe.read_text().replace("x", "y"))
    with pytest.raises(BadFileError, match=r"recipe\.json is damaged"):
        RunDir.open(run.path)
    (run.path / "MANIFEST.json").unlink()
    with pytest.raises(BadFileError, match="not a run directory"):
        RunDir.open(run.path)


def test_create_refuses_runs_foreign_files_and_a_second_writer(run, tmp_path):
    with pytest.raises(UsageError, match="zsq-fast resume"):
        RunDir.create(run.path, {}, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        RunDir.create(tmp_path / "mine", {}, {})
    with pytest.raises(StorageError, match="in use"):
        RunDir.open(run.path)
    other = "import sys; from zsq_fast.runs import RunDir; RunDir.open(sys.argv[1])"
    command = [sys.executable, "-c", other, run.path]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 1 and "in use by another zsq-fast process" in result.stderr
    assert RunDir.open(run.path, read_only=True).recipe == {"recipe": "x"}  # readers are welcome
    run.close()
    RunDir.open(run.path).close()


def test_create_takes_over_what_a_killed_create_left(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / ".tmp-run.json-12").write_text("{")
    with RunDir.create(tmp_path, {"a": 1}, {"x": float("nan")}) as run:
        assert (run.recipe, run.info) == ({"a": 1}, {"x": "nan"})


def test_discard_leaves_nothing(tmp_path):
    run = RunDir.create(tmp_path / "run", {}, {})
    run.log(step=1)
    run.discard()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_disk_at_every_call_keeps_the_old_checkpoint(run, monkeypatch, call, code):
    """Lets the n-th call of one kind fail, for every n until the whole save goes through."""
    save(run, 1)
    real, failures = getattr(os, call), 0
    while True:
        remaining = [failures]

        def fail(*args, remaining=remaining, **kwargs):
            remaining[0] -= 1
            if remaining[0] == -1:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            patch.setattr(shutil, "_use_fd_functions", False, raising=False)  # a removal that fails harms nothing
            try:
                save(run, 2)
                run.write_json("result.json", {"step": 2})
                run.save_tensors("student.safetensors", {"x": torch.ones(9)})
                if remaining[0] >= 0:
                    break
                pytest.fail("a failing call went unnoticed")
            except StorageError as error:
                assert ("no space left" in str(error)) == (code == errno.ENOSPC)
        failures += 1
        assert not [path for path in run.path.rglob(".tmp-*") if path.is_file()], "temporary files stay behind"
        loaded = run.load_checkpoint()
        assert_is_step(loaded, loaded[0])
        for path in run.path.glob("*.json"):
            json.loads(path.read_text())
    assert failures >= (1 if call in ("mkdir", "rename") else 3)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_full_file_system(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        with RunDir.create(place / "run", {}, {}) as run:
            save(run, 1)
            with pytest.raises(StorageError, match=r"no space left .* MB are needed"):
                run.save_checkpoint(2, {"big": {"x": torch.zeros(2_000_000)}}, {})
            room = (place / "filler").open("wb", buffering=0)
            with contextlib.suppress(OSError):
                while room.write(b"x" * 4096):
                    pass
            long = "x" * 9000
            for attempt in (lambda: save(run, 3), lambda: run.log(t=long), lambda: run.write_json("r.json", long)):
                with pytest.raises(StorageError, match="no space left"):
                    attempt()
            room.close()
            assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n"), "half a record"
            assert saved_steps(run) == ["step-00000001"]
            assert_is_step(run.load_checkpoint(), 1)
            with pytest.raises(StorageError, match="no space left"):
                RunDir.create(place / "other", {"x": "y" * 10_000}, {})
            assert not (place / "other").exists()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # forking with worker threads is not safe
sys.path.insert(0, sys.argv[2])
from test_runs import RunDir, assert_is_step, save
path, rng, newest = Path(sys.argv[1]), random.Random(5), 0
RunDir.create(path, {}, {}).close()
began = time.monotonic()
kills = 0
while kills < 20 or (kills < 60 and time.monotonic() - began < 8):
    kills += 1
    pipe = os.pipe()
    child = os.fork()
    if child == 0:
        with RunDir.open(path) as run:
            loaded = run.load_checkpoint()
            step = loaded[0] if loaded else 0
            while True:
                step += 1
                save(run, step)
                os.write(pipe[1], step.to_bytes(8, "little"))
                if step % 5 == 0:
                    save(run, step)  # replaces a complete checkpoint
    os.close(pipe[1])
    acknowledged = int.from_bytes(os.read(pipe[0], 8), "little") if kills % 2 else 0  # else at any time
    time.sleep(rng.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rest = os.read(pipe[0], 1 << 20)
    os.close(pipe[0])
    acknowledged = int.from_bytes(rest[-8:], "little") if rest else acknowledged
    with RunDir.open(path) as run:
        loaded = run.load_checkpoint()
        newest = max(newest, acknowledged)
        assert (loaded[0] if loaded else 0) >= newest, (kills, newest)
        if loaded:
            newest = loaded[0]
            assert_is_step(loaded, newest)
            steps = [record["step"] for record in run.read_metrics()]
            assert steps[-1] == newest and sorted(set(steps)) == list(range(1, newest + 1)), steps
        assert not [p for p in path.rglob(".*") if p.name != ".lock"], "leftovers of the killed writer"
print(f"{kills} kills, newest {newest}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill writers quickly")
def test_sigkill_never_loses_a_saved_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLS, tmp_path / "run", Path(__file__).parent]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    kills, newest = map(int, re.findall(r"\d+", result.stdout))
    assert kills >= 20 and newest >= kills // 2, "the writers hardly wrote"


def test_stop_request_first_asks_second_interrupts():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stop_request_does_nothing_in_other_threads():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, signal.getsignal(signal.SIGINT))]


@pytest.mark.parametrize("interactive", [True, False])
def test_progress_goes_to_stderr_only(interactive, capsys, monkeypatch):
    monkeypatch.setattr("zsq_fast.runs.progress._LINE_SECONDS", 0.0)
    progress = Progress(interactive=interactive)
    progress.start(3, "AIT", done=1)
    progress.advance(loss=0.25)
    progress.message("epoch [1] done")
    progress.advance(1)
    progress.stop()
    quiet = Progress(quiet=True)
    quiet.start(1, "QUIET")
    quiet.advance()
    quiet.message("QUIET")
    quiet.stop()
    out, err = capsys.readouterr()
    assert out == "" and "QUIET" not in err
    assert "AIT" in err and "3/3" in err and "loss 0.25" in err and "epoch [1] done" in err
