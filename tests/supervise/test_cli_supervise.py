"""`m3i supervise` as it is typed."""

import sys
from pathlib import Path

import pytest
from tiny import ROOT

from m3i_large import cli


def m3i(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["m3i", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("supervise", "--", "deepspeed", "train.py"), "command: got 'deepspeed train.py'"),
        (("supervise", "--", "srun", "pretrain.py", "--ds", "z.json"), "the launcher 'srun'"),
        (("supervise", "--", "deepspeed", "pretrain.py", "--ds", "z.json", "--recipe", "deom"), "did you mean 'demo'"),
        (("supervise", "--failures", "0", "--", "deepspeed", "pretrain.py"), "greater than or equal to 1"),
        (("supervise",), "Missing argument"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert m3i(monkeypatch, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_the_commands_own_options_stay_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "pretrain.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(2)")
    given = ["--ds", "z.json", "--debug", "--out", str(tmp_path / "run"), "train.steps=3"]
    monkeypatch.chdir(ROOT)
    assert m3i(monkeypatch, "supervise", "--delay", "0", "--", sys.executable, str(script), *given) == 2
    out, err = capfd.readouterr()
    assert str(given) in out, "with its --debug"
    lines = err.strip().splitlines()
    assert [line.partition(" (")[0] for line in lines] == ["supervise: start", "supervise: gave up"]
    assert not (tmp_path / "run").exists()
