"""The switch between implementations, and the helpers of the operators' tests."""

import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from m3i_kernels import dispatch
from m3i_kernels.dispatch import VARIABLE, current_backend, implementation, resolve, use_backend
from m3i_kernels.ema_update import ema_update
from m3i_kernels.testing import TOLERANCES, assert_close, noncontiguous

OPS = ("patch_mix", "ema_update")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Gives ema_update a fused implementation that records its calls, and no operator any other."""
    calls: list[float] = []
    module = types.ModuleType("m3i_kernels.ema_update.fused")
    module.ema_update = lambda ema, source, *, momentum, out, skip: calls.append(momentum)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "_exists", lambda op, name: name == "reference" or op == "ema_update")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    return calls


@pytest.mark.parametrize("op", OPS)
def test_cpu_runs_the_reference(op: str) -> None:
    for name in ("auto", "reference"):
        with use_backend(name):
            assert resolve(op, "cpu") == resolve(op, torch.device("cpu")) == "reference"
    assert implementation(op, "cpu").__module__ == f"m3i_kernels.{op}.reference"


def test_variable_and_context_manager_are_one_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_backend() == "auto"
    monkeypatch.setenv(VARIABLE, "reference")
    assert current_backend() == "reference"
    with use_backend("triton"):
        assert (current_backend(), os.environ[VARIABLE]) == ("triton", "triton")
        with use_backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "triton"
    assert current_backend() == "reference"
    monkeypatch.setenv(VARIABLE, "")
    assert current_backend() == "auto"


def test_restores_after_an_error_and_sets_for_good_without_with() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert VARIABLE not in os.environ
    use_backend("reference")
    assert current_backend() == "reference"


def test_every_thread_sees_the_choice() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["Triton", "cuda", ""])
def test_unknown_backend_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be one of auto, triton, reference"):
        use_backend(name)
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, name or "x")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be one of auto, triton, reference"):
        resolve("patch_mix", "cpu")


@pytest.mark.parametrize("name", ["nonsense", "dispatch", "..", ""])
def test_unknown_operator_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no operator named"):
        resolve(name, "cpu")


def test_triton_without_a_fused_implementation_is_refused(fused: list[float]) -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="patch_mix has no fused implementation"):
        resolve("patch_mix", "cuda")
    assert resolve("patch_mix", "cuda") == "reference"


def test_fused_implementation_runs_where_it_can(fused: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolve("ema_update", "cuda"), resolve("ema_update", "cpu")) == ("triton", "reference")
    with use_backend("reference"):
        assert resolve("ema_update", "cuda") == "reference"
    with use_backend("triton"):
        assert resolve("ema_update", "cuda:1") == "triton"
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=r"ema_update got tensors on cpu, needs cuda"):
            ema_update([torch.ones(2)], [torch.zeros(2)], momentum=0.5)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert resolve("ema_update", "cpu") == "triton"
        ema_update([torch.ones(2)], [torch.zeros(2)], momentum=0.5)
    ema_update(
        [torch.ones(2)], [torch.zeros(2)], momentum=0.25
    )  # auto prefers the reference on a CPU, interpreter or not
    assert fused == [0.5]


def test_compiled_code_follows_the_switch(fused: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiled = torch.compile(lambda x, y: ema_update([x], [y], momentum=0.5), backend="aot_eager", fullgraph=True)
    ema = torch.ones(2)
    compiled(ema, torch.zeros(2))
    with use_backend("triton"):
        compiled(ema, torch.zeros(2))
    assert ema.tolist() == [0.5, 0.5] and fused == [0.5]


def test_without_triton(fused: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert resolve("ema_update", "cuda") == "reference"
    with use_backend("triton"), pytest.raises(ValueError, match="triton is not installed"):
        resolve("ema_update", "cuda")


def test_operators_run_without_importing_triton() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from m3i_kernels.ema_update import ema_update; from m3i_kernels.patch_mix import patch_mix\n"
        "import m3i_kernels.dcnv3\n"
        "x = torch.ones(3); ema_update([x], [x * 0], momentum=0.5); assert x.tolist() == [0.5] * 3"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_tolerances_accept_rounding_and_refuse_more(dtype: torch.dtype) -> None:
    exact = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert_close(exact.to(dtype), exact)
    with pytest.raises(AssertionError, match="here"):
        assert_close((exact * (1 + 8 * TOLERANCES[dtype][1])).to(dtype), exact, what="here")
    with pytest.raises(AssertionError):
        assert_close(exact.to(dtype)[:-1], exact)
    with pytest.raises(AssertionError):
        assert_close(torch.full((2,), torch.nan, dtype=dtype), torch.full((2,), torch.nan))


def test_tolerance_scales_and_is_defined_for_floats_only() -> None:
    near = torch.tensor([1e-5])
    assert_close(near, torch.zeros(1), scale=20)
    with pytest.raises(AssertionError):
        assert_close(near, torch.zeros(1))
    with pytest.raises(ValueError, match=r"no tolerance for torch\.int64"):
        assert_close(torch.zeros(1, dtype=torch.int64), torch.zeros(1))


def test_layouts_keep_values_and_differ_in_memory() -> None:
    x = torch.arange(30).view(2, 3, 5)
    layouts = dict(noncontiguous(x))
    assert len(layouts) == 4
    assert all(torch.equal(layout, x) and layout.dtype == x.dtype for layout in layouts.values())
    assert len({(layout.stride(), layout.storage_offset() % 2) for layout in layouts.values()}) == 4
    assert sum(layout.is_contiguous() for layout in layouts.values()) == 1  # only the odd offset
    assert [layout.item() for _, layout in noncontiguous(torch.tensor(7))] == [7, 7, 7]
