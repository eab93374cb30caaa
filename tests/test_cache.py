"""The cache by several processes: the command, and a run that is killed."""

import io
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from process_group import run_processes, start_processes
from test_latents import (
    assert_posterior,
    build_autoencoder,
    cache_folders,
    config,
    open_images,
    write_images,
)

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.data.cache import main
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.latents import cached_latents
from transfusion_mot.errors import UserError

pytestmark = pytest.mark.slow


def command_in_a_group(arguments: list[str]) -> tuple[str, str]:
    """What it prints."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        main(arguments)
    return output.getvalue(), errors.getvalue()


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
    (output, errors), _ = run_processes(command_in_a_group, 2, {}, tmp_path / "group", arguments)
    assert "process 1 of 2" in errors
    assert re.search(r"\(train\): (\d) images, \1 of them new; skipped: .*MB in ", output)
    assert "(held_out)" in output
    assert output.count("1 unreadable image") == 1
    assert re.search(r"encoded 6 images in [\d.]+ s: [\d.]+ images/s", output)
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


def encode_in_a_group(folder: Path) -> int:
    """How many images this rank has encoded."""
    data, accelerator = config(folder), Accelerator(cpu=True)
    return cached_latents(open_images(folder, data), build_autoencoder(), data, 2, accelerator, 3).num_encoded


def test_ranks_share_the_shards_and_go_on_where_a_killed_run_was(tmp_path):
    """Killed as soon as there is a shard."""
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 40)
    processes = start_processes(encode_in_a_group, 2, {}, tmp_path / "killed", folder)
    while not list(tmp_path.glob("cache/latent-cache-*/*x*/*.safetensors")):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    (unfinished,) = cache_folders(folder)
    assert not list(unfinished.glob("index-*"))
    finished = len([*unfinished.glob("*x*/*.safetensors")])
    encoded = run_processes(encode_in_a_group, 2, {}, tmp_path / "group", folder)
    whole = cached_latents(
        open_images(folder, config(folder)),
        build_autoencoder(),
        config(folder, cache_dir=str(tmp_path / "other")),
        2,
        None,
        3,
    )
    assert encoded[0] == encoded[1], "of both together"
    assert 0 < encoded[0] <= 40 - 3 * finished + 2
    cache = cached_latents(open_images(folder, config(folder)), build_autoencoder(), config(folder), 2)
    assert cache.num_encoded == 0
    for index in range(40):
        np.testing.assert_allclose(cache.posterior(index), whole.posterior(index), atol=1e-3)
