"""How `dsla` starts and ends: help, version, one line for what goes wrong, interrupts, full disks."""

import errno
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
from safetensors import SafetensorError

from dsla_cli import main
from dsla_cli.commands import COMMANDS, env
from dsla_hf.core.files import write_whole, written_whole
from dsla_hf.core.interrupts import on_interrupt


def fails_with(monkeypatch, error):
    """`dsla env` raises this."""

    def run(args):
        raise error

    monkeypatch.setattr(env, "run", run)


def test_command_is_installed():
    (command,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "dsla")
    assert command.load() is main


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    output, error = capsys.readouterr()
    assert output.startswith("usage: dsla") and re.findall(r"^    (\w+)", output, re.MULTILINE) == list(COMMANDS) and error == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"dsla {version('dsla-hf')}\n"


@pytest.mark.parametrize(
    "error",
    [ValueError("two\n lines"), OSError("two lines"), ImportError("two lines"), FloatingPointError("two lines")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error):
    fails_with(monkeypatch, error)
    assert main(["env"]) == 1
    assert capsys.readouterr() == ("", "dsla env: two lines\n")


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    fails_with(monkeypatch, RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["env"])


def test_an_error_of_the_system_has_no_number_and_its_path(monkeypatch, capsys):
    fails_with(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.txt"))
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "dsla env: No such file or directory: gone.txt\n"


def test_a_reader_that_has_enough_is_no_error():
    code = "import sys\nfrom dsla_cli import main\nfrom dsla_cli.commands import env\n"
    code += "env.run = lambda args: [print('line', flush=True) for _ in range(100_000)]\nsys.exit(main(['env']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE and process.stderr.read() == ""


# --- interrupts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_says_what_is_kept(command, monkeypatch, capsys, tmp_path):
    required = {
        "order": ["--model", "m", "--adapter", "a", "--data", "d"],
        "merge": ["--model", "m", "--adapter", "a", "--level", "1", "--output", str(tmp_path)],
        "generate": ["--model", "m", "--prompt", "p"],
        "eval": ["--model", "m", "--tasks", "needle", "--output", str(tmp_path)],
        "bench": ["--model", "m", "--output", str(tmp_path)],
        "report": ["r", "--out", "page.md"],
        "serve": ["m"],
        "replay": ["t.csv", "--url", "u", "--out", str(tmp_path)],
        "quickstart": ["--output", str(tmp_path)],
        "distill": ["--output_dir", str(tmp_path)],
    }

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[command], "run", interrupted)
    assert main([command, *required.get(command, [])]) == 130
    output, error = capsys.readouterr()
    assert output == "" and error.startswith(f"\ndsla {command}: interrupted; ") and error.count("\n") == 2
    assert len(error) > len(f"\ndsla {command}: interrupted; \n") + 10
    assert (f"to go on: dsla {command} " in error) == (command in ("distill", "eval"))


def test_what_the_work_says_of_an_interrupt_is_told(monkeypatch, capsys):
    def run(args):
        with on_interrupt(lambda: "three of four parts are kept"):
            raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "\ndsla env: interrupted; three of four parts are kept\n"


def test_levels_that_are_finished_are_named(monkeypatch, capsys, tmp_path):
    def run(args):
        for level in (0, 4):
            (tmp_path / f"level-{level:02d}.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["eval"], "run", run)
    arguments = ["eval", "--model", "m", "--tasks", "needle", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert capsys.readouterr().err.strip() == (
        f"dsla eval: interrupted; finished are the levels 0, 4 in {tmp_path}; to go on: dsla {' '.join(arguments)}"
    )


WAITS = """
import sys, time
from dsla_cli import main
from dsla_cli.commands import env

def run(args):
    print("running", flush=True)
    time.sleep(60)

env.run = run
sys.exit(main(["env"]))
"""


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_signals_end_a_command_with_one_line_and_their_status(sent, status):
    def as_in_a_terminal():
        """Jobs in the background of a shell ignore Ctrl-C, and what they start does, too."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WAITS], preexec_fn=as_in_a_terminal, **pipes)
    assert process.stdout.readline() == "running\n"
    process.send_signal(sent)
    output, error = process.communicate(timeout=30)
    assert process.returncode == status and output == ""
    assert error == "\ndsla env: interrupted; nothing was printed\n"


def test_sigterm_is_afterwards_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        main(["env", "--fast"])
    assert main(["report", "nothing", "--out", "page.txt"]) == 1
    assert signal.getsignal(signal.SIGTERM) == before


# --- full disks -------------------------------------------------------------------------------------------------

FULL = [
    OSError(errno.ENOSPC, "No space left on device", "out/part"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_leaves_nothing_behind_and_is_told_with_the_path(error, tmp_path, monkeypatch, capsys):
    def run(args):
        with written_whole(tmp_path / "out") as temporary:
            (temporary / "part").write_text("half")
            raise error

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == 1
    assert capsys.readouterr() == ("", f"dsla env: the disk is full ({tmp_path / 'out'}): make room and give the same command again\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_elsewhere_is_one_line_too(error, monkeypatch, capsys):
    fails_with(monkeypatch, error)
    assert main(["env"]) == 1
    output, told = capsys.readouterr()
    assert output == "" and told.startswith("dsla env: the disk is full (") and told.count("\n") == 1


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "new" / "result.json"
    write_whole(file, "before\n")
    assert file.read_text() == "before\n" and os.listdir(file.parent) == ["result.json"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(file, "after\n")
    assert caught.value.filename == str(file)
    assert file.read_text() == "before\n" and os.listdir(file.parent) == ["result.json"]


def test_a_folder_that_was_there_stays_after_a_full_disk(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    def save():
        with written_whole(tmp_path) as temporary:
            (temporary / "part").write_text("half")
            raise FULL[1]

    with pytest.raises(OSError, match=str(tmp_path)):
        save()
    assert os.listdir(tmp_path) == ["mine.txt"]
