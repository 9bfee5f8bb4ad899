"""laddpo chat, driven through its input: history, base beside tuned, commands, and every way in which it ends."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
import sys

import pytest

import laddpo
from laddpo.cli.app import cli
from laddpo.evaluation.answering import answerer
from laddpo.evaluation.conversation import Conversation
from laddpo.inputs import policy
from tests.pipeline.conftest import SHAPE, Stages
from tests.tiny import REPOSITORY, write_tiny_model

ASKED = ("07+15-04=", "hello", "07+15-04=")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Stages:
    """A tiny model and a run of train below the same folder."""
    folder = tmp_path_factory.mktemp("chat")
    stages = Stages(folder, write_tiny_model(folder / "tiny", SHAPE))
    settings = ["evaluation.at_end=false", "evaluation.tasks=[]", "best_metric=none", "optim.learning_rate=1e-2"]
    assert stages.run("train", *settings, f"output_dir={folder / 'run'}") == 0
    return stages


@pytest.fixture(scope="module")
def tuned(home):
    return laddpo.load(run=home.folder / "run")


@pytest.fixture
def chat(home, monkeypatch, capsys):
    """The exit code, the lines of the output and what was told beside it, of a chat about these lines."""

    def run(*lines: str | bytes, of: tuple[str, ...] = (f"run={home.folder / 'run'}",), more: tuple[str, ...] = ()):
        content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        places = [f"paths.data_dir={home.folder / 'data'}", "hardware.device=cpu"]
        code = cli("chat", [*of, *places, *more])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def shown(text: str) -> list[str]:
    return text.splitlines() or [""]


def test_each_message_is_answered_with_what_was_said_before(home, tuned, chat):
    code, out, err = chat(*ASKED)
    first = tuned.generate(ASKED[0])
    second = tuned.generate([turns(ASKED[0], first, ASKED[1])])[0]
    third = tuned.generate([turns(ASKED[0], first, ASKED[1], second, ASKED[2])])[0]
    assert (code, out) == (0, [*shown(first), *shown(second), *shown(third)])
    assert third != first and "/reset forgets" in err
    assert not (home.folder / "outputs" / "chat").exists(), "nothing is written"


def test_the_base_answers_beside_the_tuned_model_when_it_is_asked_for(tuned, chat):
    words, base = tuned.generate("hello"), tuned.generate("hello", base=True)
    assert words != base
    beside = [*shown(f"  base  {base}"), *shown(f" tuned  {words}")]
    assert chat("hello", more=("base=true",))[:2] == (0, beside)
    code, out, err = chat("hello", "/reset", "/base", "hello", "", "/help", "/base", "/reset", "hello")
    assert (code, out) == (0, [*shown(words), *beside, *shown(words)])
    assert "shown beside the tuned one" in err and "no longer shown" in err and err.count("forgotten") == 2


def test_an_adapter_has_its_base_beside_it_and_a_model_alone_has_none(home, tuned, chat, monkeypatch):
    base, words = tuned.generate("hello", base=True), tuned.generate("hello")
    shape = {"gen_length": 8, "block_length": 8, "steps": 2, "confidence_threshold": "null"}
    decoding = [f"evaluation.{name}={value}" for name, value in shape.items()]
    model = tuple(text for text in home.places() if text.startswith("model."))
    beside = (*model, f"adapter.path={home.folder / 'run' / 'adapter'}", *decoding)
    assert chat("hello", of=beside, more=("base=true",))[1] == [*shown(f"  base  {base}"), *shown(f" tuned  {words}")]
    assert chat("hello", of=(*model, *decoding))[:2] == (0, shown(base))
    code, out, err = chat("/base", of=(*model, *decoding))
    assert (code, out) == (2, []) and "/base: there is one model here" in err
    monkeypatch.setattr(policy, "load", lambda *_: pytest.fail("a model was loaded"))
    code, _, err = chat("hello", of=model, more=("base=true",))
    assert code == 2 and "base is true and there is one model here" in err and "Leave base out." in err


def test_settings_of_the_conversation_and_of_decoding_hold(tuned, chat):
    alone = tuned.generate(ASKED[0])
    assert chat(ASKED[0], ASKED[0], more=("chat.turns=0",))[1] == [*shown(alone), *shown(alone)]
    system = [{"role": "system", "content": "Be brief, please"}, *turns("hello")]
    assert chat("hello", more=("chat.system=Be brief, please",))[1] == shown(tuned.generate([system])[0])
    short = {"gen_length": 4, "block_length": 4, "steps": 1}
    decoding = tuple(f"evaluation.{name}={value}" for name, value in short.items())
    assert chat("hello", more=decoding)[1] == shown(tuned.generate("hello", **short))
    for wrong in ("chat.turns=-1", "dpo.beta=0.7", "evaluation.steps=0", "resume=true", "prompt=hello"):
        assert chat("hello", more=(wrong,))[0] == 2, wrong


def test_the_oldest_turns_are_forgotten_when_there_is_no_room_and_that_is_said(tuned, monkeypatch):
    loaded = tuned._both.loaded
    answers = answerer(loaded, tuned.config.evaluation, tuned.config.data, tuned.config.seed)
    talk = Conversation(tuned._both, answers, system="s")
    for _ in range(3):
        assert talk.ask("hello", ["tuned"])[1] == 0
    prompt = (*talk.system, *talk.said[2:], type(talk.said[0])("user", "hello"))
    monkeypatch.setattr(loaded.model.config, "max_sequence_length", len(answers.encoder.encode_prompt(prompt)) + 8)
    before = talk.said
    found, forgotten = talk.ask("hello", ["tuned"])
    assert forgotten == 1 and talk.said[:4] == before[2:] and talk.said[-1].content == found["tuned"]
    with pytest.raises(laddpo.api.UserError, match=r"the message has .* tokens, gen_length adds 8"):
        talk.ask("hello" * 99, ["tuned"])
    assert talk.said[:4] == before[2:], "a refused message is not remembered"


def test_forgotten_turns_are_told_beside_the_answers(chat, monkeypatch):
    monkeypatch.setattr(Conversation, "ask", lambda self, text, names: ({"tuned": "so\x1b[2J"}, 2))
    code, out, err = chat("hello")
    assert (code, out) == (0, ["so\\x1b[2J"]) and "note: the 2 oldest turns are forgotten" in err


def test_a_mistake_ends_a_pipe_with_its_message(chat):
    code, out, err = chat("/rest", "hello")
    assert (code, out) == (2, []) and "error: /rest: no such command. /base shows" in err
    code, out, err = chat(b"\xff\xfe")
    assert (code, out) == (2, []) and "the input is not UTF-8" in err
    code, out, err = chat("hello " * 1000)
    assert (code, out) == (2, []) and "the message has" in err and "Traceback" not in err
    code, out, err = chat("x" * (2**20 + 1))
    assert code == 2 and "the message has 1,048,577 characters" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("end", "shows_more"), [(EOFError, 0), (KeyboardInterrupt, 0), ("/quit", 0)])
def test_a_terminal_goes_on_after_a_mistake_and_ends_cleanly(home, tuned, monkeypatch, capsys, end, shows_more):
    typed = iter(["/rest", "hello " * 1000, "hello", end, "hello"])

    def type_in(prompt: str) -> str:
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", type_in)
    assert cli("chat", [f"run={home.folder / 'run'}", "hardware.device=cpu"]) == 0
    said = capsys.readouterr()
    assert said.out.rstrip("\n").splitlines() == shown(tuned.generate("hello")), "one answer, and the end"
    assert said.err.count("error:") == 2 and "no such command" in said.err


def test_ctrl_c_during_an_answer_ends_it_cleanly(chat, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    code, out, err = chat("hello", "hello")
    assert (code, out) == (0, [""]) and "Traceback" not in err


def test_piped_into_the_command_only_answers_go_to_the_output(home, tuned):
    command = [sys.executable, "-m", "laddpo", "chat", f"run={home.folder / 'run'}", "hardware.device=cpu"]
    asked = {"input": "hello\n/quit\nhello\n", "capture_output": True, "text": True, "cwd": REPOSITORY}
    done = subprocess.run(command, **asked, timeout=300)
    assert (done.returncode, done.stdout.splitlines()) == (0, shown(tuned.generate("hello"))), done.stderr
    assert json.dumps(done.stderr).count("Traceback") == 0
