"""python -m benchmarks in the process of a test."""

from benchmarks import __main__ as command


def quiet(monkeypatch) -> None:
    """No sample pictures, and the test process keeps its own handler of SIGTERM."""
    monkeypatch.delenv("NOISYNN_SAMPLES", raising=False)
    monkeypatch.delenv("NOISYNN_TRACEBACK", raising=False)
    monkeypatch.setattr(command.signal, "signal", lambda *arguments: None)


def refused(capsys, *arguments) -> str:
    """Standard error of a command that ends with status 2."""
    try:
        status = command.main([str(word) for word in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), (status, out, err)
    assert "Traceback" not in err
    return err
