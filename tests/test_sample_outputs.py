"""The input lines of sample.py, and its output folder."""

import errno
import io
import json
import re
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from safetensors import SafetensorError
from test_pipeline import tiny_pipeline

import sample
from transfusion_mot import files, outputs
from transfusion_mot.cli import sampling
from transfusion_mot.cli.outputs import ResultFolder
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.captions.files import read_captions
from transfusion_mot.evaluation.images import read_prompts
from transfusion_mot.evaluation.protocol.prompts import read_geneval, read_text_prompts
from transfusion_mot.evaluation.protocol.sample_files import claim_folder

# At each of these `str.splitlines` cuts, beside the line feed and the carriage return.
BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
PROMPTS = [f"a{character}b" for character in BREAKS] + ["sun"]


@pytest.mark.parametrize("text", ["", "a", "a\n", "a\nb", "a\r\nb\r\n", "\n", "\n\na", "a\n\n"])
def test_lines_are_those_of_python_where_it_cuts_at_newlines_alone(text: str) -> None:
    assert files.lines_of(text) == text.splitlines()


def test_results_keep_prompts_with_any_character(tmp_path: Path) -> None:
    folder = ResultFolder(str(tmp_path / "out"), {"seed": 0}, "metadata.jsonl", len(PROMPTS), PartialState())
    lines = [{"file_name": f"{number}.png", "text": prompt} for number, prompt in enumerate(PROMPTS)]
    folder.add(dict(enumerate(lines)))
    for line in lines:
        (folder.path / line["file_name"]).touch()
    folder.finish()
    assert list(folder.read()) == lines
    images, texts = read_prompts(folder.path)
    assert [image.name for image in images] == [line["file_name"] for line in lines]
    assert texts == PROMPTS
    assert read_captions(folder.results) == {line["file_name"]: [line["text"]] for line in lines}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_prompts_of_a_file_and_of_standard_input_end_at_newlines_alone(tmp_path, monkeypatch, newline) -> None:
    content = ("\ufeff" + newline.join([*PROMPTS, "", "moon"])).encode()
    (tmp_path / "prompts.txt").write_bytes(content)
    expected = [*PROMPTS, "moon"]
    arguments = Namespace(prompts=[], prompts_file=str(tmp_path / "prompts.txt"))
    assert sampling.read_prompts(arguments, PartialState()) == expected
    assert read_text_prompts(arguments.prompts_file) == expected
    arguments.prompts_file = "-"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert sampling.read_prompts(arguments, PartialState()) == expected
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in PROMPTS]
    (tmp_path / "geneval.jsonl").write_text(newline.join([*lines, ""]), encoding="utf-8")
    assert [line["prompt"] for line in read_geneval(str(tmp_path / "geneval.jsonl"))] == PROMPTS


