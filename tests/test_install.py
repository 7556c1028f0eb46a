"""The promise of the installation: it never fails because of kernels and builds them against the user's torch.

The fast half asks the probe about made-up machines. The half marked `install` runs pip: a fresh virtual environment
that sees this one's packages through a .pth file stands for the user's environment: torch is not downloaded again.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "build_backend"))
import zsq_native  # noqa: E402
import zsq_probe  # noqa: E402

from zsq_fast import _build  # noqa: E402


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def fake_nvcc(path: Path, release: str) -> str:
    return script(
        path,
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1";;
--dryrun) echo '#$ TOP={path.parent}' >&2;;
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n';;
esac""",
    )


def cuda_torch(release: str = "13.2") -> zsq_probe.Torch:
    return zsq_probe.Torch(sys.executable, "/torch", f"2.99.0+cu{release.replace('.', '')}", release, "/include")


NVCC = zsq_probe.Nvcc("/nvcc", "/", "13.0", ("75", "80", "90", "100"))


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCH_PYTHON", "NVCC", "CUDA", "REQUIRE_KERNELS"):
        monkeypatch.delenv(f"ZSQ_{name}", raising=False)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    ask_torch = zsq_probe.find_torch
    ask_torch.cache_clear()
    yield
    ask_torch.cache_clear()


def test_torch_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSQ_TORCH_PYTHON", sys.executable)
    found, why = zsq_probe.find_torch()
    assert (found.version, found.cuda, why) == (torch.__version__, torch.version.cuda, "")
    assert Path(found.root) == Path(torch.__file__).parent
    assert "import torch" not in zsq_probe._ASK


def test_torch_of_another_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"ext_suffix": ".cpython-39.so", "include": "/i", "torch": "2.9", "cuda": None, "root": "/t"})
    monkeypatch.setenv("ZSQ_TORCH_PYTHON", script(tmp_path / "python", f"echo '{answer}'"))
    found, why = zsq_probe.find_torch()
    assert found is None and "another Python" in why


@pytest.mark.parametrize("says", [None, "exit 1", "true", "echo hello", "echo 3", "printf '\\377'"])
def test_broken_interpreter_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None) -> None:
    python = script(tmp_path / "python", says) if says else "/nonexistent/python"
    monkeypatch.setenv("ZSQ_TORCH_PYTHON", python)
    plan = zsq_probe.make_plan()
    assert f"{python} does not run" in plan.reasons["cpu"] and plan.reasons["cuda"]
    paths, why = zsq_probe.torch_paths(zsq_probe.Torch(python, "/t", "2.9", None, "/i"))
    assert paths is None and "torch 2.9 cannot be imported" in why


def test_interpreter_that_prints_at_start_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSQ_TORCH_PYTHON", script(tmp_path / "python", f'echo hello; exec {sys.executable} "$@"'))
    assert zsq_probe.find_torch()[0].version == torch.__version__


def test_environments_are_asked_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("venv", "conda", ".venv"):
        (tmp_path / name / "bin").mkdir(parents=True)
        script(tmp_path / name / "bin" / "python", "exit 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    asked = zsq_probe.interpreters()
    assert asked[0] == sys.executable
    assert [Path(p).parts[-3] for p in asked if p.startswith(str(tmp_path))] == ["venv", "conda", ".venv"]


def test_nvcc_must_be_of_torchs_major_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSQ_NVCC", fake_nvcc(tmp_path / "nvcc", "13.0"))
    found, _ = zsq_probe.find_nvcc(cuda_torch("13.2"))
    assert (found.release, found.root, found.arches) == ("13.0", str(tmp_path.resolve()), ("75", "80", "90", "100"))
    found, why = zsq_probe.find_nvcc(cuda_torch("12.8"))
    assert found is None and "is CUDA 13.0, torch needs 12.x" in why


@pytest.mark.parametrize("place", ["nowhere", "home/bin", "path"])
def test_nvcc_hidden_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """PATH and CUDA_HOME are what the user has; the CUDA build of torch stays, only the compiler is not there."""
    for name in ("home/bin", "path", "nowhere"):
        (tmp_path / name).mkdir(parents=True)
    fake_nvcc(tmp_path / place / "nvcc", "99.0")  # wheels of that release exist in no environment
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", "/bin/sh")
    monkeypatch.setattr(zsq_probe, "USUAL_NVCC", (str(tmp_path / "usual" / "nvcc"),))
    monkeypatch.setattr(zsq_probe, "find_torch", lambda: (cuda_torch("99.0"), ""))
    plan = zsq_probe.make_plan()
    if place == "nowhere":
        assert plan.nvcc is None and plan.reasons == {"cuda": "nvcc not found"}
        assert "set CUDA_HOME" in zsq_probe.next_step(plan.reasons["cuda"])
    else:
        assert plan.nvcc.path == str(tmp_path / place / "nvcc") and not plan.reasons


def test_flags_of_the_environment_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CFLAGS", "CXXFLAGS", "CUDAFLAGS", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"):
        monkeypatch.setenv(name, "-ffast-math")
    monkeypatch.setenv("LDFLAGS", "-L/conda/lib -Ofast -ffast-math -mdaz-ftz -Wl,-rpath,/conda/lib -fuse-ld=gold")
    env = zsq_native._environment(zsq_probe.Plan())
    assert not [name for name, value in env.items() if "fast" in value and "FLAGS" in name]
    assert env["LDFLAGS"] == "-L/conda/lib -Wl,-rpath,/conda/lib -fuse-ld=gold"


