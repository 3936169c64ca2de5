"""What all tests of operators need of Triton's interpreter, which stands in for a GPU where there is none."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter round fp32 to bf16 to the nearest, as every GPU does.

    It cuts the lower 16 bits off, so that no test could hold a kernel to the rounding of its reference.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_and_round(self, source, target):
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data.copy().reshape(-1)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy().reshape(source.data.shape), language.bfloat16)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, cast_and_round)