def test_what_is_not_utf_8_is_refused(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(UserError, match=r"the prompt 'caf\\udce9' is not UTF-8 text; write it in UTF-8"):
        tiny_pipeline().check_prompts(["sun", "caf\udce9"])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--caption", b"caf\xe9.png".decode(errors="surrogateescape")])
    with pytest.raises(SystemExit), exit_on_user_error():
        raise AssertionError
    assert capsys.readouterr().err.startswith(r"error: the argument 'caf\udce9.png' is not UTF-8 text; ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"sun\ncaf\xe9\n"), errors="surrogateescape"))
    with pytest.raises(UserError, match="prompts file '-' cannot be read as UTF-8 text"):
        sampling.read_prompts(Namespace(prompts=[], prompts_file="-"), PartialState())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a"),
        # As it looks where a tmpfs is full.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(error, capsys) -> None:
    with pytest.raises(SystemExit), exit_on_user_error():
        raise error
    assert re.fullmatch(r"error: the disk or your quota is full \(.*\); free some .*\n", capsys.readouterr().err)
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def folder_of(path: Path, **command: object) -> ResultFolder:
    return ResultFolder(str(path), command, "metadata.jsonl", 2, PartialState())


def test_of_two_commands_that_begin_together_one_is_refused(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "out", seed=0), folder_of(tmp_path / "out", seed=1)
    again = folder_of(tmp_path / "out", seed=0)
    one.add({0: {"text": "a"}})
    with pytest.raises(UserError, match="another command that began at the same time writes into"):
        two.add({0: {"text": "b"}})
    again.add({1: {"text": "c"}})
    one.finish()
    assert list(again.read()) == [{"text": "a"}, {"text": "c"}]


def test_results_may_stand_above_folders_of_other_results(tmp_path: Path) -> None:
    folder_of(tmp_path / "samples" / "first", seed=0).add({0: {"text": "a"}})
    above = folder_of(tmp_path / "samples", seed=0)
    above.add({0: {"text": "b"}})
    above.finish()
    assert list(above.read()) == [{"text": "b"}]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0000-sun.png").touch()
    with pytest.raises(UserError, match=r"mine' holds files that sample\.py did not write; give another --output"):
        folder_of(tmp_path / "mine", seed=0)


def test_the_same_command_goes_on_whatever_form_its_values_have(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "out", guidance_interval=(0.2, 0.7))
    one.add({0: {"text": "a"}})
    assert folder_of(tmp_path / "out", guidance_interval=(0.2, 0.7)).missing() == [1]


def test_of_many_that_claim_a_file_one_has_it(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def claim_it(number: int) -> dict[str, Any]:
        start.wait()
        return outputs.claim(tmp_path / "command.json", {"number": number, "text": "蛸" * 10_000})

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(claim_it, range(8)))
    assert all(content == found[0] for content in found)


def test_a_claim_waits_for_the_one_who_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "command.json"
    path.touch()
    writing = threading.Timer(0.1, path.write_text, ['{"seed": 0}'])
    writing.start()
    assert outputs.claim(path, {"seed": 1}) == {"seed": 0}
    writing.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", None])
@pytest.mark.parametrize("open_folder", [folder_of, lambda path: claim_folder(path, {})])
def test_a_foreign_file_in_the_place_of_ours_is_refused(tmp_path, monkeypatch, open_folder, content) -> None:
    monkeypatch.setattr(outputs, "_SECONDS_BETWEEN", 0)
    for name in (".commands/000000.json", "settings.json"):
        path = tmp_path / "out" / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with pytest.raises(UserError, match=r"json' is not a file that this command wrote; give another folder, or remove"):
        open_folder(tmp_path / "out")


def test_places_are_tried_without_leaving_anything(tmp_path: Path) -> None:
    outputs.check_writable_folder(tmp_path / "a" / "b", "output")
    outputs.check_writable_folder(tmp_path, "output")
    outputs.check_writable_file(tmp_path / "a" / "b.json", "output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    outputs.check_writable_file(tmp_path / "file", "output")
    assert (tmp_path / "file").read_text() == "x"
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match=f"output '{path}' cannot be written: '{tmp_path / 'file'}': Not a dir"):
            outputs.check_writable_folder(path, "output")
    with pytest.raises(UserError, match=f"output '{tmp_path}' is a folder; give the name of a file"):
        outputs.check_writable_file(tmp_path, "output")
    with pytest.raises(
        UserError, match=f"output '{tmp_path}/file/a.json' cannot be written: '{tmp_path}/file': Not a dir"
    ):
        outputs.check_writable_file(tmp_path / "file" / "a.json", "output")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nobody may make files")
def test_a_folder_in_which_files_cannot_be_made_is_refused() -> None:
    with pytest.raises(UserError, match=r"output '/proc/out' cannot be written: '/proc': .*; choose another"):
        outputs.check_writable_folder("/proc/out", "output")


def test_an_output_that_cannot_be_written_is_found_before_the_model(tmp_path, monkeypatch) -> None:
    # It looks like a snapshot; nothing in it can be loaded.
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model_index.json").touch()
    (tmp_path / "a").touch()
    words = ["sun", "--checkpoint", str(tmp_path / "snapshot"), "--output", str(tmp_path / "a/b")]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(UserError, match=r"output '.*/a/b' cannot be written"):
        sample.main()