def test_build_runs_where_there_is_no_fcntl(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['fcntl'] = None; sys.path.append({str(ROOT / 'build_backend')!r}); import zsq_native"
    )
    code += f"; from pathlib import Path\nwith zsq_native._locked(Path({str(tmp_path)!r})): print('in')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


def test_nvcc_reports_its_root_through_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toolkit").mkdir()
    real = fake_nvcc(tmp_path / "toolkit" / "nvcc", "13.0")
    monkeypatch.setenv("ZSQ_NVCC", script(tmp_path / "nvcc", f'exec {real} "$@"'))
    assert zsq_probe.find_nvcc(cuda_torch())[0].root == str((tmp_path / "toolkit").resolve())


@pytest.mark.parametrize(
    ("wanted", "gpus", "expected"),
    [
        ("", [], ("75-real", "80-real", "90-real", "100")),
        ("", ["90"], ("90",)),
        ("", ["130"], ("100-virtual",)),
        ("8.0;9.0+PTX", ["75"], ("80-real", "90")),
        ("8.0 13.0", [], ("80-real", "100-virtual")),
        ("9.0a", [], ("90a-real",)),
        ("5.0", [], ()),
    ],
)
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: list[str], expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    monkeypatch.setattr(zsq_probe, "visible_gpu_arches", lambda: gpus)
    arches, why = zsq_probe.choose_arches(NVCC)
    assert arches == expected
    assert bool(why) == (not expected)


@pytest.mark.parametrize(
    ("setting", "devices"),
    [("", []), ("cuda", ["cuda"]), (" CUDA, cpu,", ["cpu", "cuda"]), ("1", ["cpu", "cuda"]), ("cpu, rocm", None)],
)
def test_build_and_run_time_require_alike(
    monkeypatch: pytest.MonkeyPatch, setting: str, devices: list[str] | None
) -> None:
    monkeypatch.setenv("ZSQ_REQUIRE_KERNELS", setting)
    if devices is not None:
        assert zsq_probe.required_kernels() == list(_build.required_kernels()) == devices
        return
    with pytest.raises(SystemExit, match="ZSQ_REQUIRE_KERNELS: unknown device rocm;"):
        zsq_probe.required_kernels()
    with pytest.raises(ValueError, match="ZSQ_REQUIRE_KERNELS: unknown device rocm;"):
        _build.required_kernels()


def test_first_error_is_the_line_a_person_looks_for() -> None:
    log = "[1/2] Building\n$ c++ error: not this\nx.cpp:3:1: error: expected ';'\nx.cpp:9:1: error: second\nstopped"
    assert zsq_native._first_error(log) == "build failed: x.cpp:3:1: error: expected ';'"
    cmake = "-- ok\nCMake Error at CMakeLists.txt:3:\n  No compiler.\n\n"
    assert zsq_native._first_error(cmake) == "build failed: CMake Error at CMakeLists.txt:3: No compiler."
    assert zsq_native._first_error("") == "build failed: no output"


def test_build_for_another_torch_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"torch": "1.0.0", "kernels": {"cpu": True, "cuda": True}, "reasons": {}, "steps": {}, "source": str(ROOT)}
    (tmp_path / "info.json").write_text(json.dumps(info))
    monkeypatch.setattr(_build, "_INFO", tmp_path / "info.json")
    _build.build_info.cache_clear()
    _build._load.cache_clear()
    try:
        assert not _build.native()
        for status in _build.kernel_status().values():
            assert not status["built"] and "1.0.0" in status["reason"] and torch.__version__ in status["reason"]
            assert status["fix"] == f"pip install --no-deps --force-reinstall {ROOT}"
    finally:
        _build.build_info.cache_clear()
        _build._load.cache_clear()


def weak_functions(folder: Path) -> set[str]:
    """Functions of the objects in a CMake object library that the linker may merge with others of the same name."""
    objects = sorted(folder.rglob("*.o"))
    assert objects, folder
    done = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True)
    fields = [line.split(None, 2) for line in done.stdout.splitlines()]
    return {f[2] for f in fields if len(f) == 3 and f[1] in "WVu"}


def test_objects_of_an_instruction_set_leak_no_shared_functions() -> None:
    """The linker keeps the first copy of a shared function: an AVX-512 one would crash machines without it."""
    folders = [f for f in ROOT.glob("build/native-*/*/CMakeFiles/kernels_*.dir") if any(f.rglob("*.o"))]
    if not folders or not shutil.which("nm"):
        pytest.skip("no kernel objects in build/, or no nm")
    for folder in folders:
        isa = folder.stem.removeprefix("kernels_")
        leaks = {f for f in weak_functions(folder) if f"zsq::cpu::{isa}::" not in f and "personality" not in f}
        assert not leaks, f"{folder}: {sorted(leaks)[:3]}"


