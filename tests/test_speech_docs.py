"""The section about sampling of docs/speech.md: its commands and its code run, on a tiny model."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_pipeline_speech import picture, speech_pipeline, tone

from transfusion_mot.data.audio import Audio, write_wav

ROOT = Path(__file__).parents[1]


def test_commands_and_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "speech.md").read_text()
    section = page.split("\n## Sample\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    speech_pipeline().save_pretrained("runs/chameleon_speech/snapshots/step-0000001")
    write_wav(tone(), "a.wav")
    soundfile.write("b.flac", tone(0.3).samples, 1600)
    picture().save("picture.png")
    (commands,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    for command in commands.splitlines():
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        monkeypatch.setattr("sys.argv", [script, *arguments, "--device", "cpu"])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert {path.name for path in Path("samples/speech").glob("*.wav")} == {
        f"000{number}-{name}.wav" for number, name in enumerate(["a-red-apple"] * 2 + ["an-octopus"] * 2)
    }
    assert Path("told.wav").is_file()
    assert {path.name for path in Path("samples").glob("*.png")} == {"0000-a.png", "0001-b.png", "grid.png"}
    Path("apple.wav").unlink()
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert soundfile.info("apple.wav").frames == len(names["audio"].samples)
    assert isinstance(names["told"], Audio)
    assert isinstance(names["answer"], Audio)
    assert len(names["transcripts"]) == 2
    assert np.asarray(names["image"]).shape == np.asarray(Image.open("samples/0000-a.png")).shape
