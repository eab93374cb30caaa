"""The cache by several processes: the command, and a run that is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_latents import (
    assert_posterior,
    build_autoencoder,
    cache_folders,
    config,
    open_images,
    write_images,
)

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.data.cache import main
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.latents import cached_latents
from transfusion_mot.errors import UserError

ROOT = Path(__file__).parents[1]


def test_the_command_encodes_both_splits_with_two_processes_and_once(tmp_path, capsys):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 7)
    build_autoencoder().vae.save_pretrained(folder.parent / "vae")
    (folder / "4.png").write_bytes(b"no picture")
    arguments = [
        *(f"data.sources=[{{kind: imagefolder, path: {folder}}}]", f"data.cache_dir={folder.parent / 'cache'}"),
        *(f"autoencoder.path={folder.parent / 'vae'}", "data.image_size=16", "data.held_out_fraction=0.3"),
        *("data.num_workers=1", "data.latents=prepared"),
    ]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "--dynamo_backend", "no"]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "transfusion_mot.data.cache", *arguments],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "process 1 of 2" in result.stderr
    assert re.search(r"\(train\): (\d) images, \1 of them new; skipped: .*MB in ", result.stdout)
    assert "(held_out)" in result.stdout
    assert result.stdout.count("1 unreadable image") == 1
    assert re.search(r"encoded 6 images in [\d.]+ s: [\d.]+ images/s", result.stdout)
    assert len(cache_folders(folder)) == 1

    data = config(folder, held_out_fraction=0.3, latents="prepared")
    autoencoder = Autoencoder.load(str(folder.parent / "vae"), "cpu")
    cache = cached_latents(open_images(folder, data), autoencoder, data, 4)
    for index in np.flatnonzero(cache.readable):
        assert_posterior(cache, index, to_pixels(cache.images.image(index)), autoencoder)
    main(arguments)
    output = capsys.readouterr().out
    assert "0 of them new" in output
    assert "encoded" not in output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.image_size=18", "image_size is 18; it must be a multiple of 4"),
        ("data.buckets=[[16, 16], [16, 18]]", "is 18; it must be a multiple of 4"),
        ("data.cache_dir={file}", "data.cache_dir, '.*metadata.jsonl', cannot be made a folder"),
        ("data.cache_dir={file}/below", "data.cache_dir, '.*below', cannot be made a folder"),
    ],
)
def test_the_command_refuses_before_the_work(tmp_path, setting, message):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 3)
    build_autoencoder().vae.save_pretrained(tmp_path / "vae")
    arguments = [
        *(f"data.sources=[{{kind: imagefolder, path: {folder}}}]", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"autoencoder.path={tmp_path / 'vae'}", "data.image_size=16", "data.num_workers=0"),
    ]
    with pytest.raises(UserError, match=message):
        main([*arguments, setting.format(file=folder / "metadata.jsonl")])
    assert not (tmp_path / "cache").exists()


def test_help_keeps_its_lines(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (
        "\n    accelerate launch -m transfusion_mot.data.cache --config configs/quickstart.yaml\n"
        in capsys.readouterr().out
    )


TWO_RANKS = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from accelerate import Accelerator
from test_latents import build_autoencoder, config, open_images
from transfusion_mot.data.latents import cached_latents
folder = Path(sys.argv[1])
data, accelerator = config(folder), Accelerator(cpu=True)
cache = cached_latents(open_images(folder, data), build_autoencoder(), data, 2, accelerator, 3)
print(f"[{accelerator.process_index}:{cache.num_encoded}]", flush=True)
accelerator.end_training()
"""


def test_ranks_share_the_shards_and_go_on_where_a_killed_run_was(tmp_path):
    """Killed with every process it has started, as soon as there is a shard."""
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 40)
    (tmp_path / "encode.py").write_text(TWO_RANKS)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(tmp_path / "encode.py"), str(folder)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    process = start()
    while not list(tmp_path.glob("cache/latent-cache-*/*x*/*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    everybody = psutil.Process(process.pid)
    for one in (*everybody.children(recursive=True), everybody):
        one.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (unfinished,) = cache_folders(folder)
    assert not list(unfinished.glob("index-*"))
    finished = len([*unfinished.glob("*x*/*.safetensors")])
    process = start()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    whole = cached_latents(
        open_images(folder, config(folder)),
        build_autoencoder(),
        config(folder, cache_dir=str(tmp_path / "other")),
        2,
        None,
        3,
    )
    encoded = dict(re.findall(r"\[(\d):(\d+)\]", output))
    assert encoded.keys() == {"0", "1"}
    assert encoded["0"] == encoded["1"], "of both together"
    assert 0 < int(encoded["0"]) <= 40 - 3 * finished + 2
    cache = cached_latents(open_images(folder, config(folder)), build_autoencoder(), config(folder), 2)
    assert cache.num_encoded == 0
    for index in range(40):
        np.testing.assert_allclose(cache.posterior(index), whole.posterior(index), atol=1e-3)