def test_make_installs_again_when_the_list_of_sources_changes(tmp_path: Path) -> None:
    if not (make := shutil.which("make")):
        pytest.skip("needs make")
    for name in (".venv", "csrc", "zsq_fast", "build_backend", "tests"):
        (tmp_path / name).mkdir()
    for name in ("csrc/a.cpp", "csrc/b.cpp", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    script(tmp_path / "zsq-fast", "echo installed")

    # Not those of a `make test` that runs this: its variables would come before the Makefile's.
    outside = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "VENV", "TEST_ARGS")
    }

    def installs() -> bool:
        command = [make, "-s", ".venv/.installed", "PYTHON=:", "PIP=:", f"BIN={tmp_path}"]
        return (
            "installed"
            in subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True).stdout
        )

    assert installs() and not installs()
    (tmp_path / "csrc" / "b.cpp").unlink()
    assert installs() and not installs()
    (tmp_path / "csrc" / "a.cpp").rename(tmp_path / "csrc" / "c.cpp")  # its time stays
    assert installs() and not installs()


# --- real installations -----------------------------------------------------------------------------------------------

SAMPLE = """
import torch, zsq_fast
torch.manual_seed(0)
layer = zsq_fast.QuantConv2d(3, 4, 3, weight_bits=4)
try:
    layer(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
except zsq_fast.errors.MissingKernelsError as missing:
    assert zsq_fast.ops.backends()["cpu"] == "missing" and "pip install" in str(missing)
else:
    assert zsq_fast.ops.backends()["cpu"] == "native"
print(zsq_fast.__file__)
"""


def run(command: list[str], cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    hidden = ("ZSQ_", "PYTHON", "VIRTUAL_ENV", "CONDA_", "CUDA", "CXX", "TORCH_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | settings
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def venv(path: Path, donor: bool) -> str:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    if donor:
        site = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(path), "platbase": str(path)}))
        # Inserted last, so that what is installed into the new environment comes first.
        (site / "donor.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    return str(path / "bin" / "python")


def pip(python: str, cwd: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "pip", "--python", python, *words, "--no-deps", "-v"], cwd, **settings)


def check_works(python: str, tmp_path: Path) -> dict:
    """Import, forward and backward (or the error that names the remedy) in the environment, and what `zsq-fast env --json` says there."""
    done = run([python, "-c", SAMPLE], tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), "another copy of zsq_fast was tested"
    done = run([str(Path(python).with_name("zsq-fast")), "env", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["kernels"]


@pytest.mark.install
def test_install_without_compiler(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    python = venv(tmp_path / "env", donor=True)
    done = pip(python, tmp_path, "install", "--ignore-installed", str(ROOT), PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zsq_fast kernels: cpu no (no C++ compiler found" in done.stdout + done.stderr
    kernels = check_works(python, tmp_path)
    assert not kernels["cpu"]["built"] and "no C++ compiler" in kernels["cpu"]["reason"]
    assert "apt-get install g++, then: pip install" in kernels["cpu"]["fix"].replace(")", "")

    done = pip(python, tmp_path, "install", "-I", str(ROOT), PATH=str(tmp_path / "empty"), ZSQ_REQUIRE_KERNELS="cpu")
    assert done.returncode != 0
    assert "ZSQ_REQUIRE_KERNELS: no cpu kernels: no C++ compiler" in done.stdout + done.stderr


@pytest.mark.install
def test_install_without_nvcc(tmp_path: Path) -> None:
    python = venv(tmp_path / "env", donor=True)
    done = pip(python, tmp_path, "install", "--ignore-installed", str(ROOT), ZSQ_NVCC="none", ZSQ_REQUIRE_KERNELS="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = check_works(python, tmp_path)
    assert kernels["cpu"]["built"] and not kernels["cuda"]["built"]
    assert ("nvcc not found" if torch.version.cuda else "is a CPU build") in kernels["cuda"]["reason"]
    assert "pip install" in kernels["cuda"]["fix"]


@pytest.mark.install
def test_wheel_built_without_torch(tmp_path: Path) -> None:
    """Frontends that build elsewhere (`python -m build`) see no torch: the wheel works and says so."""
    python = venv(tmp_path / "bare", donor=False)
    done = pip(python, tmp_path, "wheel", str(ROOT), "-w", str(tmp_path), ZSQ_TORCH_PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("zsq_fast-*.whl")
    target = venv(tmp_path / "env", donor=True)
    done = pip(target, tmp_path, "install", "--ignore-installed", str(wheel))
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = check_works(target, tmp_path)
    assert not kernels["cpu"]["built"] and "no torch in the target environment" in kernels["cpu"]["reason"]
